"""The sending end of a connection that is written to directly: it stops as soon as the write buffer is full."""

import asyncio
from collections.abc import MutableMapping
from typing import Any, cast

import pytest
from waits import eventually

from worker.contract.ids import EntryId
from worker.gateway.connection_parts import LeanFlowControl
from worker.gateway.outlets import WIRE, Outlet, Wire
from worker.gateway.protocols.native import NativeEvents
from worker.gateway.protocols.protocol import Frame

FRAME = Frame(EntryId(1, 1), b"data")
MESSAGE = NativeEvents().message(b"message")


class FullTransport:
    """A transport whose write buffer has room for a number of writes. It reports that it is full as uvloop does."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written: list[bytes] = []
        self.is_closed = False
        self.flow = LeanFlowControl(cast("asyncio.Transport", self))

    def write(self, data: bytes) -> None:
        if self.is_closed:
            raise RuntimeError("the handler is closed")
        self.written.append(data)
        if len(self.written) >= self.room and not self.flow.write_paused:
            self.flow.pause_writing()

    def client_reads(self, room: int) -> None:
        """Make room in the buffer for more writes."""
        self.room = len(self.written) + room
        self.flow.resume_writing()


class Sender:
    """An outlet over a transport, and what its owner was called with."""

    def __init__(self, transport: FullTransport) -> None:
        self.transport = transport
        self.states: list[str] = []
        wire = Wire(cast("asyncio.WriteTransport", transport), transport.flow)
        self.outlet = Outlet({WIRE: wire}, self._receive, self._send, NativeEvents(), self._on_change)

    def _on_change(self) -> None:
        self.states.append("blocked" if self.outlet.blocked_at else "writable")

    async def _receive(self) -> MutableMapping[str, Any]:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.transport.write(message["body"])


async def test_a_frame_that_fills_the_buffer_is_written_and_the_next_ones_wait() -> None:
    transport = FullTransport(2)
    sender = Sender(transport)
    sender.outlet.watch()
    assert [sender.outlet.write_frame(FRAME) for _ in range(4)] == [True, False, False, False]
    assert transport.written == [FRAME.chunk] * 2
    assert sender.states == ["blocked"]

    transport.client_reads(room=10)

    await eventually(lambda: _equal(sender.states, ["blocked", "writable"]))
    assert transport.written == [FRAME.chunk] * 2 + [b"data"] * 2, "what had to wait goes by the server's `send`"
    assert sender.outlet.write_frame(FRAME)


async def _equal(left: object, right: object) -> bool:
    return left == right


async def test_a_heartbeat_that_fills_the_buffer_blocks_the_frames_after_it() -> None:
    transport = FullTransport(1)
    sender = Sender(transport)
    sender.outlet.watch()
    assert not sender.outlet.write(MESSAGE)
    assert not sender.outlet.write_frame(FRAME)
    assert transport.written == [b"message"]
    assert sender.states == ["blocked"]


async def test_a_connection_that_is_full_from_the_start_gets_nothing() -> None:
    transport = FullTransport(1)
    transport.write(b"an earlier response")
    sender = Sender(transport)
    sender.outlet.watch()
    assert not sender.outlet.write_frame(FRAME)
    assert transport.written == [b"an earlier response"]


async def test_a_closed_connection_is_no_error() -> None:
    transport = FullTransport(10)
    sender = Sender(transport)
    sender.outlet.watch()
    transport.is_closed = True
    assert sender.outlet.write_frame(FRAME)
    assert sender.states == []


@pytest.mark.parametrize("goes_on", [False, True])
async def test_a_response_that_has_ended_is_not_blocked_by_the_next_one(*, goes_on: bool) -> None:
    transport = FullTransport(1)
    first = Sender(transport)
    first.outlet.watch()
    if goes_on:
        Sender(transport).outlet.watch()
    first.outlet.stop()
    transport.write(b"the next response")
    assert not first.outlet.blocked_at
    assert (transport.flow.on_pause is None) is not goes_on

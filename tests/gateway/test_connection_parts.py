"""The parts of a connection that take less memory than uvicorn's and asyncio's do the same."""

import sys

from uvicorn.server import ServerState

from worker.gateway.connection_parts import LeanEvent, LeanPipeline
from worker.gateway.connections import BoundedProtocol, Bounds, protocol_config


async def test_an_event_lets_all_go_on_who_wait_even_if_one_of_them_was_cancelled() -> None:
    event = LeanEvent()
    first, cancelled, last = event.wait(), event.wait(), event.wait()
    cancelled.cancel()
    assert not any([event.is_set(), first.done(), last.done()])

    event.set()

    assert all([event.is_set(), first.done(), last.done(), event.wait().done()])
    event.clear()
    assert not any([event.is_set(), event.wait().done()])


async def test_an_event_forgets_who_no_longer_waits() -> None:
    event = LeanEvent()
    for _ in range(100):
        event.wait().cancel()
    assert len(event._waiters) <= 1


def test_pipelined_requests_are_answered_in_their_order() -> None:
    pipeline = LeanPipeline()
    for request in (1, 2, 3):
        pipeline.appendleft(request)
    assert [pipeline.pop() for _ in range(3)] == [1, 2, 3]


async def test_an_idle_connection_is_small() -> None:
    async def app(_scope: object, _receive: object, _send: object) -> None: ...

    protocol = BoundedProtocol(protocol_config(app), ServerState(), Bounds())
    assert len(vars(protocol)) < 30, "above 30 attributes, Python gives each connection a dict of its own"
    assert sys.getsizeof(protocol.pipeline) < 100

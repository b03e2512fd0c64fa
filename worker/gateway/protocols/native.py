"""The native protocols: the entries of a log as arrays of JSON objects, over server-sent events or a WebSocket.

An event or message is always an array, `[entry, …]`: one entry as it arrives, many in a backlog. The id of an event is
the id of the last entry in it, which a reader sends back as `Last-Event-ID` or `?after=`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from ...contract.entries import JSON, AnyEntry, Delta, Object
from ...contract.ids import SEAL, EntryId
from .protocol import Message, StreamProblem, StreamProtocol


class _DeltaObject(msgspec.Struct, omit_defaults=True, tag_field="type", tag="delta", gc=False):
    """A delta as `as_dict` returns it. msgspec writes this type in a quarter of the time."""

    id: str
    content: str = ""
    reasoning: str = ""
    tool_calls: list[Object] = msgspec.field(default_factory=list)
    index: int = 0
    finish_reason: str = ""
    stop_reason: JSON = None
    logprobs: JSON = None
    token_ids: list[int] = msgspec.field(default_factory=list)
    extra: Object = msgspec.field(default_factory=dict)


_encode = msgspec.json.Encoder().encode


class NativeEncoder:
    """Encodes each entry as a JSON object: its id (text), its type, and the fields that are not at their default."""

    is_over = False
    """A native stream ends with its log."""

    def encode(self, entry: AnyEntry) -> bytes:
        if type(entry) is not Delta:
            return _encode(entry.as_dict())
        return _encode(
            _DeltaObject(
                f"{entry.id[0]}-{entry.id[1]}",
                entry.content,
                entry.reasoning,
                entry.tool_calls,
                entry.index,
                entry.finish_reason,
                entry.stop_reason,
                entry.logprobs,
                entry.token_ids,
                entry.extra,
            )
        )


_ENCODER = NativeEncoder()
"""The encoder has no state, so all logs share one."""


@dataclass(frozen=True)
class NativeEvents(StreamProtocol):
    """Server-sent events. The reader is an EventSource, which reconnects after a clean end and sends its last id."""

    name: ClassVar[str] = "native"
    starts_anywhere: ClassVar[bool] = True

    def new_encoder(self) -> NativeEncoder:
        return _ENCODER

    def frame(self, pieces: Sequence[bytes], last: EntryId) -> bytes:
        return b"id: %d-%d\ndata: [%b]\n\n" % (*last, b",".join(pieces))

    def interrupted(self) -> bytes:
        return b"retry: 1000\n\n"

    def failed(self, problem: StreamProblem) -> bytes:
        if problem.is_temporary:  # no id, so the reader comes back to the place where it is
            return self.interrupted() + b"event: busy\ndata: %b\n\n" % _encode(error_object(problem))
        # The id is the seal's, so the next connection of an EventSource is answered with 204, which closes it.
        return named_event("gone" if problem.status in {404, 410} else "problem", SEAL, problem)


@dataclass(frozen=True)
class NativeMessages(StreamProtocol):
    """Messages of a WebSocket: the arrays of `NativeEvents` without the ids."""

    name: ClassVar[str] = "websocket"
    starts_anywhere: ClassVar[bool] = True
    joins_writes: ClassVar[bool] = False

    def new_encoder(self) -> NativeEncoder:
        return _ENCODER

    def frame(self, pieces: Sequence[bytes], last: EntryId) -> bytes:  # noqa: ARG002 - the entries have their ids
        return b"[%b]" % b",".join(pieces)

    def message(self, frame: bytes) -> Message:
        return {"type": "websocket.send", "text": frame.decode()}

    def heartbeat(self, text: str) -> bytes:  # noqa: ARG002 - see below
        return b""  # every message is an array of entries; the server's pings keep the connection open

    def failed(self, problem: StreamProblem) -> bytes:  # noqa: ARG002 - the close code and its reason report it
        return b""


def named_event(name: str, cursor: EntryId, problem: StreamProblem) -> bytes:
    """Return an event that reports a problem to an EventSource, which cannot read the status of a response."""
    return b"event: %b\nid: %d-%d\ndata: %b\n\n" % (name.encode(), *cursor, _encode(error_object(problem)))


def error_object(problem: StreamProblem) -> Object:
    """Return a problem in the shape of OpenAI's errors."""
    return {"error": {"message": problem.message, "type": problem.type, "param": None, "code": problem.code}}

"""Chat completions: encodes the entries of a log as the events of OpenAI's streaming API, as vLLM sends them. No I/O.

The wire holds `data:` lines and comments only: some clients fail at `id:`, `retry:` and named events. An event is one
`data:` line and a blank line, so the number of events is the place in the stream from which a reader continues.

A chunk has what vLLM's chunk had, without fields that are null. The token ids and the usage, which workers always
request, are left out unless the request itself has them.
"""

from dataclasses import dataclass
from typing import ClassVar, Self, cast

import msgspec

from ...contract.entries import (
    JSON,
    AnyEntry,
    Cancelled,
    Claimed,
    Delta,
    Failed,
    Object,
    Opened,
    Restarted,
    Terminal,
    is_terminal,
)
from .protocol import StreamProblem, StreamProtocol

RESTARTED = "stream_restarted"
"""The code of the error for an answer that begins again after a part of it was sent: a chunk cannot take text back."""
INTERRUPTED = "interrupted"
"""The code of the error that ends the stream of a gateway which must stop. The answer goes on: a client that repeats
its request with `Relay-After` gets the rest."""
STOPPING = "the gateway stops, and the answer goes on: repeat the request"
"""The message of this error."""

_DONE = b"data: [DONE]\n\n"
_MOST_ROLES = 128
"""The most choices that get a role chunk: as many as OpenAI allows."""
_NOT_OF_THE_CHOICE = frozenset({"delta", "chunk"})
"""Fields of a delta's `extra` that are not fields of the choice."""
_ERROR = b'data: {"error":'
_encode = msgspec.json.encode
_decode = msgspec.json.decode


@dataclass(frozen=True)
class ChatChunks(StreamProtocol):
    """Chunks of a chat completion. `n` is the number of choices; the other options are what the request has itself."""

    name: ClassVar[str] = "chat"
    n: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False

    @classmethod
    def of(cls, request: Object) -> Self:
        """Read the options of a chat completion. Values of a wrong type are ignored, since vLLM refuses them."""
        n, stream = request.get("n"), request.get("stream_options")
        stream = stream if isinstance(stream, dict) else {}
        include_usage = bool(stream.get("include_usage"))
        return cls(
            n=n if isinstance(n, int) and n > 1 else 1,
            include_usage=include_usage,
            continuous_usage=include_usage and bool(stream.get("continuous_usage_stats")),
            token_ids=bool(request.get("return_token_ids")),
        )

    def new_encoder(self) -> "ChunkEncoder":
        return ChunkEncoder(self)

    def interrupted(self) -> bytes:
        return error_event(STOPPING, "server_error", INTERRUPTED)

    def failed(self, problem: StreamProblem) -> bytes:
        return error_event(problem.message, problem.type, problem.code)


class ChunkEncoder:
    """Encodes the entries of one log, from its start.

    The chunk with a finish reason is sent with the next entry, because vLLM's last chunk also has fields that the
    worker receives after it, such as the fingerprint.

    Attributes:
        is_over: whether the stream has ended, so that later entries add nothing.
    """

    def __init__(self, options: ChatChunks) -> None:
        self.is_over = False
        self._options = options
        self._opened: Opened | None = None
        """The id and time of the first `opened` with the model of the latest: all chunks of a stream have one id."""
        self._held: Object | None = None
        self._has_sent_delta = False
        self._is_claimed = False
        """Whether the last entry was `claimed`."""

    def encode(self, entry: AnyEntry) -> bytes:
        """The bytes that an entry adds to the stream."""
        if self.is_over:
            return b""
        # A worker that finds deltas writes `resumed` or `restarted` after `claimed`. This one found none: a failover
        # of Redis has lost those that were sent.
        begins_again = self._is_claimed and isinstance(entry, Opened | Delta)
        self._is_claimed = isinstance(entry, Claimed)
        if (begins_again or isinstance(entry, Restarted)) and self._has_sent_delta:
            self.is_over = True
            message = "the answer begins again, and a part of it was sent already: repeat the request"
            return self._release() + error_event(message, "server_error", RESTARTED)
        if isinstance(entry, Delta):
            return self._delta(entry)
        if isinstance(entry, Opened):
            return self._release() + self._roles(entry)
        if is_terminal(entry):
            self.is_over = True
            return self._end(entry)
        return b""

    def _roles(self, entry: Opened) -> bytes:
        """The first chunk of each choice. A later `opened`, of another attempt or of another model, adds none."""
        if self._opened is not None:
            self._opened = msgspec.structs.replace(self._opened, model=entry.model or self._opened.model)
            return b""
        self._opened = entry
        chunks = []
        for index in range(min(self._options.n, _MOST_ROLES)):
            chunk = entry.chunk()
            (choice,) = cast("list[Object]", chunk["choices"])
            choice["index"] = index
            chunks.append(_event(self._with_extra(chunk, entry.extra)))
        return b"".join(chunks)

    def _delta(self, entry: Delta) -> bytes:
        chunk = entry.chunk(self._opened)
        (choice,) = cast("list[Object]", chunk["choices"])
        if self._options.token_ids:
            choice["token_ids"] = cast("JSON", entry.token_ids)
        else:
            choice.pop("token_ids", None)
        if entry.finish_reason:
            choice["stop_reason"] = entry.stop_reason
        if entry.extra:
            for name, value in entry.extra.items():
                if name not in _NOT_OF_THE_CHOICE:
                    choice.setdefault(name, value)
            of_chunk = entry.extra.get("chunk")
            chunk = self._with_extra(chunk, of_chunk if isinstance(of_chunk, dict) else {})
        elif not (choice["delta"] or entry.finish_reason or entry.logprobs is not None or choice.get("token_ids")):
            return b""  # it has only the token ids that the worker requested
        self._has_sent_delta = True
        released = self._release()
        if entry.finish_reason:
            self._held = chunk
            return released
        return released + _event(chunk)

    def _with_extra(self, chunk: Object, extra: Object) -> Object:
        """A chunk with the fields that vLLM's chunk had beside its choices."""
        for name, value in extra.items():
            if name != "usage" or self._options.continuous_usage:
                chunk.setdefault(name, value)
        return chunk

    def _release(self, extra: Object | None = None) -> bytes:
        """The chunk that was held back, with further fields."""
        if self._held is None:
            return b""
        chunk, self._held = self._held, None
        return _event(chunk | {name: value for name, value in (extra or {}).items() if name not in chunk})

    def _end(self, entry: AnyEntry) -> bytes:
        if isinstance(entry, Failed):
            # A resuming client takes `interrupted` for the end of a gateway. This is the end of the answer.
            code = f"answer_{entry.code}" if entry.code == INTERRUPTED else entry.code
            return self._release() + error_event(entry.message, "server_error", code)
        if isinstance(entry, Cancelled):
            return self._release() + error_event("the request was cancelled", "cancelled", "cancelled")
        if not isinstance(entry, Terminal):
            return self._release() + error_event("the log ended with an unknown entry", "server_error", "unknown")
        if not self._options.include_usage:
            return self._release(entry.extra) + _DONE
        head = Delta(id=entry.id).chunk(self._opened) | {"choices": []}
        usage = _event(entry.extra | head | {"usage": entry.usage}) if entry.usage else b""
        return self._release() + usage + _DONE


def error_event(message: str, kind: str, code: str) -> bytes:
    """The event by which a stream ends that has failed: clients raise its message, and accept no other shape."""
    return _event({"error": {"message": message, "type": kind, "param": None, "code": code}}) + _DONE


def error_in(event: bytes) -> tuple[str, str] | None:
    """Return the code and the message if this is the event of an error."""
    if not event.startswith(_ERROR):
        return None
    error = _decode(event[6 : event.index(b"\n")])["error"]
    return error["code"], error["message"]


def _event(value: object) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"

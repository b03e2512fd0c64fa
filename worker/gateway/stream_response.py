"""The response that streams one log: a small ASGI application without a queue or a timer of its own.

The head is sent at once. Then come the log so far in few large writes, each new entry in the step in which it arrives,
and comments as heartbeats. A stream ends as its protocol needs it.
"""

from collections.abc import Mapping

from ..client.errors import ClientError
from ..contract.ids import BEFORE_ALL, EntryId
from .log_cursor import LogCursor
from .open_streams import ClientStream, OpenStreams
from .outlets import RAW_SEND, Connection, Outlet, Receive, Scope, Send, forget_request
from .problems import Problem, problem_of
from .protocols.protocol import StreamProtocol

EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class StreamResponse:
    """An ASGI response with the stream of one request.

    Args:
        streams: the open streams of the process.
        position: the last entry that the reader has. Only for a protocol that starts anywhere.
        skip: how many events the reader has.
        headers: further headers of the response.
    """

    def __init__(
        self, streams: OpenStreams, request_id: str, protocol: StreamProtocol, *,
        position: EntryId = BEFORE_ALL, skip: int = 0, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._streams = streams
        self._request_id = request_id
        self._protocol = protocol
        self._position = position
        self._skip = skip
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = EVENT_STREAM_HEADERS | {"X-Request-Id": self._request_id} | dict(self._headers or {})
        await send(response_start(headers))
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        connection = scope, receive, scope.get(RAW_SEND, send)
        forget_request(scope)
        stream = LogStream(self._streams, self._request_id, self._protocol, connection, self._position, self._skip)
        await self._streams.start(stream, scope)


class LogStream(ClientStream):
    """An open stream of one log, in any protocol and over any connection."""

    __slots__ = ("_cursor", "_request_id")

    def __init__(
        self, streams: OpenStreams, request_id: str, protocol: StreamProtocol, connection: Connection,
        position: EntryId, skip: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(streams, protocol, Outlet(*connection, protocol, self.on_change))
        self._request_id = request_id
        self._cursor = LogCursor(
            streams.tails, request_id, protocol, self, self.outlet.write_frame, position=position, skip=skip
        )
        self._cursor.direct = self.outlet.direct

    @property
    def waiting_request(self) -> str:
        return self._request_id if self._cursor.is_queued else ""

    @property
    def last_sent_at(self) -> float:
        return max(self.outlet.sent_at, self._cursor.last_frame_at)

    def on_change(self) -> None:
        """See `Outlet`."""
        if self.outlet.is_gone:
            self.stop("left")
        elif self.outlet.blocked_at:
            self._cursor.on_blocked()
        else:
            self._cursor.on_writable()
        self.wake()

    async def follow(self) -> Problem | None:
        cursor = self._cursor
        while not cursor.is_over:
            if not cursor.is_behind:
                await self.wait()
                continue
            try:
                await self.catch_up(cursor)
            except ClientError as error:
                return problem_of(error)
        return problem_of(cursor.error) if cursor.error is not None else None

    def leave(self) -> None:
        self._cursor.leave()


def response_start(headers: Mapping[str, str], status: int = 200) -> dict[str, object]:
    """Return the message of ASGI that begins a response."""
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}

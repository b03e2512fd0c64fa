"""The stream of a chat completion: it begins with a head as late as useful, and ends as OpenAI's clients need it.

Until the first chunk, up to a grace, no head is sent, so that an error of vLLM can be a status. From the first byte on,
a browser does not repeat the request by itself. When the process stops, the stream goes on as long as it may.
"""

import asyncio

from ..contract.ids import BEFORE_ALL
from ..telemetry.stream_events import StreamEnd
from .log_cursor import LogCursor
from .noted_calls import NotedCall
from .open_streams import OpenStreams
from .outlets import RAW_SEND, Receive, Scope, Send, forget_request
from .problems import Problem, problem_of_code
from .protocols.chat_chunks import INTERRUPTED, ChatChunks, error_in
from .protocols.protocol import Frame
from .responses import problem_response
from .stream_response import EVENT_STREAM_HEADERS, LogStream, response_start


class ChunkStream(LogStream):
    """The stream of one chat completion.

    Args:
        is_new: whether the request was added for this stream, so that its log has just begun.
        skip: how many events the client has. If it has some, the head is sent at once.
        grace: seconds for which the head waits for the first event.
    """

    __slots__ = ("_grace", "_has_begun", "_headers", "_is_new", "_noted", "_refusal", "_scope", "_send", "_timer")

    def __init__(
        self, streams: OpenStreams, request_id: str, protocol: ChatChunks, noted: NotedCall,
        connection: tuple[Scope, Receive, Send], *, is_new: bool, skip: int, grace: float,
    ) -> None:  # fmt: skip
        scope, receive, send = connection
        raw_send = scope.get(RAW_SEND, send)
        super().__init__(streams, request_id, protocol, (scope, receive, raw_send), BEFORE_ALL, skip)
        self._headers = {"X-Request-Id": request_id}
        self._is_new = is_new
        self._noted = noted
        self._grace = 0.0 if skip else grace
        self._scope: Scope | None = scope
        self._send: Send | None = send
        self._has_begun = False
        self._refusal: tuple[str, str] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._cursor.write, self._cursor.direct = self._write_first, None

    @property
    def has_begun(self) -> bool:
        """Whether the head was sent."""
        return self._has_begun

    @property
    def waiting_request(self) -> str:
        return super().waiting_request if self._has_begun else ""

    @property
    def last_sent_at(self) -> float:
        return super().last_sent_at if self._has_begun else asyncio.get_running_loop().time()

    async def follow(self) -> Problem | None:
        self._noted.begin()
        self._timer = asyncio.get_running_loop().call_later(self._grace, self._begin)
        self.problem = await super().follow()
        if self.problem is None:
            # Before the follower leaves: identical requests would attach to one that nobody follows.
            await self._noted.end(is_whole=True)
        return self.problem

    async def catch_up(self, cursor: LogCursor, *, is_new: bool = False) -> None:
        is_new, self._is_new = is_new or self._is_new, False
        await super().catch_up(cursor, is_new=is_new)
        if not (cursor.is_over or cursor.is_behind):
            self._noted.on_joined()

    def stop(self, end: StreamEnd) -> None:
        # An answer cannot be continued by a client of OpenAI, so it may go on until `end_now`.
        if end != "shutdown":
            super().stop(end)

    def end_now(self) -> None:
        """End the stream, because the process stops."""
        super().stop("shutdown")

    def leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().leave()

    async def finish(self, last: bytes) -> None:
        refusal = self._refusal or error_in(last)
        if self._scope is None or self._send is None or not (refusal or self.problem):
            self._begin()
            await super().finish(last)
            return
        problem = self.problem or problem_of_end(*(refusal or ("internal", "")), has_key=self._noted.has_key)
        problem.headers.update(self._headers)
        response = problem_response(self._scope, problem)
        await response(self._scope, _receive_nothing, self._send)

    def _write_first(self, frame: Frame) -> bool:
        """Write the first events, and the head before them. An error is kept: its status is the response."""
        self._refusal = self._refusal or error_in(frame.data)
        if self._refusal is not None:
            return True
        self._begin()
        return self.outlet.write_frame(frame)

    def _begin(self) -> None:
        if self._has_begun or self._send is None:
            return
        self._has_begun = True
        self._cursor.write_by(self.outlet.write_frame, self.outlet.direct)
        self.outlet.write_by(self._send, response_start(EVENT_STREAM_HEADERS | self._headers))
        if self._scope is not None:
            forget_request(self._scope)
        self._send = self._scope = None  # they hold the middleware in memory
        self._noted.on_first_byte()


def problem_of_end(code: str, message: str, *, has_key: bool) -> Problem:
    """The problem for an answer that has failed before anything of it was sent.

    With an idempotency key a repetition gets the same failure, so SDKs are told not to repeat the request.
    """
    problem = problem_of_code(code, message)
    if has_key and code != INTERRUPTED:
        problem.headers["X-Should-Retry"] = "false"
    return problem


async def _receive_nothing() -> dict[str, object]:
    return {"type": "http.disconnect"}

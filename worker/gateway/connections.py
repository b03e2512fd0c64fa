"""The bounds on connections: how long and how large a head may be, how many there may be, and what is malformed.

This is uvicorn's protocol for HTTP/1.1 with httptools, which has none of these bounds. It uses private parts of uvicorn
0.54: its attributes, and what its `RequestResponseCycle` does with them.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from .connection_parts import LeanEvent, LeanFlowControl, LeanPipeline
from .envelope import OVERLOADED
from .outlets import ABORT, WIRE, Wire
from .problems import Problem
from .responses import raw_response
from .websocket_connections import WebSocketConnection

_LARGEST_HEAD = 64 * 1024
"""Bytes of a request line and its headers."""

_WRITE_BUFFER = 16 * 1024
"""Bytes in a connection's write buffer above which nothing more is written until the client reads."""

_MOST_PIPELINED = 16
_DISCARDED = 16 * 1024 * 1024
"""Bytes of a refused body that are read and thrown away, so that the client reads the response. Then it is cut off."""

_LINGER = 5.0
"""Seconds for which a refused client may go on to send before its connection is cut."""

_HALF_CLOSED = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods whose client may close its half of the connection before the response."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of a process. Durations are seconds."""

    header_timeout: float = 10.0
    body_timeout: float = 60.0
    max_connections: int = 10_000


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    # Python stores up to 30 attributes of an instance without a dict, and uvicorn's are 28. A dict takes 1 KiB more.
    __slots__ = (
        "_active",
        "_bounds",
        "_close_after_body",
        "_discarded",
        "_head_size",
        "_in_body",
        "_in_head",
        "_is_refused",
        "_timer",
    )

    def __init__(self, config: Config, server_state: ServerState, bounds: Bounds) -> None:
        super().__init__(config, server_state, {})
        self.pipeline = cast("Any", LeanPipeline())
        self._bounds = bounds
        self._active: RequestResponseCycle | None = None
        """The request that is being answered. uvicorn knows only the latest: others may wait behind this one."""
        self._timer: asyncio.TimerHandle | None = None
        """Ends the connection if the head, or then the body, does not arrive in time."""
        self._head_size = 0
        self._fields_size = 0
        self._is_head_large = False
        self._in_head = False
        """Whether a request has begun whose head is not complete."""
        self._in_body = False
        """Whether a head is complete and its body is not."""
        self._discarded = 0
        self._close_after_body = False
        self._is_refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(cast("asyncio.Transport", transport))  # uvloop's derive from another class
        self.flow = cast("Any", LeanFlowControl(self.transport))
        # Of a client that does not read, this much is in memory and one frame more.
        self.transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        most = self._bounds.max_connections
        if len(self.connections) > most + max(64, most // 10):  # too many even to say so to each
            self.transport.abort()
            return
        self._start_timer(self._bounds.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_timer()
        if exc is not None or self._responding is not None:
            cast("LeanFlowControl", self.flow).is_broken = True
        self._leave_active()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._unset_keepalive_if_required()
        if self._is_refused:
            self._discard(data)
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self._upgrade()
                return
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        if self.transport.is_closing():
            return
        if self._in_body or self._responding is not None:
            if len(self.pipeline) > _MOST_PIPELINED:
                message = f"at most {_MOST_PIPELINED} requests may wait on a connection: wait for the responses"
                self._refuse(Problem(400, "too_many_pipelined", message))
            return
        if self._in_head:
            self._head_size += len(data)
            if self._head_size > _LARGEST_HEAD:
                self._refuse_head()
                return
        self._start_timer(self._bounds.header_timeout)

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn closes always
        """See `asyncio.Protocol`. Returns whether the connection stays open for the rest of the response.

        A client that leaves sends the same as one that has said all and waits. So a response that has begun ends here.
        """
        cycle = self._responding
        if self._is_refused or cycle is None or self._has_begun or self._in_body or self._in_head:
            return False
        cycle.keep_alive = False
        if self.scope["method"] in _HALF_CLOSED:
            return True
        self._refuse(
            Problem(400, "connection_closed", "the client closed its half of the connection before the response")
        )
        return False

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text
        """Refuse what is no HTTP, or has two meanings."""
        if self._is_head_large:
            self._refuse_head()
        else:
            self._refuse(Problem(400, "malformed_http", "the request must be valid HTTP"))

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._fields_size = 0
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Fields after the body are ignored: they could pass for headers that a proxy has checked."""
        if self._in_head:
            self._fields_size += len(name) + len(value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See httptools.

        Raises:
            ValueError: when the head has two meanings; httptools raises an `HttpParserError` from it.
        """
        self._check_head()
        if len(self.url) + self._fields_size > _LARGEST_HEAD:  # a head may arrive in one piece
            self._is_head_large = True
            raise ValueError("the head is too large")
        self._in_head, self._in_body, self._head_size, self._discarded = False, True, 0, 0
        self._stop_timer()
        cast("dict[str, object]", self.scope)[ABORT] = self.transport.abort
        cast("dict[str, object]", self.scope)[WIRE] = Wire(self.transport, cast("Any", self.flow))
        if len(self.connections) > self._bounds.max_connections:
            cast("dict[str, object]", self.scope)[OVERLOADED] = True
        super().on_headers_complete()
        if self.parser.should_upgrade():
            if not self._should_upgrade():
                self.cycle.keep_alive = False  # the parser takes what follows for the other protocol
            return
        self.cycle.message_event = cast("Any", LeanEvent())  # nobody waits yet: the cycle's task has not begun
        self._start_timer(self._bounds.body_timeout)
        # A connection that is closed while a refused body arrives is reset, and the client never reads the response.
        self._close_after_body = not self.cycle.keep_alive
        self.cycle.keep_alive = True

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        if self.cycle.response_complete:
            self._discard(body)
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._in_body = False
        self._stop_timer()
        if self._close_after_body:
            self._close_after_body = False
            self.cycle.keep_alive = False
            if self.cycle.response_complete:
                self.transport.close()
                return
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """See uvicorn: the response is written. The rest of a refused body still has its time."""
        super().on_response_complete()
        if self._in_body:
            self._unset_keepalive_if_required()
        elif self._in_head:
            self._start_timer(self._bounds.header_timeout)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401 - uvicorn's
        """See uvicorn: a request begins to be answered."""
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def _leave_active(self) -> None:
        """Let the request that is being answered know that its client gets nothing more."""
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()

    @property
    def _has_begun(self) -> bool:
        """Whether a part of a response was sent."""
        active = self._active
        return active is not None and active.response_started and not active.response_complete

    @property
    def _responding(self) -> RequestResponseCycle | None:
        """The latest request, while its response is not complete."""
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first one
        return None if cycle is None or cycle.response_complete else cycle

    def _check_head(self) -> None:
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise ValueError("a request of HTTP/1.1 has one Host")
        names = {name for name, _ in self.headers}
        if b"transfer-encoding" in names and (b"content-length" in names or self.parser.get_http_version() != "1.1"):
            raise ValueError("the length of the body has two meanings")

    def _upgrade(self) -> None:
        self._stop_timer()
        lengths = {name for name, value in self.headers if value != b"0"} & {b"content-length", b"transfer-encoding"}
        if self.scope["method"] == "GET" and not lengths:
            self.handle_websocket_upgrade()
        else:  # the server of WebSockets would wait in silence for the rest of such a request
            self.send_400_response("")

    def _refuse_head(self) -> None:
        self._refuse(Problem(431, "headers_too_large", f"the headers have more than {_LARGEST_HEAD} bytes"))

    def _refuse(self, problem: Problem) -> None:
        """Write a response and close. Where a response has begun, its connection is cut.

        The connection is reset if it is closed while the client still sends, and the client then never reads the
        response. So only our half is closed, and the client has a moment to close its own.
        """
        self._stop_timer()
        self._is_refused = True
        self.pipeline.clear()
        self._leave_active()
        if self._has_begun:
            self.transport.abort()
            return
        self.flow.resume_reading()  # else the client's close is not noticed
        self.transport.write(raw_response(problem))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._start_timer(_LINGER)
        else:
            self.transport.close()

    def _discard(self, data: bytes) -> None:
        self._discarded += len(data)
        if self._discarded > _DISCARDED:
            self.transport.abort()

    def _start_timer(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self._on_too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_too_slow(self) -> None:
        # Without a response: a browser would send the request again after a 408, and take half a head for an answer.
        self._timer = None
        self.transport.abort()


def protocol_config(app: Any, **options: Any) -> Config:  # noqa: ANN401 - uvicorn's
    """The configuration that uvicorn's protocols read, with everything off that is ours."""
    config = Config(
        app,
        interface="asgi3",
        http=BoundedProtocol,
        ws=WebSocketConnection,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[("Referrer-Policy", "no-referrer"), ("X-Content-Type-Options", "nosniff")],
        **options,
    )
    config.load()
    return config

"""One HTTP/1.1 connection to a server, and its responses, whose pieces are forwarded as they arrive.

Errors are raised as httpx's exceptions.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import httptools
import httpx

from .framing import FramingRepair, is_repairable, parser_for, why_not_http

_Head: TypeAlias = tuple[int, list[tuple[bytes, bytes]]]

HIGH_WATER = 64 * 1024
"""When this many bytes of a body wait for their reader, the connection stops reading from the server."""
_MAX_HEAD = 64 * 1024
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class ResponseBody(httpx.AsyncByteStream):
    """The body of one response."""

    __slots__ = ("_connection", "_error", "_is_over", "_on_data", "_pieces", "_size", "_waiter")

    def __init__(self, connection: "HttpClientConnection") -> None:
        self._connection = connection
        self._pieces: list[bytes] = []  # mostly empty: an empty deque takes 760 bytes
        self._size = 0
        self._is_over = False
        self._error: Exception | None = None
        self._on_data: Callable[[bytes], bool] | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read_into(self, on_data: Callable[[bytes], bool]) -> bool:
        """Pass each piece to `on_data`, in the step of the event loop in which it arrives, until it returns true.

        Returns false at the end of the body. An exception of `on_data` is raised here.

        Raises:
            httpx.TransportError: when the connection breaks before the end.
        """
        while self._pieces:
            piece = self._pieces.pop(0)
            self._size -= len(piece)
            if on_data(piece):
                return True
        if not self._is_over:
            self._connection.resume_reading()
            self._on_data, self._waiter = on_data, asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._on_data = self._waiter = None
            return True
        if self._error is not None:
            raise self._error
        return False

    def feed(self, piece: bytes) -> None:
        """Accept the next piece from the connection."""
        on_data = self._on_data
        if on_data is None:
            self._pieces.append(piece)
            self._size += len(piece)
            if self._size >= HIGH_WATER:
                self._connection.pause_reading()
            return
        try:
            if on_data(piece):
                self._wake()
        except Exception as error:  # noqa: BLE001 - raised in `read_into`
            self._wake(error)

    def end(self, error: Exception | None = None) -> None:
        """Mark the end of the body; with an error, the body is incomplete."""
        if not self._is_over:
            self._is_over, self._error = True, error
            self._wake()

    def _wake(self, error: Exception | None = None) -> None:
        self._on_data = None
        if self._waiter is not None and not self._waiter.done():
            if error is None:
                self._waiter.set_result(None)
            else:
                self._waiter.set_exception(error)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces: list[bytes] = []

        def on_data(piece: bytes) -> bool:
            pieces.append(piece)
            return True

        while await self.read_into(on_data):
            while pieces:
                yield pieces.pop(0)

    async def aclose(self) -> None:
        """Stop reading. If the server is still sending, the connection is closed."""
        if not self._is_over:
            self._connection.abort()


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """The head of a response, and its body, which is read later."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: ResponseBody

    def header(self, name: bytes) -> str:
        """The value of a header, by its name in lower case; empty if there is none."""
        return b", ".join([value for one, value in self.headers if one.lower() == name]).decode("latin-1")


class HttpClientConnection(asyncio.Protocol):
    """One connection, which sends requests one after the other.

    Args:
        on_idle: called when a response has ended and the next request may follow.
        on_lost: called when the connection is lost.
    """

    __slots__ = (
        "_body", "_head", "_head_room", "_headers", "_is_ambiguous", "_is_paused", "_is_until_close", "_on_idle",
        "_on_lost", "_parser", "_pieces", "_repair", "_start", "_transport", "has_answered", "idle_since", "on_body",
    )  # fmt: skip

    def __init__(
        self, on_idle: Callable[["HttpClientConnection"], None], on_lost: Callable[["HttpClientConnection"], None]
    ) -> None:
        self.idle_since = 0.0
        self.has_answered = False
        """Whether a byte of the response to the last request has arrived."""
        self._on_idle = on_idle
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._head: asyncio.Future[_Head] | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_room = _MAX_HEAD
        self._body: ResponseBody | None = None
        self._pieces: list[bytes] = []
        self._start: bytes | None = None
        """The response so far, until a piece of its body has been forwarded."""
        self._repair: FramingRepair | None = None
        self._is_until_close = False
        """Whether the end of the connection is the end of the body."""
        self._is_ambiguous = False
        """Whether the response has both Content-Length and Transfer-Encoding."""
        self._is_paused = False

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent. The server may have closed the connection unnoticed."""
        return self._transport is not None and not self._transport.is_closing()

    async def request(self, packed: bytes) -> HttpResponse:
        """Send a request; returns the response once its head has arrived.

        Raises:
            httpx.TransportError: when no response comes.
        """
        self._headers, self._head_room, self._pieces, self._is_until_close = [], _MAX_HEAD, [], False
        self._start, self._repair = b"", None
        self.has_answered = False
        self.on_body = self._pieces.append
        self._parser = parser_for(self)
        self._body = body = ResponseBody(self)
        self._head = head = asyncio.get_running_loop().create_future()
        try:
            self.write(packed)
            status, headers = await head  # the next request may be sent during this wait
        except BaseException:
            head.cancel()  # asyncio logs a future whose exception nobody retrieves
            self.abort()
            raise
        return HttpResponse(status, headers, body)

    def resume_reading(self) -> None:
        """Read from the server again."""
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def pause_reading(self) -> None:
        """Stop reading from the server until `resume_reading`."""
        if not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def write(self, packed: bytes) -> None:
        """Send bytes.

        Raises:
            httpx.WriteError: when the connection is lost.
        """
        try:
            if self._transport is None or self._transport.is_closing():
                raise httpx.WriteError("the connection was lost")
            self._transport.write(packed)
        except RuntimeError as error:  # uvloop 0.22, when the connection is lost during the write
            raise httpx.WriteError("the connection was lost") from error

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._body is None:  # there is no request
            self.abort()
            return
        if self._start is not None:
            self._start += data
        if self._repair is not None:
            data = self._repair.feed(data)
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError as error:
                if self._start is None or self._repair is not None or not is_repairable(error, self._start):
                    raise
                self._read_repaired(self._start)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(httpx.RemoteProtocolError(why_not_http(error, data)))
            self.abort()
            return
        if self._pieces:
            self._pass_on()

    def _read_repaired(self, start: bytes) -> None:
        """Parse the response again from its start, with its framing repaired."""
        self._repair = FramingRepair()
        self._parser = parser_for(self)
        self._headers, self._head_room = [], _MAX_HEAD
        self._pieces.clear()
        self._parser.feed_data(self._repair.feed(start))

    def _pass_on(self) -> None:
        self._start = None
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._body is None:  # a second response to one request
            self.abort()
        else:
            self._body.feed(piece)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_until_close and exc is None and self._body is not None:
            self._body.end()
        self._fail(httpx.ReadError(str(exc)) if exc else httpx.RemoteProtocolError("the server closed the connection"))
        self._on_lost(self)

    def _fail(self, error: Exception) -> None:
        if self._head is not None and not self._head.done():
            self._head.set_exception(error)
        elif self._body is not None:
            self._body.end(error)
        self._body = None

    # Callbacks of httptools

    def on_message_begin(self) -> None:
        self.has_answered = True
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_room -= len(name) + len(value)
        if self._head_room < 0:
            raise ValueError(f"the head of the response is larger than {_MAX_HEAD} bytes")
        if self._head is not None and not self._head.done():
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or self._head is None or self._head.done():
            return
        names = {name.lower() for name, _ in self._headers}
        self._is_until_close = not names & _FRAMING
        self._is_ambiguous = names >= _FRAMING
        self._head.set_result((status, self._headers))
        self._head, self._headers = None, []  # the response may last for hours

    def on_message_complete(self) -> None:
        if self._body is None or self._parser.get_status_code() < 200:
            return
        if self._pieces:
            self._pass_on()
        body, self._body = self._body, None
        body.end()
        is_clear = self._repair is None and not self._is_ambiguous
        if self._parser.should_keep_alive() and self.is_open and is_clear:
            self.resume_reading()  # a paused connection would not notice that the server closes it
            self._on_idle(self)
        else:
            self.abort()

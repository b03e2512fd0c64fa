"""HTTP/1.1 for httpx, read by httptools: a piece of an answer is handed on in the same step in which it arrives.

httpx's own transport (0.28) takes 60 us for each token of a stream, with several awaits, and looks through all of its
connections for each request: among 3,000 open streams a request costs 7 to 20 ms. What goes wrong is told in httpx's
exceptions.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import httptools
import httpx

from .framing import Mended, may_be_mended, parser_for, why_no_http
from .target import Origin, Target, head_of, origin_of

_Head: TypeAlias = tuple[int, list[tuple[bytes, bytes]]]

_IDLE = 4.0
"""Seconds that a connection is kept for the next request; uvicorn, and so vLLM, closes it after 5."""
_HIGH_WATER = 64 * 1024
"""Bytes of an answer that wait for their reader until no more is read from the server."""
_MAX_HEAD = 64 * 1024
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class Body(httpx.AsyncByteStream):
    """What comes in answer to one request."""

    __slots__ = ("_connection", "_error", "_into", "_over", "_pieces", "_size", "_waiter")

    def __init__(self, connection: "_Connection") -> None:
        self._connection = connection
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._over = False
        self._error: Exception | None = None
        self._into: Callable[[bytes], bool] | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read_into(self, into: Callable[[bytes], bool]) -> bool:
        """Hand over each piece as it arrives, until told that this is enough for now; false at the end of the body.

        What `into` raises comes out here.

        Raises:
            httpx.TransportError: when the connection breaks first.
        """
        while self._pieces:
            piece = self._pieces.popleft()
            self._size -= len(piece)
            if into(piece):
                return True
        if not self._over:
            self._connection.read_on()
            self._into, self._waiter = into, asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._into = self._waiter = None
            return True
        if self._error is not None:
            raise self._error
        return False

    def arrived(self, piece: bytes) -> None:
        """More of it."""
        into = self._into
        if into is None:
            self._pieces.append(piece)
            self._size += len(piece)
            if self._size >= _HIGH_WATER:
                self._connection.pause()
            return
        try:
            if into(piece):
                self._wake()
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            self._wake(error)

    def end(self, error: Exception | None = None) -> None:
        """That was all, or all that comes."""
        if not self._over:
            self._over, self._error = True, error
            self._wake()

    def _wake(self, error: Exception | None = None) -> None:
        self._into = None
        if self._waiter is not None and not self._waiter.done():
            if error is None:
                self._waiter.set_result(None)
            else:
                self._waiter.set_exception(error)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces: list[bytes] = []

        def take(piece: bytes) -> bool:
            pieces.append(piece)
            return True

        while await self.read_into(take):
            while pieces:
                yield pieces.pop(0)

    async def aclose(self) -> None:
        """Whoever reads it wants no more: a server that is not done with it sees the connection close."""
        if not self._over:
            self._connection.abort()


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """What a server answers: its body comes as it is read."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: Body

    def header(self, name: bytes) -> str:
        """A header by its name in small letters; empty where there is none."""
        return b", ".join([value for one, value in self.headers if one.lower() == name]).decode("latin-1")


class _Connection(asyncio.Protocol):
    """One connection; requests go over it one after the other."""

    __slots__ = (
        "_body", "_done", "_head", "_headers", "_is_ambiguous", "_lost", "_mended", "_parser", "_paused", "_pieces",
        "_room", "_start", "_transport", "_until_close", "has_answered", "idle_since", "on_body",
    )  # fmt: skip

    def __init__(self, done: Callable[["_Connection"], None], lost: Callable[["_Connection"], None]) -> None:
        self.idle_since = 0.0
        self._done = done
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._head: asyncio.Future[_Head] | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._room = _MAX_HEAD
        self._body: Body | None = None
        self._pieces: list[bytes] = []
        self._start: bytes | None = None
        """The answer so far, until something of its body was handed on."""
        self._mended: Mended | None = None
        self._until_close = False
        self._is_ambiguous = False
        self._paused = False
        self.has_answered = False
        """Whether something came in answer to the last request."""

    @property
    def is_open(self) -> bool:
        """Whether it can be asked, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, packed: bytes) -> HttpResponse:
        """Send a request, and give the answer once its head is there.

        Raises:
            httpx.TransportError: when there is none.
        """
        self._headers, self._room, self._pieces, self._until_close = [], _MAX_HEAD, [], False
        self._start, self._mended = b"", None
        self.has_answered = False
        self.on_body = self._pieces.append
        self._parser = parser_for(self)
        self._body = body = Body(self)
        self._head = asyncio.get_running_loop().create_future()
        try:
            self._write(packed)
            status, headers = await self._head  # by now the next request may be on its way
        except BaseException:
            self._head.cancel()  # nobody waits for it, and that it does not come would be logged
            self.abort()
            raise
        return HttpResponse(status, headers, body)

    def read_on(self) -> None:
        """Take more from the server."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def pause(self) -> None:
        """Take no more from the server for now."""
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _write(self, packed: bytes) -> None:
        try:
            if self._transport is None or self._transport.is_closing():
                raise httpx.WriteError("the connection was lost")
            self._transport.write(packed)
        except RuntimeError as error:  # of uvloop 0.22, for a connection that goes while it is written to
            raise httpx.WriteError("the connection was lost") from error

    # What asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._body is None:  # nothing was asked
            self.abort()
            return
        if self._start is not None:
            self._start += data
        if self._mended is not None:
            data = self._mended.feed(data)
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError as error:
                if self._start is None or self._mended is not None or not may_be_mended(error, self._start):
                    raise
                self._read_mended(self._start)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(httpx.RemoteProtocolError(why_no_http(error, data)))
            self.abort()
            return
        if self._pieces:
            self._hand_on()

    def _read_mended(self, start: bytes) -> None:
        """Read the answer once more from its start, with its framing mended."""
        self._mended = Mended()
        self._parser = parser_for(self)
        self._headers, self._room = [], _MAX_HEAD
        self._pieces.clear()
        self._parser.feed_data(self._mended.feed(start))

    def _hand_on(self) -> None:
        self._start = None
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._body is None:  # more than was asked for
            self.abort()
        else:
            self._body.arrived(piece)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._until_close and exc is None and self._body is not None:
            self._body.end()
        self._fail(httpx.ReadError(str(exc)) if exc else httpx.RemoteProtocolError("the server closed the connection"))
        self._lost(self)

    def _fail(self, error: Exception) -> None:
        if self._head is not None and not self._head.done():
            self._head.set_exception(error)
        elif self._body is not None:
            self._body.end(error)
        self._body = None

    # What httptools finds

    def on_message_begin(self) -> None:
        self.has_answered = True
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._room -= len(name) + len(value)
        if self._room < 0:
            raise ValueError(f"the head of the answer is larger than {_MAX_HEAD} bytes")
        if self._head is not None and not self._head.done():
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or self._head is None or self._head.done():
            return
        names = {name.lower() for name, _ in self._headers}
        self._until_close = not names & _FRAMING
        self._is_ambiguous = names >= _FRAMING
        self._head.set_result((status, self._headers))

    def on_message_complete(self) -> None:
        if self._body is None or self._parser.get_status_code() < 200:
            return
        if self._pieces:
            self._hand_on()
        body, self._body = self._body, None
        body.end()
        is_clear = self._mended is None and not self._is_ambiguous
        if self._parser.should_keep_alive() and self.is_open and is_clear:
            self.read_on()  # or nobody would see the server close it
            self._done(self)
        else:
            self.abort()


class Transport(httpx.AsyncBaseTransport):
    """Connections to any number of servers, as many as are needed.

    HTTP_PROXY of the environment is not heeded, for vLLM is a server inside; SSL_CERT_FILE is.
    """

    def __init__(self) -> None:
        self._idle: dict[Origin, dict[_Connection, None]] = {}
        self._open: set[_Connection] = set()
        self._ssl: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx. Of its timeouts only `connect` is known here."""
        packed = b"%b\r\n%b" % (head_of(request), await request.aread())
        answer = await self._ask(origin_of(request.url), packed, request.extensions["timeout"]["connect"])
        return httpx.Response(answer.status, headers=answer.headers, stream=answer.body)

    async def post(self, target: Target, content: bytes, within: float) -> HttpResponse:
        """Post JSON, and give the answer once its head is there; `within` so many seconds there is a connection.

        Raises:
            httpx.TransportError: when there is no answer.
        """
        packed = b"%bcontent-length: %d\r\n\r\n%b" % (target.head, len(content), content)
        return await self._ask(target.origin, packed, within)

    async def _ask(self, origin: Origin, packed: bytes, within: float | None) -> HttpResponse:
        if (reused := self._take_idle(origin)) is None:
            return await (await self._connect(origin, within)).ask(packed)
        stale: HttpResponse | httpx.TransportError
        try:
            stale = await reused.ask(packed)
            if stale.status != httpx.codes.REQUEST_TIMEOUT:
                return stale
        except httpx.TransportError as error:
            if reused.has_answered:
                raise
            stale = error
        # The server had closed it while it was idle, which shows only now (RFC 9112, 9.3.1), perhaps with a word
        # before (408: RFC 9110, 15.5.9): that is no try.
        try:
            connection = await self._connect(origin, within)
        except httpx.TransportError:
            if isinstance(stale, HttpResponse):
                return stale
            raise stale from None  # it may have died of this request, which would never be given up as not received
        reused.abort()
        return await connection.ask(packed)

    async def aclose(self) -> None:
        """Close every connection."""
        for connection in list(self._open):
            connection.abort()

    def _take_idle(self, origin: Origin) -> _Connection | None:
        idle = self._idle.get(origin, {})
        oldest = asyncio.get_running_loop().time() - _IDLE
        while idle:
            connection, _ = idle.popitem()  # the last to be used is the last that the server closes
            if connection.is_open and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self, origin: Origin, within: float | None) -> _Connection:
        scheme, host, port = origin
        loop = asyncio.get_running_loop()
        idle = self._idle.setdefault(origin, {})

        def done(connection: _Connection) -> None:
            connection.idle_since = loop.time()
            idle[connection] = None

        def lost(connection: _Connection) -> None:
            self._open.discard(connection)
            idle.pop(connection, None)

        try:
            async with asyncio.timeout(within):
                _, connection = await loop.create_connection(
                    lambda: _Connection(done, lost), host, port, ssl=self._secure(scheme)
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {within:g} s") from error
        except (OSError, RuntimeError) as error:  # the latter of uvloop 0.22, for a server that goes meanwhile
            raise httpx.ConnectError(str(error) or "the server closed the connection in the TLS handshake") from error
        self._open.add(connection)
        return connection

    def _secure(self, scheme: str) -> ssl.SSLContext | None:
        if scheme == "https" and self._ssl is None:
            try:
                self._ssl = httpx.create_ssl_context()
            except OSError as error:
                raise httpx.ConnectError(f"the certificates of SSL_CERT_FILE cannot be read: {error}") from error
        return self._ssl if scheme == "https" else None

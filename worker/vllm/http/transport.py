"""Connections to vLLM servers: an httpx transport with a faster way to post the request of a stream.

httpx's own transport (0.28) takes 60 us for each token of a stream, with several awaits. It also searches all of its
connections for each request: with 3,000 open streams, a request costs 7 to 20 ms.
"""

import asyncio
import ssl
from functools import partial

import httpx

from .connection import HttpClientConnection, HttpResponse
from .target import Origin, Target, head_of, origin_of

_IDLE_LIMIT = 4.0
"""Seconds for which an idle connection is kept. vLLM's server, uvicorn, closes idle connections after 5 seconds."""


class Transport(httpx.AsyncBaseTransport):
    """Connections to any number of servers, as many as are needed.

    HTTP_PROXY in the environment is ignored, since vLLM is an internal server. SSL_CERT_FILE is used.
    """

    def __init__(self) -> None:
        self._idle: dict[Origin, _IdleConnections] = {}
        self._open: set[HttpClientConnection] = set()
        self._ssl: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx. Of its timeouts, only `connect` applies here."""
        packed = b"%b\r\n%b" % (head_of(request), await request.aread())
        response = await self._send(origin_of(request.url), packed, request.extensions["timeout"]["connect"])
        return httpx.Response(response.status, headers=response.headers, stream=response.body)

    async def post(self, target: Target, content: bytes, connect_limit: float) -> HttpResponse:
        """Post JSON; returns the response once its head has arrived. `connect_limit` is in seconds.

        Raises:
            httpx.TransportError: when no response comes.
        """
        packed = b"%bcontent-length: %d\r\n\r\n%b" % (target.head, len(content), content)
        return await self._send(target.origin, packed, connect_limit)

    async def _send(self, origin: Origin, packed: bytes, connect_limit: float | None) -> HttpResponse:
        idle = self._idle.get(origin)
        if idle is None:
            idle = self._idle[origin] = _IdleConnections(self._open)
        if (reused := idle.pop()) is None:
            return await (await self._connect(origin, idle, connect_limit)).request(packed)
        stale: HttpResponse | httpx.TransportError
        try:
            stale = await reused.request(packed)
            if stale.status != httpx.codes.REQUEST_TIMEOUT:
                return stale
        except httpx.TransportError as error:
            if reused.has_answered:
                raise
            stale = error
        # The server closed the idle connection, which is only noticed now (RFC 9112, 9.3.1). It may have sent a 408
        # before (RFC 9110, 15.5.9). The request is sent again over a new connection.
        try:
            connection = await self._connect(origin, idle, connect_limit)
        except httpx.TransportError:
            if isinstance(stale, HttpResponse):
                return stale
            # The request may have killed the server. Reported as a failure to connect, it would be sent again forever.
            raise stale from None
        reused.abort()
        return await connection.request(packed)

    async def aclose(self) -> None:
        """Close every connection."""
        for connection in list(self._open):
            connection.abort()

    async def _connect(self, origin: Origin, idle: "_IdleConnections", limit: float | None) -> HttpClientConnection:
        scheme, host, port = origin
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit):
                _, connection = await loop.create_connection(
                    partial(HttpClientConnection, idle.on_idle, idle.on_lost),
                    host,
                    port,
                    ssl=self._ssl_context(scheme),
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {limit:g} s") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: uvloop 0.22, when the server stops meanwhile
            raise httpx.ConnectError(str(error) or "the server closed the connection in the TLS handshake") from error
        self._open.add(connection)
        return connection

    def _ssl_context(self, scheme: str) -> ssl.SSLContext | None:
        if scheme == "https" and self._ssl is None:
            try:
                self._ssl = httpx.create_ssl_context()
            except OSError as error:
                raise httpx.ConnectError(f"the certificates of SSL_CERT_FILE cannot be read: {error}") from error
        return self._ssl if scheme == "https" else None


class _IdleConnections:
    """The idle connections to one server. `opened` has the open connections to all servers."""

    def __init__(self, opened: set[HttpClientConnection]) -> None:
        self._open = opened
        self._idle: dict[HttpClientConnection, None] = {}

    def pop(self) -> HttpClientConnection | None:
        """The connection that was used last and is still open, or None."""
        oldest = asyncio.get_running_loop().time() - _IDLE_LIMIT
        while self._idle:
            connection, _ = self._idle.popitem()  # the server closes the connection used last after all others
            if connection.is_open and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    def on_idle(self, connection: HttpClientConnection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle[connection] = None

    def on_lost(self, connection: HttpClientConnection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

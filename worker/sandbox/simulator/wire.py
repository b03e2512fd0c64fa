"""One HTTP/1.1 connection of the simulated vLLM: it uses h11 between an asyncio transport and a request handler."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import NamedTuple, cast

import h11

__all__ = ["HttpConnection", "HttpRequest"]


class HttpRequest(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    """Values by name in lower case."""
    body: bytes


class HttpConnection(asyncio.Protocol):
    """Passes its requests in turn to `handle(request, connection)`, which is cancelled if the client closes.

    The transport sends each write at once: TCP_NODELAY is the default of asyncio and of uvloop.
    """

    def __init__(self, handle: Callable[[HttpRequest, "HttpConnection"], Awaitable[None]]) -> None:
        self._handle = handle
        self._http = h11.Connection(h11.SERVER)
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._retired = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._retired:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._http.receive_data(data)
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _advance(self) -> None:
        try:
            while isinstance(event := self._http.next_event(), h11.Request | h11.Data | h11.EndOfMessage):
                self._on_event(event)
        except h11.RemoteProtocolError:
            self._transport.close()

    def _on_event(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        if isinstance(event, h11.Request):
            self._head = event
            self._body.clear()
        elif isinstance(event, h11.Data):
            self._body += event.data
        elif self._head is not None:
            headers = {name.decode(): value.decode("latin-1") for name, value in self._head.headers}
            path = self._head.target.decode().partition("?")[0]
            request = HttpRequest(self._head.method.decode(), path, headers, bytes(self._body))
            self._task = asyncio.get_running_loop().create_task(self._run(request))

    async def _run(self, request: HttpRequest) -> None:
        try:
            await self._handle(request, self)
        finally:
            self._task = None
            if self._retired or self._http.our_state is not h11.DONE:
                self._transport.close()
        if not self._transport.is_closing():
            self._http.start_next_cycle()
            self._advance()

    async def respond(self, status: int, content_type: str, body: bytes, **headers: str) -> None:
        """Send a complete response. Underscores in the names of headers become hyphens."""
        fields = [("content-type", content_type), ("content-length", str(len(body)))]
        fields += [(name.replace("_", "-"), value) for name, value in headers.items()]
        self._start(status, fields)
        await self.send(body)
        self.finish()

    def begin(self, content_type: str) -> None:
        """Send the head of a chunked response with status 200."""
        self._start(200, [("content-type", content_type), ("transfer-encoding", "chunked")])

    def _start(self, status: int, fields: list[tuple[str, str]]) -> None:
        headers = [("server", "uvicorn"), *fields]
        self._send(h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase))

    async def send(self, data: bytes) -> None:
        """Send one HTTP chunk, and wait while the client is slow to read."""
        self._send(h11.Data(data=data))
        await self._writable.wait()

    def finish(self) -> None:
        """End the response normally."""
        self._send(h11.EndOfMessage())

    def _send(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> None:
        self._transport.write(self._http.send(event) or b"")

    def reset(self) -> None:
        """Close with a TCP RST, and drop the bytes that were not sent yet."""
        connection = cast("socket.socket", self._transport.get_extra_info("socket"))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def retire(self) -> None:
        """Close after the requests that were received are answered."""
        self._retired = True
        transport: asyncio.Transport | None = getattr(self, "_transport", None)
        if transport is not None and self._task is None:
            transport.close()

    def drop(self) -> asyncio.Task[None] | None:
        """Close at once. Returns the task to wait for, if one is running."""
        task = self._task
        transport: asyncio.Transport | None = getattr(self, "_transport", None)
        if transport is not None:  # asyncio may not have called connection_made yet
            transport.abort()
        if task is not None:
            task.cancel()
        return task

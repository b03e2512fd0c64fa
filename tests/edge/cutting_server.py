"""The server of a page that calls a gateway: it has the page's files, passes all else on, and cuts connections."""

import asyncio
import mimetypes
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

Cut = Literal["before the head", "after the head", "after a chunk"]
LONG = 3000
"""Tokens of an answer of which the gateway's kernel keeps a part until the connection is cut after its head."""

_HEAD_END = b"\r\n\r\n"
_FEW = 2048
"""Bytes: at most some times as many arrive of a response that is cut after its head."""


@dataclass(slots=True)
class SeenPost:
    """A POST as it arrived. `is_reused` is whether its connection had served another request."""

    is_reused: bool
    retry: int
    is_cut: bool = False


class CuttingServer:
    """Serves on 127.0.0.1 while it is entered.

    Args:
        gateway: the port of the gateway.
        folder: the files of the page.
        is_asked: awaited before a connection is cut before the head.
        keeps: whether a connection serves more than one file. If not, every POST has a connection of its own.
    """

    def __init__(self, gateway: int, folder: Path, is_asked: Callable[[], Awaitable[object]], *, keeps: bool) -> None:
        self.posts: list[SeenPost] = []
        self.cuts = 0
        """How many connections are cut by now."""
        self.url = ""
        self._gateway = gateway
        self._folder = folder
        self._keeps = keeps
        self._cut: Cut = "before the head"
        self._left = 0
        self._is_asked = is_asked
        self._tasks = set[asyncio.Task[None]]()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_next(self, cut: Cut, times: int) -> None:
        """Cut the connections of the next POSTs."""
        self.posts.clear()
        self.cuts = 0
        self._cut, self._left = cut, times

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        served = 0
        try:
            with suppress(asyncio.IncompleteReadError, OSError):
                while await self._respond(reader, writer, is_reused=served > 0):
                    served += 1
        except asyncio.CancelledError:
            pass  # the test ends: asyncio's streams would log a handler that ends with this error
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _respond(self, reader: StreamReader, writer: StreamWriter, *, is_reused: bool) -> bool:
        """Respond to one request. Returns whether the connection stays open."""
        head = await reader.readuntil(_HEAD_END)
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
        if method == "GET":
            writer.write(self._file(self._folder / path.lstrip("/")))
            await writer.drain()
            return self._keeps
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        post = SeenPost(is_reused, int(fields.get("x-stainless-retry-count", "0")))
        post.is_cut, self._left = self._left > 0, max(0, self._left - 1)
        self.posts.append(post)
        if not post.is_cut:
            # The gateway then closes its connection at the end of the response, which needs not be found in its bytes.
            head = head.replace(b"keep-alive", b"close")
        request = head + body
        passing = asyncio.create_task(self._pass_on(request, writer, is_cut=post.is_cut))
        leaving = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait([passing, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (passing, leaving):
                task.cancel()
            await asyncio.gather(passing, leaving, return_exceptions=True)
            self.cuts += post.is_cut
        return False

    def _file(self, file: Path) -> bytes:
        """Return the response with a file."""
        is_there = file.is_file()
        content = file.read_bytes() if is_there else b""
        kind = "text/javascript" if file.suffix == ".mjs" else mimetypes.guess_type(file)[0]
        lines = [
            f"HTTP/1.1 {'200 OK' if is_there else '404 Not Found'}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(content)}",
            f"Connection: {'keep-alive' if self._keeps else 'close'}",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + content

    async def _pass_on(self, request: bytes, client: StreamWriter, *, is_cut: bool) -> None:
        """Send a request to the gateway, and the response to the client up to its end or its cut."""
        if is_cut and self._cut == "after the head":
            reader, writer = await _open_narrow(self._gateway)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._gateway)
        try:
            writer.write(request)
            if is_cut and self._cut == "before the head":
                await self._is_asked()
                return
            client.write(await reader.readuntil(_HEAD_END))
            if is_cut and self._cut == "after a chunk":
                client.write(await reader.readuntil(b"data: ") + await reader.readuntil(b"\n\n"))
            if is_cut:
                await client.drain()
                reset_at_close(writer)
                return
            while piece := await reader.read(65536):
                client.write(piece)
                await client.drain()
        finally:
            writer.transport.abort()


async def _open_narrow(port: int) -> tuple[StreamReader, StreamWriter]:
    """Connect so that little of a response arrives while nobody reads, however late the connection is cut."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _FEW)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=sock, limit=_FEW)


def reset_at_close(writer: StreamWriter) -> None:
    """Let the other end see a cut: a connection whose bytes nobody may read any more is reset."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

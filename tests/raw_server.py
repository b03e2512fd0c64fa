"""A server that answers with given bytes."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


@asynccontextmanager
async def sending(
    *pieces: bytes, then_close: bool = True, again: bytes = b"", secure: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server that answers each request with these bytes and then, if given, with `again` for ever."""
    over = asyncio.Event()
    tasks = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await write(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def write(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if found := re.search(rb"content-length: (\d+)", head):  # unread bytes would turn the close into a reset
            await reader.readexactly(int(found[1]))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        while again and not over.is_set() and not writer.is_closing():
            writer.write(again)
            await asyncio.sleep(0.005)
        if not then_close:
            await over.wait()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=secure)
    try:
        yield f"{'https' if secure else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        over.set()
        server.close()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)

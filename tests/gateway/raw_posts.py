"""POSTs over sockets that a test cuts where it wants."""

import asyncio
import json
import socket
import struct
from contextlib import suppress
from typing import Any


class RawPost:
    """A POST, of a chat completion by default, over a connection of its own or one that has served another request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.head = ""

    @classmethod
    async def send(  # JSON and headers of any type
        cls,
        port: int,
        body: Any,  # noqa: ANN401
        *,
        reuse: bool = False,
        path: str = "/v1/chat/completions",
        **headers: Any,  # noqa: ANN401
    ) -> "RawPost":
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if reuse:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await reader.readuntil(b"ok\n")
        content = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(content)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        return cls(reader, writer)

    async def read_head(self) -> int:
        """Read the head; returns the status."""
        self.head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        return int(self.head.split()[1])

    @property
    def request_id(self) -> str:
        lines = self.head.lower().split("\r\n")
        return next(line.partition(": ")[2] for line in lines if line.startswith("x-request-id"))

    async def read_event(self) -> str:
        """Read up to the end of the next event with data; returns its data."""
        while True:
            line = (await self._reader.readuntil(b"\n")).decode()
            if line.startswith("data: "):
                await self._reader.readuntil(b"\n")
                return line.removeprefix("data: ").rstrip("\n")

    async def read_events(self) -> list[str]:
        """Read the data of all events up to [DONE]."""
        events = [await self.read_event()]
        while events[-1] != "[DONE]":
            events.append(await self.read_event())
        return events

    async def has_answer(self) -> bool:
        """Whether a byte arrives at once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                return bool(await self._reader.read(1))
        return False

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()

    def reset(self) -> None:
        """Break the connection with a RST."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

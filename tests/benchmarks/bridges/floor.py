"""The floor if there is no C compiler: the same as floor.c, in as little Python as possible.

floor.py <port of vLLM> <port of Redis>
"""

import asyncio
import sys
from typing import cast

import uvloop

_TEXT, _IDS = b'"content":"', b'"token_ids":['
_XADD = (
    b"*9\r\n$4\r\nXADD\r\n%b$%d\r\n1-%d\r\n$4\r\ntype\r\n$5\r\ndelta\r\n"
    b"$7\r\ncontent\r\n$%d\r\n%b\r\n$9\r\ntoken_ids\r\n$%d\r\n%b\r\n"
)


class Writer(asyncio.Protocol):
    """The connection to Redis: the commands of one round of the loop are one write."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._commands: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        sys.exit(f"Redis is gone: {exc}")

    def put(self, command: bytes) -> None:
        """Write a command with the others of this round."""
        if not self._commands:
            self._loop.call_soon(self._flush)
        self._commands.append(command)

    def _flush(self) -> None:
        self._transport.write(b"".join(self._commands))
        self._commands.clear()


class Reader(asyncio.Protocol):
    """One stream."""

    def __init__(self, writer: Writer, number: int) -> None:
        self._put = writer.put
        self._number = number
        key = f"chat:tokens:{{r{number}}}"
        self._key = f"${len(key)}\r\n{key}\r\n".encode()
        self._next = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = f'{{"messages":[{{"role":"user","content":"stream {self._number}"}}],"return_token_ids":true}}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
        cast("asyncio.Transport", transport).write((head + body).encode())

    def data_received(self, data: bytes) -> None:
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                self._add(line)

    def _add(self, line: bytes) -> None:
        start = line.find(_TEXT) + len(_TEXT)
        end = line.find(b'"', start)
        ids = line.find(_IDS, end) + len(_IDS) - 1
        if start < len(_TEXT) or end == start or ids < end:
            return
        self._next = number = self._next + 1
        text, ids_text = line[start:end], line[ids : line.index(b"]", ids) + 1]
        size = 2 + len(str(number))
        self._put(_XADD % (self._key, size, number, len(text), text, len(ids_text), ids_text))


async def serve(vllm_port: int, redis_port: int) -> None:
    """Open the streams that standard input names, until it ends."""
    loop = asyncio.get_running_loop()
    _, writer = await loop.create_connection(Writer, "127.0.0.1", redis_port)
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        first, count = map(int, line.split())
        for number in range(first, first + count):
            await loop.create_connection(lambda number=number: Reader(writer, number), "127.0.0.1", vllm_port)  # type: ignore[misc]


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))

"""Records which user of a Redis sends which commands, those of its scripts included.

Each user connects through a relay, which connects to Redis from an address of this machine that stands for the user.
MONITOR shows that address with each command.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from redis.asyncio import Redis

Command = tuple[bytes, ...]

_LINE = re.compile(rb'\+\S+ \[\d+ ([\w.]+)[^\]]*\] "(.*)"\r\n', re.DOTALL)
_BETWEEN_WORDS = b'" "'
"""Valkey 8.1.1 escapes no quotes within a word. Where they are escaped, no word contains this."""
_LONGEST_LINE = 1 << 24
_END = b"end of the recording"


class RedisUsage:
    """Records from the start of `relays` to the end of `finish`.

    `ports` are those of the users' relays. `sent` is what each user has sent, with the escapes of MONITOR.
    """

    def __init__(self, users: Iterable[str]) -> None:
        self._users = {f"127.0.0.{number}": user for number, user in enumerate(users, 2)}
        self.ports: dict[str, int] = {}
        self.sent: dict[str, set[Command]] = {user: set() for user in self._users.values()}

    @asynccontextmanager
    async def relays(self, port: int) -> AsyncIterator[None]:
        """Start a relay for each user, before the Redis at a port of this machine."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LONGEST_LINE)
        writer.write(b"MONITOR\r\n")
        assert await reader.readline() == b"+OK\r\n"
        self._reading = asyncio.create_task(self._read(reader))
        try:
            async with AsyncExitStack() as stack:
                for address, user in self._users.items():
                    self.ports[user] = await stack.enter_async_context(_relay(port, address))
                yield
        finally:
            self._reading.cancel()
            writer.close()

    async def finish(self, redis: Redis) -> None:
        """Wait until everything is recorded that Redis has executed so far. `redis` is a connection without a relay."""
        await redis.echo(_END.decode())
        await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        user: str | None = None
        while True:
            found = _LINE.fullmatch(await reader.readline())
            assert found
            if found[1] != b"lua":  # the commands of a script follow the call
                user = self._users.get(found[1].decode())
            command = tuple(found[2].split(_BETWEEN_WORDS))
            if user:
                self.sent[user].add(command)
            elif command[-1] == _END:
                return


@asynccontextmanager
async def _relay(port: int, address: str) -> AsyncIterator[int]:
    """Pass connections on to a port of this machine, from an address of this machine. Yields the relay's port."""
    serving: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        serving.add(task)
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
        await asyncio.gather(pass_on(reader, to_redis), pass_on(from_redis, writer))

    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*serving)

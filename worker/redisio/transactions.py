"""WATCH, MULTI and EXEC on connections that are lent to one caller at a time. Every step is one write.

redis-py 8.1 takes 40 to 75 us for each command, and waits for the reply to one before it sends the next.
"""

from asyncio import Semaphore
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from .cluster import WRONG_SERVER, forget_masters, on_master_removed, server_of
from .pipelined import PipelinedConnection, pack

MAX_CONNECTIONS = 16
"""The most connections to one server. Its client's pool has 64, and the renewal of leases needs one of the others."""

_UNWATCH = pack(b"UNWATCH")


class Transaction:
    """A connection to the server of a key, for as long as the context of `Transactions.begin` lasts."""

    def __init__(self, connection: PipelinedConnection) -> None:
        self._connection = connection

    async def query(self, *commands: bytes) -> list[Any]:
        """Send packed commands in one write, and return their replies.

        Raises:
            RedisError: the first error among the replies, or that the connection is lost.
        """
        return _raise_first(await self._connection.execute(b"".join(commands), len(commands)))

    async def watch(self, keys: Iterable[str], *queries: bytes) -> list[Any]:
        """Watch keys and read them in one write; returns the replies to the queries.

        Keys that an earlier caller watched on this connection without an EXEC are no longer watched.
        """
        watch = pack(b"WATCH", *[key.encode() for key in keys])
        return (await self.query(_UNWATCH, watch, *queries))[2:]

    async def execute(self, *commands: bytes) -> list[Any]:
        """Execute all packed commands in a MULTI, or none of them.

        Raises:
            WatchError: when a watched key changed; Redis executed nothing.
            RedisError: when Redis refused, or the connection was lost. After a loss Redis may have executed them.
        """
        return _raise_first(await self._connection.execute_multi([[(command, 1) for command in commands]]))


@dataclass(eq=False)
class _ServerConnections:
    """The connections to one server: how many are still available, and the idle ones."""

    available: Semaphore = field(default_factory=lambda: Semaphore(MAX_CONNECTIONS))
    idle: list[PipelinedConnection] = field(default_factory=list)


class Transactions:
    """Lends connections from the pool of a client, which closes them together with its others.

    `redis` is that client, for all other commands.
    """

    def __init__(self, redis: Redis, connection_type: type[PipelinedConnection] = PipelinedConnection) -> None:
        self.redis = redis
        self._connection_type = connection_type
        self._servers: dict[Redis, _ServerConnections] = {}
        on_master_removed(redis, self._drop)

    @asynccontextmanager
    async def begin(self, key: str) -> AsyncIterator[Transaction]:
        """A connection to the server of a key, for this caller only. It waits while too many are in use.

        Raises:
            RedisError: when no server holds the key, or it cannot be reached.
        """
        redis = await server_of(self.redis, key)
        server = self._servers.setdefault(redis, _ServerConnections())
        async with server.available:
            connection = await self._open(redis, server)
            try:
                yield Transaction(connection)
            except WRONG_SERVER:
                connection.abort()
                self._abort_idle()
                raise
            finally:
                if self._servers.get(redis) is server:
                    server.idle.append(connection)
                else:  # the server left the cluster meanwhile
                    await connection.close()

    async def _open(self, redis: Redis, server: _ServerConnections) -> PipelinedConnection:
        while server.idle:
            connection = server.idle.pop()
            if connection.is_open:
                return connection
            await connection.close()
        return await self._connection_type.open(redis.connection_pool)

    async def _drop(self, redis: Redis) -> None:
        server = self._servers.pop(redis, None)
        for connection in server.idle if server else ():
            await connection.close()

    def _abort_idle(self) -> None:
        """Close the idle connections: one connection has shown that the server is away or no longer the master."""
        forget_masters(self.redis)
        for server in self._servers.values():
            for connection in server.idle:
                connection.abort()


def _raise_first(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply
    return replies

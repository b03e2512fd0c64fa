"""Sends the commands of many callers in one write: one connection to each server, shared by all callers."""

import asyncio
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .cluster import WRONG_SERVER, forget_masters, on_master_removed, server_of
from .errors import is_transient
from .pipelined import PipelinedConnection, connection_lost_error

_BATCH_SIZE = 128
"""The most calls in one batch: reading the replies to more would block the process for too long.

After a timeout, batches are a quarter of that size, so that Redis can answer them in time. Each success doubles the
size.
"""

_Call: TypeAlias = tuple[bytes, int, asyncio.Future[list[Any]]]
"""Packed commands, their number, and the future of their replies."""


class CommandBatcher:
    """Sends the commands of many callers, on one connection to each server from a client's pool.

    `redis` is the client, which may be used for other commands as well.
    """

    def __init__(self, redis: Redis, connection_type: type[PipelinedConnection] = PipelinedConnection) -> None:
        self.redis = redis
        self._connection_type = connection_type
        self._servers: dict[Redis, _ServerBatcher] = {}
        on_master_removed(redis, self._drop)

    async def execute(self, key: str, packed: bytes, count: int) -> list[Any]:
        """Send `count` packed commands to the server of a key, and return their replies.

        Raises:
            RedisError: when they cannot be sent, are not answered, or one of them is refused.
        """
        redis = await server_of(self.redis, key)
        server = self._servers.get(redis)
        if server is None:
            server = self._servers[redis] = _ServerBatcher(redis, self._connection_type)
        try:
            replies = await server.execute(packed, count)
            for reply in replies:
                if isinstance(reply, RedisError):
                    raise reply
        except (RedisError, OSError) as error:
            if is_transient(error):
                forget_masters(self.redis)
            raise
        return replies

    async def _drop(self, redis: Redis) -> None:
        if server := self._servers.pop(redis, None):
            await server.aclose()

    async def aclose(self) -> None:
        """Close the connections. Callers that wait for replies get an error."""
        for server in self._servers.values():
            await server.aclose()


class _ServerBatcher:
    """The connection to one server, and the calls that wait for it."""

    def __init__(self, redis: Redis, connection_type: type[PipelinedConnection]) -> None:
        self._redis = redis
        self._connection_type = connection_type
        self._connection: PipelinedConnection | None = None
        self._waiting: list[_Call] = []
        self._sending: asyncio.Task[None] | None = None
        self._batch_size = _BATCH_SIZE
        self._is_closed = False

    async def execute(self, packed: bytes, count: int) -> list[Any]:
        if self._is_closed:
            raise connection_lost_error()
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((packed, count, answer))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())
        return await answer

    async def _send_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
            batch = [call for call in batch if not call[2].done()]
            if not batch:  # all callers were cancelled
                continue
            try:
                replies = await self._exchange(batch)
            except BaseException as error:
                for _, _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error if isinstance(error, Exception) else connection_lost_error())
                if not isinstance(error, Exception):
                    raise
                if isinstance(error, RedisTimeoutError):
                    self._batch_size = max(1, self._batch_size // 4)
                continue
            self._batch_size = min(2 * self._batch_size, _BATCH_SIZE)
            begin = 0
            for _, count, answer in batch:
                if not answer.done():
                    answer.set_result(replies[begin : begin + count])
                begin += count

    async def _exchange(self, batch: list[_Call]) -> list[Any]:
        if self._is_closed:
            raise connection_lost_error()
        if self._connection is not None and not self._connection.is_open:
            former, self._connection = self._connection, None
            await former.close()
        if self._connection is None:
            self._connection = await self._connection_type.open(self._redis.connection_pool)
        packed, count = b"".join([packed for packed, _, _ in batch]), sum(count for _, count, _ in batch)
        replies = await self._connection.execute(packed, count)
        if any(isinstance(reply, WRONG_SERVER) for reply in replies):
            self._connection.abort()
        return replies

    async def aclose(self) -> None:
        self._is_closed = True
        if self._connection is not None:
            self._connection.abort()
        if self._sending is not None:
            await asyncio.wait([self._sending])
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()

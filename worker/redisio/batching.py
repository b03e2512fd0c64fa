"""Sends the commands of many callers in one write: one connection to each server, shared by all callers."""

import asyncio
from functools import partial
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .cluster import WRONG_SERVER, ClusterClient, forget_masters, on_master_removed, server_of
from .errors import is_transient
from .pipelined import Outcome, PipelinedConnection, connection_lost_error

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
        self._in_cluster = isinstance(redis, ClusterClient)  # 4 us, since redis-py's clients have protocols as bases
        self._connection_type = connection_type
        self._servers: dict[Redis, _ServerBatcher] = {}
        on_master_removed(redis, self._drop)

    async def execute(self, key: str, packed: bytes, count: int) -> list[Any]:
        """Send `count` packed commands to the server of a key, and return their replies.

        Raises:
            RedisError: when they cannot be sent, are not answered, or one of them is refused.
        """
        redis = await server_of(self.redis, key) if self._in_cluster else self.redis
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
    """The connection to one server, and the calls that wait for it. A batch is in flight at a time.

    Batches follow one another by callbacks, since a task for each batch costs more than the batch of a quiet process.
    Only connecting is a task.
    """

    def __init__(self, redis: Redis, connection_type: type[PipelinedConnection]) -> None:
        self._redis = redis
        self._connection_type = connection_type
        self._connection: PipelinedConnection | None = None
        self._waiting: list[_Call] = []
        self._is_busy = False
        """Whether a batch is in flight, or the next one will be sent in this step of the event loop or the next."""
        self._connecting: asyncio.Task[None] | None = None
        self._batch_size = _BATCH_SIZE
        self._is_closed = False
        self._loop = asyncio.get_running_loop()

    def execute(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        self._waiting.append((packed, count, answer))
        if not self._is_busy:
            self._schedule()
        return answer

    def _schedule(self) -> None:
        self._is_busy = True
        self._loop.call_soon(self._send)  # after the callers that have run by then

    def _send(self) -> None:
        """Send the next batch; nothing is in flight."""
        batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
        batch = [call for call in batch if not call[2].done()]  # the callers of the others were cancelled
        if not batch:
            self._proceed()
        elif self._is_closed:
            self._on_outcome(batch, connection_lost_error())
        elif self._connection is None or not self._connection.is_open:
            self._connecting = self._loop.create_task(self._connect_and_write(batch))
        else:
            self._write(self._connection, batch)

    def _write(self, connection: PipelinedConnection, batch: list[_Call]) -> None:
        packed, count = b"".join([packed for packed, _, _ in batch]), sum([count for _, count, _ in batch])
        connection.send(packed, count, partial(self._on_outcome, batch))

    async def _connect_and_write(self, batch: list[_Call]) -> None:
        try:
            former, self._connection = self._connection, None
            if former is not None:
                await former.close()
            self._connection = connection = await self._connection_type.open(self._redis.connection_pool)
        except BaseException as error:
            self._on_outcome(batch, error if isinstance(error, Exception) else connection_lost_error())
            if not isinstance(error, Exception):
                raise
        else:
            if self._is_closed:
                connection.abort()
            self._write(connection, batch)

    def _on_outcome(self, batch: list[_Call], outcome: Outcome) -> None:
        """Hand out the replies to a batch, or the error in their place."""
        if isinstance(outcome, Exception):
            for _, _, answer in batch:
                if not answer.done():
                    answer.set_exception(outcome)
            if isinstance(outcome, RedisTimeoutError):
                self._batch_size = max(1, self._batch_size // 4)
        else:
            if self._connection is not None and any(isinstance(reply, WRONG_SERVER) for reply in outcome):
                self._connection.abort()
            self._batch_size = min(2 * self._batch_size, _BATCH_SIZE)
            begin = 0
            for _, count, answer in batch:
                if not answer.done():
                    answer.set_result(outcome[begin : begin + count])
                begin += count
        self._proceed()

    def _proceed(self) -> None:
        """Send what waits, after the callers that were just answered have run."""
        self._is_busy = False
        if self._waiting:
            self._schedule()

    async def aclose(self) -> None:
        self._is_closed = True
        if self._connection is not None:
            self._connection.abort()
        if self._connecting is not None:
            await asyncio.wait([self._connecting])
        if self._connection is not None:  # the calls in flight get an error, and then those that wait
            connection, self._connection = self._connection, None
            await connection.close()

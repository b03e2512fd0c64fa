"""Questions of many callers, asked together: one connection to each server, and what waits for it goes as one write."""

import asyncio
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .cluster import ELSEWHERE, forget_masters, server_of, when_gone
from .errors import is_transient
from .pipelined import PipelinedConnection, lost

_AT_ONCE = 128
"""Questions that go as one: more of them would keep the process from everything else while it reads the answers.

After a timeout it is a quarter, so that what can be answered in time is, and then twice as many with each answer.
"""


class CommandBatcher:
    """Asks for many. The client is shared, but keeps one connection to each server for this."""

    kind = PipelinedConnection

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._lines: dict[Redis, _ServerConnection] = {}
        when_gone(redis, self._drop)

    async def ask(self, key: str, packed: bytes, count: int) -> list[Any]:
        """Send commands about a key, and give their `count` replies.

        Raises:
            RedisError: when they cannot be sent or are not answered, or what Redis says against one of them.
        """
        server = await server_of(self._redis, key)
        line = self._lines.get(server)
        if line is None:
            line = self._lines[server] = _ServerConnection(server, self.kind)
        try:
            replies = await line.ask(packed, count)
            for reply in replies:
                if isinstance(reply, RedisError):
                    raise reply
        except (RedisError, OSError) as error:
            if is_transient(error):
                forget_masters(self._redis)
            raise
        return replies

    async def _drop(self, server: Redis) -> None:
        if line := self._lines.pop(server, None):
            await line.aclose()

    async def aclose(self) -> None:
        """Close the connections; what waits for an answer gets an error."""
        for line in self._lines.values():
            await line.aclose()


class _ServerConnection:
    """The connection to one server, and who waits for it."""

    def __init__(self, server: Redis, kind: type[PipelinedConnection]) -> None:
        self._server = server
        self._kind = kind
        self._wire: PipelinedConnection | None = None
        self._waiting: list[tuple[bytes, int, asyncio.Future[list[Any]]]] = []
        self._asking: asyncio.Task[None] | None = None
        self._at_once = _AT_ONCE
        self._is_closed = False

    async def ask(self, packed: bytes, count: int) -> list[Any]:
        if self._is_closed:
            raise lost()
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((packed, count, answer))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_all())
        return await answer

    async def _ask_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._at_once], self._waiting[self._at_once :]
            batch = [each for each in batch if not each[2].done()]
            if not batch:  # all who asked were cancelled
                continue
            try:
                replies = await self._exchange(batch)
            except BaseException as error:
                for _, _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error if isinstance(error, Exception) else lost())
                if not isinstance(error, RedisError | OSError):
                    raise
                if isinstance(error, RedisTimeoutError):
                    self._at_once = max(1, self._at_once // 4)
                continue
            self._at_once = min(2 * self._at_once, _AT_ONCE)
            begin = 0
            for _, count, answer in batch:
                if not answer.done():
                    answer.set_result(replies[begin : begin + count])
                begin += count

    async def _exchange(self, batch: list[tuple[bytes, int, asyncio.Future[list[Any]]]]) -> list[Any]:
        if self._is_closed:
            raise lost()
        if self._wire is not None and not self._wire.is_open:
            wire, self._wire = self._wire, None
            await wire.close()
        if self._wire is None:
            self._wire = await self._kind.open(self._server.connection_pool)
        questions, count = b"".join([packed for packed, _, _ in batch]), sum(count for _, count, _ in batch)
        replies = await self._wire.ask(questions, count)
        if any(isinstance(reply, ELSEWHERE) for reply in replies):
            self._wire.abort()
        return replies

    async def aclose(self) -> None:
        self._is_closed = True
        if self._wire is not None:
            self._wire.abort()
        if self._asking is not None:
            await asyncio.wait([self._asking])
        if self._wire is not None:
            await self._wire.close()

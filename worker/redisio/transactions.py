"""Connections to Redis that one caller at a time has to itself, as a WATCH needs it: a question is one write.

redis-py 8.1 takes 40 to 75 us for each command, and waits for the reply of one before it sends the next.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from .cluster import ELSEWHERE, forget_masters, server_of, when_gone
from .pipelined import PipelinedConnection, in_multi, pack

_MOST = 16
"""Connections to one server: its client's pool has 64, and the renewals of leases need one of the rest."""


class Transaction:
    """A connection to the server of a key, for as long as the context of `Transactions.to` lasts."""

    def __init__(self, wire: PipelinedConnection) -> None:
        self._wire = wire

    async def ask(self, *commands: bytes) -> list[Any]:
        """Send packed commands at once, and give their replies.

        Raises:
            RedisError: the first that is among the replies, or that the connection is lost.
        """
        return _good(await self._wire.ask(b"".join(commands), len(commands)))

    async def watch(self, keys: Iterable[str], *questions: bytes) -> list[Any]:
        """Watch keys and ask about them, in one write; gives the replies to the questions.

        What the connection has watched before, for whoever left it without an EXEC, is forgotten.
        """
        watch = pack(b"WATCH", *[key.encode() for key in keys])
        return (await self.ask(_UNWATCH, watch, *questions))[2:]

    async def execute(self, *commands: bytes) -> list[Any]:
        """Do all of it, or nothing.

        Raises:
            WatchError: when what is watched was touched; nothing is done.
            RedisError: when Redis refused, or the connection is lost: then nobody knows.
        """
        return _good(await in_multi(self._wire, [[(command, 1) for command in commands]]))


@dataclass(eq=False)
class _ServerTransactions:
    """What there is for one server: turns for those who come, and connections that nobody has."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MOST))
    free: list[PipelinedConnection] = field(default_factory=list)


class Transactions:
    """Connections out of the pool of a client; they close with it. `redis` is that client, for all other commands."""

    kind = PipelinedConnection

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._places: dict[Redis, _ServerTransactions] = {}
        when_gone(redis, self._drop)

    @asynccontextmanager
    async def to(self, key: str) -> AsyncIterator[Transaction]:
        """A connection to the server of a key.

        Raises:
            RedisError: when there is none.
        """
        server = await server_of(self.redis, key)
        place = self._places.setdefault(server, _ServerTransactions())
        async with place.turns:
            wire = await self._take(server, place)
            try:
                yield Transaction(wire)
            except ELSEWHERE:
                wire.abort()
                self._forget()
                raise
            finally:
                if self._places.get(server) is place:
                    place.free.append(wire)
                else:  # the server was dropped meanwhile
                    await wire.close()

    async def ask(self, key: str, command: bytes) -> Any:  # noqa: ANN401 - whatever Redis replies
        """Send one command about a key, and give its reply.

        Raises:
            RedisError: when that is one, or the connection is lost.
        """
        async with self.to(key) as line:
            (reply,) = await line.ask(command)
        return reply

    async def _take(self, server: Redis, place: _ServerTransactions) -> PipelinedConnection:
        while place.free:
            wire = place.free.pop()
            if wire.is_open:
                return wire
            await wire.close()
        return await self.kind.open(server.connection_pool)

    async def _drop(self, server: Redis) -> None:
        place = self._places.pop(server, None)
        for wire in place.free if place else ():
            await wire.close()

    def _forget(self) -> None:
        """One connection has met a server that is away, or is no master any more: so would the others."""
        forget_masters(self.redis)
        for place in self._places.values():
            for wire in place.free:
                wire.abort()


_UNWATCH = pack(b"UNWATCH")


def _good(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply
    return replies

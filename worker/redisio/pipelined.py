"""Packed commands to Redis: one write for many of them, and one wake-up for all their replies.

redis-py makes the connections, with all that belongs to it (AUTH, TLS, SELECT, Sentinel, the masters of a cluster), and
closes them. In between they are ours, for redis-py 8.1 packs a command in 13 us and has an await for each reply.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from typing import Any, Self, TypeAlias, cast

import hiredis
from redis._parsers.base import BaseParser
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, InvalidResponse, RedisError, ResponseError, TryAgainError, WatchError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .clients import COMMAND_TIMEOUT
from .cluster import slot_of
from .unsent import unsent

Packed: TypeAlias = tuple[bytes, int]
"""Packed commands, and how many these are."""
Command: TypeAlias = tuple[str, bytes, int]
"""A key, and what is to be done with it: packed commands, and how many these are."""
Outcome: TypeAlias = list[Any] | Exception
"""Replies, errors among them as values, or why there are none."""
Done: TypeAlias = Callable[[Outcome], None]


def pack(*args: bytes) -> bytes:
    """One command as Redis reads it."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # hiredis 3.5 says that it takes a tuple of one
    return packed


_MULTI, _EXEC = pack(b"MULTI"), pack(b"EXEC")


class TakenConnection(asyncio.Protocol):
    """One connection out of a pool, which has one less until this is closed. What becomes of replies is `take`'s."""

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
        self._pool = pool
        self._connection = connection
        writer = cast("asyncio.StreamWriter", connection._writer)  # noqa: SLF001 - redis-py 8.1 has no other way to it
        self._transport = cast("asyncio.Transport", writer.transport)
        self._former = self._transport.get_protocol()
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=_error)
        self._transport.set_protocol(self)

    @classmethod
    async def open(cls, pool: ConnectionPool) -> Self:
        """Take a connection out of a pool; it connects where it has to.

        Raises:
            RedisError: when it cannot.
        """
        return cls(pool, await pool.get_connection())  # type: ignore[no-untyped-call]  # so in redis-py 8.1

    @property
    def is_open(self) -> bool:
        """Whether it can be used; once it cannot, it never can again."""
        return not self._transport.is_closing()

    def write(self, packed: bytes) -> None:
        """Send commands.

        Raises:
            RedisError: when the connection is lost.
        """
        if not self.is_open:
            raise lost()
        try:
            self._transport.write(packed)
        except RuntimeError as error:  # of uvloop 0.22, for a connection that goes while it is written to
            self.abort()
            raise lost() from error

    def abort(self) -> None:
        """Lose the connection now. It is still to be closed."""
        self._transport.abort()

    async def close(self) -> None:
        """Close it, and give its place in the pool back."""
        with suppress(RedisError, OSError):
            await self._connection.disconnect()
        await self._pool.release(self._connection)

    def take(self, replies: list[Any]) -> None:
        """These replies have come together, errors among them as values."""
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        """Replies have come."""
        reader, replies = self._reader, list[Any]()
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                replies.append(reply)
        except InvalidResponse:
            self.abort()
        self.take(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes: also redis-py's own end has to know."""
        self._former.connection_lost(exc)


class PipelinedConnection(TakenConnection):
    """A connection that is asked."""

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
        super().__init__(pool, connection)
        self._replies: list[Any] = []
        self._wanted = 0
        self._due = 0.0
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None
        self._done: Done | None = None

    def ask(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
        """Send commands and give their `count` replies, errors among them as values.

        Raises, when it is awaited:
            RedisError: as `send` tells.
        """
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def done(outcome: Outcome) -> None:
            if answer.done():
                return
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

        answer.add_done_callback(self._unless_cancelled)
        self.send(packed, count, done)
        return answer

    def _unless_cancelled(self, answer: asyncio.Future[list[Any]]) -> None:
        if answer.cancelled():  # replies that come late would be taken for those of the next question
            self.abort()

    def send(self, packed: bytes, count: int, done: Done) -> None:
        """Send commands, and have `done` called with their `count` replies, errors among them as values.

        One question at a time. Told in place of replies is a RedisError when the connection is lost or when, for
        `COMMAND_TIMEOUT`, nothing has come and nothing of the commands went out: they may have been done, and nothing
        can be asked here any more.
        """
        try:
            self.write(packed)
        except RedisError as error:
            done(error)
            return
        self._done, self._wanted, self._unsent = done, count, len(packed)
        loop = asyncio.get_running_loop()
        self._due = loop.time() + COMMAND_TIMEOUT
        if self._timer is None:
            self._timer = loop.call_at(self._due, self._look)

    def _look(self) -> None:
        """Whether an answer is overdue. One timer serves many questions: one for each costs more than the writing."""
        self._timer = None
        if self._done is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._due and 0 < (left := unsent(self._transport)) < self._unsent:
            self._unsent, self._due = left, loop.time() + COMMAND_TIMEOUT  # a slow way, and no silence
        if loop.time() < self._due:
            self._timer = loop.call_at(self._due, self._look)
        else:
            self.abort()
            self._tell(RedisTimeoutError(f"Redis did not answer within {COMMAND_TIMEOUT:g} s"))

    def _tell(self, outcome: Outcome) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(outcome)

    def take(self, replies: list[Any]) -> None:
        """Some of what was asked for, or all; or only a piece of a reply, which is no silence either."""
        self._replies += replies
        if len(self._replies) < self._wanted:
            self._due = asyncio.get_running_loop().time() + COMMAND_TIMEOUT
        elif self._done is not None:
            whole, self._replies = self._replies, []
            self._tell(whole)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody answers any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._tell(lost())
        super().connection_lost(exc)


class NodeConnections:
    """The publisher's connection to one server, opened again whenever it was lost.

    With `by_slot` the server is a master of a cluster, where a MULTI has the keys of one slot.
    """

    kind = PipelinedConnection

    def __init__(self, redis: Redis, *, by_slot: bool = False) -> None:
        self._redis = redis
        self._by_slot = by_slot
        self._wire: PipelinedConnection | None = None
        self._shards = False

    @property
    def has_shards(self) -> bool:
        """Whether this master of a cluster knows sharded channels, as Redis 7 does."""
        return self._shards

    async def connect(self) -> bool:
        """Have a connection, or raise; tells whether it is new."""
        if self._wire is not None and self._wire.is_open:
            return False
        if self._wire is not None:
            wire, self._wire = self._wire, None
            await wire.close()
        self._wire = await self.kind.open(self._redis.connection_pool)
        if self._by_slot:
            self._shards = await _knows_shards(self._wire)
        return True

    async def close(self) -> None:
        """Close the connection."""
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()
        with suppress(RedisError, OSError):
            await self._redis.connection_pool.disconnect()

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands, each with the key it is about; gives their replies, errors among them as values.

        Raises:
            RedisError: when there is no connection, or it is lost.
        """
        if not commands:
            return []
        if self._wire is None:
            raise lost()
        packed = b"".join([packed for _, packed, _ in commands])
        return await self._wire.ask(packed, sum([count for _, _, count in commands]))

    def execute(self, commands: Sequence[Command], done: Done) -> None:
        """The same in a MULTI, in a cluster one for each slot: Redis does all of it or nothing.

        `done` is told the replies, or in their place the RedisError: also when a MULTI was refused, with the reason.
        Others may have been done.
        """
        wire = self._wire
        if wire is None:
            done(lost())
        elif self._by_slot:
            task = asyncio.ensure_future(_in_multi_by_slot(wire, commands))
            task.add_done_callback(partial(pass_on, done))
        else:
            wire.send(
                b"".join([_MULTI, *[packed for _, packed, _ in commands], _EXEC]),
                sum([count for _, _, count in commands]) + 2,
                lambda outcome: done(outcome if isinstance(outcome, Exception) else _executed(outcome)),
            )


async def _knows_shards(wire: PipelinedConnection) -> bool:
    (told,) = await wire.ask(pack(b"COMMAND", b"INFO", b"SPUBLISH"), 1)
    return isinstance(told, list) and told[0] is not None


async def _in_multi_by_slot(wire: PipelinedConnection, commands: Sequence[Command]) -> list[Any]:
    """Send commands in a MULTI for each slot; gives their replies in the order of the commands."""
    slots: dict[int, list[int]] = {}
    for number, (key, _, _) in enumerate(commands):
        slots.setdefault(slot_of(key), []).append(number)
    done = iter(await in_multi(wire, [[commands[number][1:] for number in numbers] for numbers in slots.values()]))
    replies: list[list[Any]] = [[] for _ in commands]
    for number in chain.from_iterable(slots.values()):
        replies[number] = list(islice(done, commands[number][2]))
    return list(chain.from_iterable(replies))


async def in_multi(wire: PipelinedConnection, slots: list[list[Packed]]) -> list[Any]:
    """Send the commands of each slot in a MULTI, and give their replies, errors among them as values.

    Raises:
        RedisError: when a MULTI was refused, with the reason; others may have been done.
        WatchError: when what the connection watches was touched.
    """
    parts = [part for commands in slots for part in (_MULTI, *[packed for packed, _ in commands], _EXEC)]
    counts = [sum([count for _, count in commands]) + 2 for commands in slots]
    replies = iter(await wire.ask(b"".join(parts), sum(counts)))
    done: list[Any] = []
    for count in counts:
        outcome = _executed(list(islice(replies, count)))
        if isinstance(outcome, Exception):
            raise outcome
        done += outcome
    return done


def pass_on(done: Done, task: asyncio.Task[list[Any]]) -> None:
    """Tell what became of a task, unless it was cancelled."""
    if not task.cancelled():
        done(cast("Exception | None", task.exception()) or task.result())


def _executed(replies: list[Any]) -> Outcome:
    """What the commands of a MULTI answered; the error that kept it from being done in their place."""
    executed = replies[-1]
    if isinstance(executed, list):
        return executed
    if executed is None:
        return WatchError("a key that is watched was touched")
    why = next((reply for reply in replies if isinstance(reply, RedisError)), None)
    return why or ResponseError(f"EXEC answered {executed!r}")


def lost() -> RedisConnectionError:
    """What is raised where a connection is gone."""
    return RedisConnectionError("the connection to Redis was lost")


def _error(text: str) -> Exception:
    error: Exception = BaseParser.parse_error(text)  # type: ignore[no-untyped-call]  # so in redis-py 8.1
    if isinstance(error, AskError):  # MovedError is one
        return TryAgainError(f"the slot is elsewhere, or about to be: {error}")
    return error

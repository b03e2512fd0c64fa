"""Pipelined commands to Redis: one write for many commands, and one wake-up for all their replies.

redis-py opens and closes each connection, with AUTH, TLS, SELECT, Sentinel and the masters of a cluster. In between
this module reads and writes the transport directly, because redis-py 8.1 takes 13 us to pack a command and an await for
each reply. This module uses private parts of redis-py's connections.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any, Self, TypeAlias, cast

import hiredis
from redis._parsers.base import BaseParser
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, InvalidResponse, RedisError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .cluster import slot_of
from .unsent import unsent

Command: TypeAlias = tuple[str, bytes, int]
"""A key, packed commands on that key, and the number of commands."""
Outcome: TypeAlias = list[Any] | Exception
"""Replies, in which the error of a single command is a value; or an error, if there are no replies."""
Callback: TypeAlias = Callable[[Outcome], None]


def pack(*args: bytes) -> bytes:
    """Encode one command in Redis's protocol."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # hiredis 3.5 declares a tuple of one
    return packed


_MULTI, _EXEC = pack(b"MULTI"), pack(b"EXEC")


class DirectConnection(asyncio.Protocol):
    """A connection taken out of a pool until `close` returns it. Subclasses get the replies in `on_replies`.

    `timeout` is the limit on silence in seconds, from the options of the pool's client.
    """

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
        self._pool = pool
        self._connection = connection
        self.timeout = cast("float", connection.socket_timeout)  # `clients` sets it for every pool
        writer = cast("asyncio.StreamWriter", connection._writer)  # noqa: SLF001 - redis-py 8.1 has no other way to it
        self._transport = cast("asyncio.Transport", writer.transport)
        self._former_protocol = self._transport.get_protocol()
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=_parse_error)
        self._transport.set_protocol(self)

    @classmethod
    async def open(cls, pool: ConnectionPool) -> Self:
        """Take a connection out of a pool, which connects it if necessary.

        Raises:
            RedisError: when it cannot connect.
        """
        return cls(pool, await pool.get_connection())  # type: ignore[no-untyped-call]  # so in redis-py 8.1

    @property
    def is_open(self) -> bool:
        """Whether the connection can be used. A connection that was lost stays lost."""
        return not self._transport.is_closing()

    def write(self, packed: bytes) -> None:
        """Send commands.

        Raises:
            RedisError: when the connection is lost.
        """
        if not self.is_open:
            raise connection_lost_error()
        try:
            self._transport.write(packed)
        except RuntimeError as error:  # uvloop 0.22 raises it for a connection that is lost during the write
            self.abort()
            raise connection_lost_error() from error

    def abort(self) -> None:
        """Close the connection at once. `close` is still needed to return it to the pool."""
        self._transport.abort()

    async def close(self) -> None:
        """Close the connection and return it to the pool."""
        with suppress(RedisError, OSError):
            await self._connection.disconnect()
        await self._pool.release(self._connection)

    def on_replies(self, replies: list[Any]) -> None:
        """Handle replies that arrived together, errors among them as values. The list may be empty."""
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        """Parse what arrived. asyncio calls this."""
        reader, replies = self._reader, list[Any]()
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                replies.append(reply)
        except InvalidResponse:
            self.abort()
        self.on_replies(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the loss on to redis-py. asyncio calls this."""
        self._former_protocol.connection_lost(exc)


class PipelinedConnection(DirectConnection):
    """A connection for commands and their replies: one exchange at a time."""

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
        super().__init__(pool, connection)
        self._replies: list[Any] = []
        self._expected = 0
        self._deadline = 0.0
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None
        self._callback: Callback | None = None

    def execute(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
        """Send commands and return their `count` replies, errors among them as values.

        Raises, when it is awaited:
            RedisError: what `send` passes to its callback.
        """
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def resolve(outcome: Outcome) -> None:
            if answer.done():
                return
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

        answer.add_done_callback(self._abort_if_cancelled)
        self.send(packed, count, resolve)
        return answer

    def _abort_if_cancelled(self, answer: asyncio.Future[list[Any]]) -> None:
        if answer.cancelled():  # late replies would be assigned to the next commands
            self.abort()

    def send(self, packed: bytes, count: int, callback: Callback) -> None:
        """Send commands, and call `callback` with their `count` replies, errors among them as values.

        The callback gets a RedisError in place of replies when the connection is lost, or when for `timeout` seconds no
        reply arrived and no more bytes of the commands were sent. Redis may have executed the commands, and the
        connection can no longer be used.
        """
        try:
            self.write(packed)
        except RedisError as error:
            callback(error)
            return
        self._callback, self._expected, self._unsent = callback, count, len(packed)
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + self.timeout
        if self._timer is None:
            self._timer = loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        """Check the deadline. One timer serves many exchanges, since a timer for each would cost more than a write."""
        self._timer = None
        if self._callback is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._deadline and 0 < (left := unsent(self._transport)) < self._unsent:
            self._unsent, self._deadline = left, loop.time() + self.timeout  # a slow network is not silence
        if loop.time() < self._deadline:
            self._timer = loop.call_at(self._deadline, self._check_deadline)
        else:
            self.abort()
            self._finish(RedisTimeoutError(f"Redis did not answer within {self.timeout:g} s"))

    def _finish(self, outcome: Outcome) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback(outcome)

    def on_replies(self, replies: list[Any]) -> None:
        """Collect replies until all have arrived. An empty list, for a piece of a reply, also extends the deadline."""
        self._replies += replies
        if len(self._replies) < self._expected:
            self._deadline = asyncio.get_running_loop().time() + self.timeout
        elif self._callback is not None:
            complete, self._replies = self._replies, []
            self._finish(complete)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange with an error. asyncio calls this."""
        if self._timer is not None:
            self._timer.cancel()
        self._finish(connection_lost_error())
        super().connection_lost(exc)


class NodeConnections:
    """The publisher's connection to one server, opened again after each loss.

    Args:
        redis: a client of that server.
        by_slot: whether the server is a master of a cluster, where a MULTI may only have the keys of one slot.
        connection_type: the class of connections.
    """

    def __init__(
        self, redis: Redis, *, by_slot: bool = False, connection_type: type[PipelinedConnection] = PipelinedConnection
    ) -> None:
        self._redis = redis
        self._by_slot = by_slot
        self._connection_type = connection_type
        self._connection: PipelinedConnection | None = None
        self._has_sharded_channels = False

    @property
    def has_sharded_channels(self) -> bool:
        """Whether the server is a master of a cluster and supports sharded pub/sub, as Redis 7 does."""
        return self._has_sharded_channels

    async def connect(self) -> bool:
        """Connect if there is no open connection, and return whether the connection is new.

        Raises:
            RedisError: when it cannot connect.
        """
        if self._connection is not None and self._connection.is_open:
            return False
        if self._connection is not None:
            former, self._connection = self._connection, None
            await former.close()
        self._connection = await self._connection_type.open(self._redis.connection_pool)
        if self._by_slot:
            (reply,) = await self._connection.execute(pack(b"COMMAND", b"INFO", b"SPUBLISH"), 1)
            self._has_sharded_channels = isinstance(reply, list) and reply[0] is not None
        return True

    async def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        with suppress(RedisError, OSError):
            await self._redis.connection_pool.disconnect()

    async def query(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands and return their replies, errors among them as values.

        Raises:
            RedisError: when there is no connection, or it is lost.
        """
        if not commands:
            return []
        if self._connection is None:
            raise connection_lost_error()
        packed = b"".join([packed for _, packed, _ in commands])
        return await self._connection.execute(packed, sum([count for _, _, count in commands]))

    def execute(self, commands: Sequence[Command], callback: Callback) -> None:
        """Send commands in a MULTI, in a cluster in one for each slot. Redis executes all commands of a MULTI or none.

        `callback` gets the replies or a RedisError. If Redis refused one MULTI, the error is the reason, and Redis may
        have executed the others.
        """
        connection = self._connection
        if connection is None:
            callback(connection_lost_error())
        elif self._by_slot:
            groups = _by_slot(commands)
            parts = [part for group in groups for part in (_MULTI, *[commands[number][1] for number in group], _EXEC)]
            connection.send(
                b"".join(parts),
                sum([count for _, _, count in commands]) + 2 * len(groups),
                lambda outcome: callback(
                    outcome if isinstance(outcome, Exception) else _results_of_execs(commands, groups, outcome)
                ),
            )
        else:
            connection.send(
                b"".join([_MULTI, *[packed for _, packed, _ in commands], _EXEC]),
                sum([count for _, _, count in commands]) + 2,
                lambda outcome: callback(outcome if isinstance(outcome, Exception) else _result_of_exec(outcome)),
            )


def _by_slot(commands: Sequence[Command]) -> list[list[int]]:
    """The numbers of the commands of each slot."""
    slots: dict[int, list[int]] = {}
    for number, (key, _, _) in enumerate(commands):
        slots.setdefault(slot_of(key), []).append(number)
    return list(slots.values())


def _results_of_execs(commands: Sequence[Command], groups: list[list[int]], replies: list[Any]) -> Outcome:
    """The replies in the order of the commands, from all replies to a MULTI for each group; or a reason as below."""
    remaining, in_order = iter(replies), [list[Any]() for _ in commands]
    for group in groups:
        outcome = _result_of_exec(list(islice(remaining, sum([commands[number][2] for number in group]) + 2)))
        if isinstance(outcome, Exception):
            return outcome
        executed = iter(outcome)
        for number in group:
            in_order[number] = list(islice(executed, commands[number][2]))
    return list(chain.from_iterable(in_order))


def _result_of_exec(replies: list[Any]) -> Outcome:
    """The replies to the commands of a MULTI, from all replies to it; or the reason why Redis did not execute it."""
    executed = replies[-1]
    if isinstance(executed, list):
        return executed
    refusal = next((reply for reply in replies if isinstance(reply, RedisError)), None)
    return refusal or ResponseError(f"EXEC answered {executed!r}")


def connection_lost_error() -> RedisConnectionError:
    """The error for a lost connection."""
    return RedisConnectionError("the connection to Redis was lost")


def _parse_error(text: str) -> Exception:
    error: Exception = BaseParser.parse_error(text)  # type: ignore[no-untyped-call]  # so in redis-py 8.1
    if isinstance(error, AskError):  # includes MovedError
        return TryAgainError(f"the slot is on another master, or about to move there: {error}")
    return error

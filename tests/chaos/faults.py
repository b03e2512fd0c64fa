"""A network between redis-py and a real Redis in which exchanges happen one at a time, each with a chosen fate.

An exchange is what redis-py sends at once (a command, a pipeline, a MULTI … EXEC, or a connection's handshake) with
its replies. Every exchange waits at the gate of its process until somebody lets it through with a fate.
"""

import asyncio
import enum
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

from processes import Process
from redis import Redis as BlockingRedis
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from worker.broker.log_scripts import BEGIN, CLAIM, FINALIZE, LOOK, SEAL_LOG, SEAL_UNOWNED
from worker.redisio.batching import CommandBatcher
from worker.redisio.pipelined import Callback, Outcome, PipelinedConnection

_T = TypeVar("_T")
Late: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter, list[bytes]]
"""Commands in transit, and the connection that carries them."""

_PONG = b"the-end-of-the-replies"


class Fate(enum.Enum):
    """What becomes of an exchange."""

    FINE = "fine"
    CUT = "the connection breaks before anything is sent"
    LOST = "Redis does it, and the connection breaks before the reply"
    LATE = "the connection breaks, and what was sent arrives at some later time"
    FULL = "Redis has no memory left"


@dataclass(eq=False)
class Network:
    """All connections of all processes. `admin` is a client that no fault concerns."""

    admin: BlockingRedis
    busy: int = 0
    life: int = 0
    late: list[Late] = field(default_factory=list)

    def fail_over(self) -> None:
        """Lose every connection, with all that is in transit."""
        self.life += 1
        for _, writer, _ in self.late:
            writer.close()
        self.late.clear()

    async def deliver(self, place: int) -> None:
        """Deliver commands in transit, though nobody waits for their replies any more."""
        reader, writer, packed = self.late.pop(place % len(self.late))
        writer.writelines([*packed, b"PING %s\r\n" % _PONG])
        await reader.readuntil(_PONG)
        writer.close()

    async def calm(self) -> None:
        """Wait until the processes are quiet: every task waits at a gate, or for another task."""
        ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]  # exact, where a pause would be a guess
        quiet = 0
        while quiet < 3:  # timers that are due show in the next round
            await asyncio.sleep(0)
            quiet = 0 if ready or self.busy else quiet + 1


@dataclass(eq=False)
class Gate:
    """The exchanges of one process that wait, in the order of their arrival."""

    network: Network
    waiting: deque["asyncio.Future[Fate]"] = field(default_factory=deque)
    closed: bool = False

    async def fate(self) -> Fate:
        """Wait to be let through."""
        if self.closed:  # a killed process cleans nothing up
            raise asyncio.CancelledError
        place: asyncio.Future[Fate] = asyncio.get_running_loop().create_future()
        self.waiting.append(place)
        try:
            return await place
        finally:
            if place in self.waiting:
                self.waiting.remove(place)

    def close(self) -> None:
        """Let nothing through any more. The exchanges that wait are cancelled."""
        self.closed = True
        for place in list(self.waiting):
            place.cancel()

    async def let_through(self, fate: Fate = Fate.FINE, place: int = 0) -> None:
        """Let one of the waiting exchanges through with a fate, and wait until the processes are quiet."""
        for cancelled in [place for place in self.waiting if place.done()]:  # a job that was just stopped
            self.waiting.remove(cancelled)
        if self.waiting:
            chosen = self.waiting[place % len(self.waiting)]
            self.waiting.remove(chosen)
            chosen.set_result(fate)
        await self.network.calm()

    async def meet(
        self, fate: Fate, life: int, leave: Callable[[], Late], exchange: Coroutine[object, object, _T]
    ) -> _T | None:
        """Carry out an exchange on a connection of this life; returns nothing where the reply is lost."""
        network = self.network
        try:
            if fate is Fate.LATE and life == network.life:
                network.late.append(leave())
            if fate in {Fate.CUT, Fate.LATE} or life != network.life:
                raise RedisConnectionError("cut")
            if fate is Fate.FULL:
                network.admin.config_set("maxmemory", "1")
            try:
                replies = await exchange
            finally:
                if fate is Fate.FULL:
                    network.admin.config_set("maxmemory", "0")
            return None if fate is Fate.LOST else replies
        finally:
            exchange.close()

    def guard(self, redis: Redis) -> None:
        """Make all future connections of this client wait at this gate."""
        pool = redis.connection_pool
        pool.connection_class = type("GatedConnection", (_Connection,), {"gate": self})


class _Connection(Connection):
    """A connection whose exchanges are whole: all replies are there when sending returns, or never."""

    gate: ClassVar[Gate]

    _shaking_hands = False
    _replies: deque[object] | None = None
    _life = -1

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:  # noqa: FBT001, FBT002 - redis-py's own
        if self.is_connected:
            return
        if await self.gate.fate() is not Fate.FINE:
            raise RedisConnectionError("refused")
        self.gate.network.busy += 1
        self._shaking_hands = True
        try:
            await super().connect_check_health(check_health, retry_socket_connect)
        finally:
            self._shaking_hands = False
            self.gate.network.busy -= 1
        self._life = self.gate.network.life

    async def can_read(self) -> bool:
        return False  # a dead connection is noticed when it is used

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - redis-py's own
        if self._shaking_hands:
            await super().send_packed_command(command, check_health)
            return
        if not self.is_connected:
            await self.connect_check_health()
        fate = await self.gate.fate()
        self.gate.network.busy += 1
        try:
            self._replies = await self.gate.meet(
                fate, self._life, lambda: self._leave(command), self._exchange(command)
            )
        except RedisConnectionError:
            await self.disconnect()
            raise
        finally:
            self.gate.network.busy -= 1

    def _leave(self, command: bytes | str | Iterable[bytes]) -> Late:
        assert not isinstance(command, bytes | str)
        return late(self, list(command))

    async def _exchange(self, command: bytes | str | Iterable[bytes]) -> deque[object]:
        await super().send_packed_command(command, check_health=False)
        await super().send_packed_command(self.pack_command("PING", _PONG), check_health=False)
        replies: deque[object] = deque()
        while not replies or replies[-1] != _PONG:
            try:
                replies.append(await super().read_response())
            except ResponseError as refusal:
                replies.append(refusal)
        replies.pop()
        return replies

    async def read_response(self, *args: bool, **options: object) -> object:  # type: ignore[override]
        if self._shaking_hands:
            return await super().read_response(*args, **options)  # type: ignore[arg-type]
        if self._replies is None:
            await self.disconnect()
            raise RedisConnectionError("the reply is lost")
        reply = self._replies.popleft()
        if isinstance(reply, ResponseError):
            raise reply
        return reply


def _report(callback: Callback, task: "asyncio.Task[list[Any]]") -> None:
    if task.cancelled():  # the process was killed, and somebody in this one waits for the reply
        callback(RedisConnectionError("killed"))
    else:
        callback(cast("Exception | None", task.exception()) or task.result())


def gated(gate: Gate) -> type[PipelinedConnection]:
    """The class of pipelined connections whose every exchange waits at a gate."""
    return cast("type[PipelinedConnection]", type("GatedPipelinedConnection", (_PipelinedConnection,), {"gate": gate}))


class _PipelinedConnection(PipelinedConnection):
    gate: ClassVar[Gate]
    _is_left = False

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
        super().__init__(pool, connection)
        self._life = self.gate.network.life

    @property
    def is_open(self) -> bool:
        return not self._is_left and super().is_open

    def send(self, packed: bytes, count: int, callback: Callback) -> None:
        task = asyncio.ensure_future(self._meet(packed, count))
        task.add_done_callback(partial(_report, callback))

    async def _meet(self, packed: bytes, count: int) -> list[Any]:
        fate = await self.gate.fate()
        self.gate.network.busy += 1
        replies: list[Any] | None = None
        try:
            replies = await self.gate.meet(fate, self._life, lambda: self._leave(packed), self._exchange(packed, count))
        finally:
            self.gate.network.busy -= 1
            if not replies:
                self.abort()
        if replies is None:
            raise RedisConnectionError("the reply is lost")
        return replies

    async def _exchange(self, packed: bytes, count: int) -> list[Any]:
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        super().send(packed, count, answer.set_result)
        outcome = await answer
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def abort(self) -> None:
        if not self._is_left:
            super().abort()

    def _leave(self, packed: bytes) -> Late:
        self._transport.set_protocol(self._former_protocol)
        left = late(self._connection, [packed])
        self._is_left = True
        return left


def late(connection: AbstractConnection, packed: list[bytes]) -> Late:
    """Detach the streams of a connection: it is lost, and the commands sent on it arrive later."""
    assert connection._reader
    assert connection._writer
    taken = connection._reader, connection._writer, packed
    connection._reader = connection._writer = None
    return taken


async def gate_before(one: Process, redis_url: str) -> Gate:
    """Make the commands of this process wait to be let through from now on.

    Redis knows the scripts: one that it does not know takes an exchange more.
    """
    gate = Gate(Network(BlockingRedis.from_url(redis_url, protocol=2)))
    for script in (BEGIN, CLAIM, LOOK, SEAL_LOG, SEAL_UNOWNED, FINALIZE):
        gate.network.admin.script_load(script.source)
    gate.guard(one.commands)
    one.use(CommandBatcher(one.commands, gated(gate)))
    await one.commands.connection_pool.disconnect()
    one.commands.connection_pool.reset()  # type: ignore[no-untyped-call]  # redis-py 8.1
    return gate


async def let_through(gate: Gate, *fates: Fate) -> None:
    for fate in fates:
        await gate.network.calm()
        assert gate.waiting
        await gate.let_through(fate)


async def finish(gate: Gate, task: "asyncio.Future[Any]") -> None:
    while not task.done():
        await gate.let_through()
    gate.network.admin.close()

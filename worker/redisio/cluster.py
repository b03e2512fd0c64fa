"""A Redis Cluster as one client: every command goes once, to the master that holds the slot of its key.

redis-py's own RedisCluster does not fit (8.1, measured): a command that is queued in a transaction costs a thread and
an event loop (0.5 ms), PUBLISH and several slots are refused in one, and where no connection is free it fails. So
each master has a pool as a single server has, and here is only the way from a key to its pool. A command that is
refused since its slot has moved is not sent elsewhere: it is a passing fault, and whoever repeats it finds the slot.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MasterDownError, ReadOnlyError, RedisError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

_Address: TypeAlias = tuple[str, int]
_Command: TypeAlias = tuple[tuple[str | bytes, ...], Mapping[str, Any]]

_SLOTS = 16384
_ASK_TIMEOUT = 1.0
"""Seconds that a node has to tell who holds which slot; then the next is asked."""

ELSEWHERE = (
    RedisConnectionError, RedisTimeoutError, ReadOnlyError, TryAgainError, ClusterDownError, MasterDownError
)  # fmt: skip
"""What is heard of a server that is gone, or is not the master any more."""


class ClusterClient(Redis):
    """What `Redis` is, for a cluster.

    A transaction has the keys of one slot, any other pipeline those of many. What has no key goes to any master.
    """

    connection_pool: "ClusterPool"

    async def execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        """Send a command once; see `Redis`."""
        master = await self.connection_pool.master_of(_key_of(args))
        return await master.execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: FBT001, FBT002 - as redis-py has it
        """See `Redis`, and above."""
        return _ClusterPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    async def masters(self) -> list[Redis]:
        """A client for each master."""
        return await self.connection_pool.masters()


class ClusterPool(ConnectionPool):
    """A pool for each master of the cluster, made as the cluster tells of them. Itself it connects to none."""

    def __init__(self, nodes: Sequence[_Address], **options: Any) -> None:  # noqa: ANN401 - whatever connections take
        self._options = options
        secure = self._options.pop("connection_class", None) is SSLConnection
        self._kinds = (_SecureNodeConnection, SSLConnection) if secure else (_NodeConnection, Connection)
        super().__init__(connection_class=self._kinds[0], protocol=self._options["protocol"])
        self._seeds = nodes
        self._masters: dict[_Address, Redis] = {}
        self._by_slot: list[Redis | None] = [None] * _SLOTS
        self._stale = True
        self._asking: asyncio.Task[None] | None = None
        self._lent: dict[AbstractConnection, Redis] = {}
        self._drops: list[Callable[[Redis], Awaitable[None]]] = []

    async def master_of(self, key: str | bytes | None) -> Redis:
        """The client of the master that holds a key, or of any one."""
        await self._learn()
        if key is None:
            return next(iter(self._masters.values()))
        master = self._by_slot[slot_of(key)]
        if master is None:
            self._stale = True
            raise ClusterDownError("CLUSTERDOWN no master holds the slot")
        return master

    def known_master_of(self, key: str | bytes) -> Redis | None:
        """The client of the master that held a key when the cluster was asked last, if one did."""
        return self._by_slot[slot_of(key)]

    async def masters(self) -> list[Redis]:
        """A client for each master."""
        await self._learn()
        return list(self._masters.values())

    def when_gone(self, drop: Callable[[Redis], Awaitable[None]]) -> None:
        """Have `drop` called with each master that is none any more."""
        self._drops.append(drop)

    async def get_connection(self, *_: Any, **__: Any) -> AbstractConnection:  # noqa: ANN401 - as redis-py has it
        """A connection to any master, as for pub/sub: a cluster hands messages to every node."""
        master = await self.master_of(None)
        connection: AbstractConnection = await master.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        self._lent[connection] = master
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        """Take back what `get_connection` gave."""
        await self._lent.pop(connection).connection_pool.release(connection)

    async def disconnect(self, inuse_connections: bool = True) -> None:  # noqa: FBT001, FBT002 - as redis-py has it
        """Close the connections to every master; they are made again when they are needed."""
        self.forget()
        for master in list(self._masters.values()):
            await master.connection_pool.disconnect(inuse_connections)

    def forget(self) -> None:
        """The cluster may have changed: ask before the next command."""
        self._stale = True

    async def _learn(self) -> None:
        if not self._stale:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._refresh())
        await asyncio.shield(self._asking)  # all who wait share what comes of it, also when no node answers

    async def _refresh(self) -> None:
        await self._take(await self._ask())

    async def _ask(self) -> dict[range, _Address]:
        """Who holds which slots, as the first node says that answers.

        Raises:
            RedisError: what the last one said, when none does.
        """
        error: Exception = RedisConnectionError("the cluster has no nodes")
        known = list(self._masters)
        random.shuffle(known)  # not the same one each time: it may be the one that has lost touch
        for host, port in dict.fromkeys([*known, *self._seeds]):
            own = {"socket_timeout": _ASK_TIMEOUT, "socket_connect_timeout": _ASK_TIMEOUT}
            pool = BlockingConnectionPool(connection_class=self._kinds[1], **self._options | own, host=host, port=port)
            self._stale = False  # what shows while it is asked counts again
            try:
                async with Redis.from_pool(pool) as node:
                    told = await node.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
            except (RedisError, OSError) as problem:
                self._stale, error = True, problem
                continue
            # A node that does not know its own address leaves it out.
            return {range(first, last + 1): ((at[0] or b"").decode() or host, at[1]) for first, last, at, *_ in told}
        raise error

    async def _take(self, told: dict[range, _Address]) -> None:
        gone = {address: self._masters.pop(address) for address in set(self._masters) - set(told.values())}
        for address in told.values():
            if address not in self._masters:
                self._masters[address] = self._client(*address)
        self._by_slot = [None] * _SLOTS
        for slots, address in told.items():
            for slot in slots:
                self._by_slot[slot] = self._masters[address]
        for former in gone.values():
            await former.connection_pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
            await former.connection_pool.disconnect(inuse_connections=False)
            for drop in self._drops:
                await drop(former)
        if not told:
            self._stale = True
            raise ClusterDownError("CLUSTERDOWN no master holds a slot")

    def _client(self, host: str, port: int) -> Redis:
        pool = BlockingConnectionPool(
            connection_class=self._kinds[0], **self._options, host=host, port=port, forget=self.forget
        )
        return Redis.from_pool(pool)


class _ClusterPipeline(Pipeline):
    connection_pool: ConnectionPool

    def __init__(self, cluster: ClusterPool, callbacks: Any, transaction: bool, shard_hint: str | None) -> None:  # noqa: ANN401, FBT001 - as redis-py has it
        super().__init__(cluster, callbacks, transaction, shard_hint)
        self._cluster = cluster

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        if self.connection is None:
            self.connection_pool = (await self._cluster.master_of(_key_of(args))).connection_pool
        return await super().immediate_execute_command(*args, **options)  # type: ignore[no-untyped-call]

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - as redis-py has it
        stack: list[_Command] = list(self.command_stack)
        if self.is_transaction or not stack:  # its keys are of one slot, or Redis says so
            if self.connection is None and stack:
                self.connection_pool = (await self._cluster.master_of(_key_of(stack[0][0]))).connection_pool
            return await super().execute(raise_on_error)
        await self.reset()  # type: ignore[no-untyped-call]
        by_master: dict[Redis, list[int]] = {}
        for place, (args, _) in enumerate(stack):
            by_master.setdefault(await self._cluster.master_of(_key_of(args)), []).append(place)
        parts = []
        for master, places in by_master.items():
            part = Pipeline(master.connection_pool, self.response_callbacks, transaction=False, shard_hint=None)
            part.command_stack = [stack[place] for place in places]
            parts.append(part.execute(raise_on_error=False))
        replies: list[Any] = [None] * len(stack)
        for places, outcome in zip(
            by_master.values(), await asyncio.gather(*parts, return_exceptions=True), strict=True
        ):
            if isinstance(outcome, BaseException):
                if raise_on_error or not isinstance(outcome, RedisError | OSError):
                    raise outcome
                outcome = [outcome] * len(places)  # noqa: PLW2901 - the replies of the other masters are there
            for place, reply in zip(places, outcome, strict=True):
                replies[place] = reply
        if raise_on_error:
            self.raise_first_error(stack, replies)
        return replies


class _NodeConnection(Connection):
    """Says when what it meets may come of a change in the cluster."""

    def __init__(self, *, forget: Callable[[], None], **options: Any) -> None:  # noqa: ANN401 - as redis-py has it
        super().__init__(**options)
        self._forget = forget

    async def connect(self) -> None:
        try:
            await super().connect()  # type: ignore[no-untyped-call]
        except (RedisError, OSError):
            self._forget()
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        try:
            return await super().read_response(*args, **options)
        except AskError as error:  # MovedError is one
            self._forget()
            raise TryAgainError(f"the slot is elsewhere, or about to be: {error}") from None
        except (ClusterDownError, RedisConnectionError, RedisTimeoutError):
            self._forget()
            raise


class _SecureNodeConnection(_NodeConnection, SSLConnection):
    pass


async def servers_of(redis: Redis) -> list[Redis]:
    """A client for each server that is written to: the masters of a cluster, or the one there is."""
    return await redis.masters() if isinstance(redis, ClusterClient) else [redis]


async def server_of(redis: Redis, key: str) -> Redis:
    """The client of the server that holds a key.

    Raises:
        RedisError: when no master does, or no node of the cluster tells.
    """
    return await redis.connection_pool.master_of(key) if isinstance(redis, ClusterClient) else redis


def when_gone(redis: Redis, drop: Callable[[Redis], Awaitable[None]]) -> None:
    """Have `drop` called with the client of each master of a cluster that is none any more."""
    if isinstance(redis, ClusterClient):
        redis.connection_pool.when_gone(drop)


def forget_masters(redis: Redis) -> None:
    """What a server said, or that it said nothing, may come of a change in the cluster."""
    if isinstance(redis, ClusterClient):
        redis.connection_pool.forget()


def slot_of(key: str | bytes) -> int:
    """The slot of a key, by what stands in its braces."""
    return key_slot(key.encode() if isinstance(key, str) else key)


def _key_of(args: tuple[Any, ...]) -> str | bytes | None:
    """The first key of a command; of PUBLISH the channel, so that it goes with the log of the same braces."""
    if args[0] in ("XREAD", "XREADGROUP"):
        args = args[args.index(b"STREAMS") :]
    elif args[0] == "EVAL":
        args = args[2:]  # the script comes first, then how many keys there are
    key = args[1] if len(args) > 1 else None
    return key if isinstance(key, str | bytes) else None

"""A client for a Redis Cluster: it sends every command once, to the master that holds the slot of its key.

redis-py's own RedisCluster does not fit (8.1, measured): a command that is queued in a transaction costs a thread and
an event loop (0.5 ms), a transaction may not have a PUBLISH or several slots, and a command fails if no connection is
free. So each master has the same pool as a single server, and this module only finds the pool of a key. It does not
resend a command that Redis refuses because the slot has moved: the error is transient, and a retry finds the slot.
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

from .shared_call import SharedCall

_Address: TypeAlias = tuple[str, int]
_Command: TypeAlias = tuple[tuple[str | bytes, ...], Mapping[str, Any]]

_SLOTS = 16384
_SLOTS_TIMEOUT = 1.0
"""Seconds that a node has to answer CLUSTER SLOTS before the next node is queried."""

WRONG_SERVER = (
    RedisConnectionError, RedisTimeoutError, ReadOnlyError, TryAgainError, ClusterDownError, MasterDownError
)  # fmt: skip
"""Errors of a server that is gone or no longer the master."""


class ClusterClient(Redis):
    """`Redis` for a cluster.

    The keys of a transaction must be in one slot; those of other pipelines may be in many. A command without a key is
    sent to any master.
    """

    connection_pool: "ClusterPool"

    async def execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as redis-py has it
        """Send a command once, as `Redis` does."""
        master = await self.connection_pool.master_of(_key_of(args))
        return await master.execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: FBT001, FBT002 - as redis-py has it
        """A pipeline, as `Redis` returns it."""
        return _ClusterPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    async def masters(self) -> list[Redis]:
        """A client for each master."""
        return await self.connection_pool.masters()


class ClusterPool(ConnectionPool):
    """The pools of all masters of the cluster, created once CLUSTER SLOTS lists them. It opens no other connection."""

    def __init__(self, nodes: Sequence[_Address], **options: Any) -> None:  # noqa: ANN401 - any option of a connection
        self._options = options
        secure = self._options.pop("connection_class", None) is SSLConnection
        self._node_type = _SecureNodeConnection if secure else _NodeConnection
        self._plain_type = SSLConnection if secure else Connection
        super().__init__(connection_class=self._node_type, protocol=self._options["protocol"])
        self._seeds = nodes
        self._masters: dict[_Address, Redis] = {}
        self._by_slot: list[Redis | None] = [None] * _SLOTS
        self._stale = True
        self._share_query = SharedCall(self._query_and_apply)
        self._lent: dict[AbstractConnection, Redis] = {}
        self._drops: list[Callable[[Redis], Awaitable[None]]] = []

    async def master_of(self, key: str | bytes | None) -> Redis:
        """The client of the master that holds a key; without a key, of any master.

        Raises:
            RedisError: when no master holds the key's slot, or no node answers.
        """
        await self._refresh()
        if key is None:
            return next(iter(self._masters.values()))
        master = self._by_slot[slot_of(key)]
        if master is None:
            self._stale = True
            raise ClusterDownError("CLUSTERDOWN no master holds the slot")
        return master

    def known_master_of(self, key: str | bytes) -> Redis | None:
        """The client of the master that held a key at the last CLUSTER SLOTS, or None, without I/O."""
        return self._by_slot[slot_of(key)]

    async def masters(self) -> list[Redis]:
        """A client for each master."""
        await self._refresh()
        return list(self._masters.values())

    def on_master_removed(self, drop: Callable[[Redis], Awaitable[None]]) -> None:
        """Call `drop` later with the client of each server that is no longer a master."""
        self._drops.append(drop)

    async def get_connection(self, *_: Any, **__: Any) -> AbstractConnection:  # noqa: ANN401 - as redis-py has it
        """A connection to any master, for pub/sub: a cluster passes messages to every node."""
        master = await self.master_of(None)
        connection: AbstractConnection = await master.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        self._lent[connection] = master
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        """Take back a connection from `get_connection`."""
        await self._lent.pop(connection).connection_pool.release(connection)

    async def disconnect(self, inuse_connections: bool = True) -> None:  # noqa: FBT001, FBT002 - as redis-py has it
        """Close the connections to every master. They are opened again when they are needed."""
        self.forget()
        for master in list(self._masters.values()):
            await master.connection_pool.disconnect(inuse_connections)

    def forget(self) -> None:
        """Query CLUSTER SLOTS again before the next command, because the cluster may have changed."""
        self._stale = True

    async def _refresh(self) -> None:
        if self._stale:
            await self._share_query()

    async def _query_and_apply(self) -> None:
        await self._apply(await self._query_slots())

    async def _query_slots(self) -> dict[range, _Address]:
        """The master of each range of slots, from the first node that answers CLUSTER SLOTS.

        Raises:
            RedisError: the last node's error, when none answers.
        """
        error: Exception = RedisConnectionError("the cluster has no nodes")
        known = list(self._masters)
        random.shuffle(known)  # a node that is cut off from the others must not be the first each time
        limits = {"socket_timeout": _SLOTS_TIMEOUT, "socket_connect_timeout": _SLOTS_TIMEOUT}
        for host, port in dict.fromkeys([*known, *self._seeds]):
            options = self._options | limits
            pool = BlockingConnectionPool(connection_class=self._plain_type, **options, host=host, port=port)
            self._stale = False  # before the query, since a change during the query makes the slots stale again
            try:
                async with Redis.from_pool(pool) as node:
                    reply = await node.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
            except (RedisError, OSError) as problem:
                self._stale, error = True, problem
                continue
            # A node that does not know its own address omits it.
            return {range(first, last + 1): ((at[0] or b"").decode() or host, at[1]) for first, last, at, *_ in reply}
        raise error

    async def _apply(self, slots: dict[range, _Address]) -> None:
        """Create clients for new masters, and drop those of former ones."""
        removed = {address: self._masters.pop(address) for address in set(self._masters) - set(slots.values())}
        for address in slots.values():
            if address not in self._masters:
                self._masters[address] = self._client(*address)
        self._by_slot = [None] * _SLOTS
        for numbers, address in slots.items():
            for number in numbers:
                self._by_slot[number] = self._masters[address]
        for former in removed.values():
            await former.connection_pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
            await former.connection_pool.disconnect(inuse_connections=False)
            for drop in self._drops:
                await drop(former)
        if not slots:
            self._stale = True
            raise ClusterDownError("CLUSTERDOWN no master holds a slot")

    def _client(self, host: str, port: int) -> Redis:
        pool = BlockingConnectionPool(
            connection_class=self._node_type, **self._options, host=host, port=port, forget=self.forget
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
        if self.is_transaction or not stack:  # Redis refuses a transaction with keys of several slots
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
                outcome = [outcome] * len(places)  # noqa: PLW2901 - the other masters have replied
            for place, reply in zip(places, outcome, strict=True):
                replies[place] = reply
        if raise_on_error:
            self.raise_first_error(stack, replies)
        return replies


class _NodeConnection(Connection):
    """Calls `forget` if an error may come from a change in the cluster."""

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
        except AskError as error:  # includes MovedError
            self._forget()
            raise TryAgainError(f"the slot is on another master, or about to move there: {error}") from None
        except (ClusterDownError, RedisConnectionError, RedisTimeoutError):
            self._forget()
            raise


class _SecureNodeConnection(_NodeConnection, SSLConnection):
    pass


async def servers_of(redis: Redis) -> list[Redis]:
    """A client for each server that accepts writes: the masters of a cluster, or the only server."""
    return await redis.masters() if isinstance(redis, ClusterClient) else [redis]


async def server_of(redis: Redis, key: str) -> Redis:
    """The client of the server that holds a key.

    Raises:
        RedisError: when no master holds its slot, or no node of the cluster answers.
    """
    return await redis.connection_pool.master_of(key) if isinstance(redis, ClusterClient) else redis


def on_master_removed(redis: Redis, drop: Callable[[Redis], Awaitable[None]]) -> None:
    """Call `drop` later with the client of each server that is no longer a master of the cluster."""
    if isinstance(redis, ClusterClient):
        redis.connection_pool.on_master_removed(drop)


def forget_masters(redis: Redis) -> None:
    """Query the masters again before the next command: a server's error or silence may come from a change."""
    if isinstance(redis, ClusterClient):
        redis.connection_pool.forget()


def slot_of(key: str | bytes) -> int:
    """The slot of a key, computed from the part in braces if it has one."""
    return key_slot(key.encode() if isinstance(key, str) else key)


def _key_of(args: tuple[Any, ...]) -> str | bytes | None:
    """The first key of a command. For PUBLISH it is the channel, which has the same braces and master as its log."""
    if args[0] in ("XREAD", "XREADGROUP"):
        args = args[args.index(b"STREAMS") :]
    elif args[0] in ("EVAL", "EVALSHA"):
        args = args[2:]  # the script comes first, then the number of keys
    key = args[1] if len(args) > 1 else None
    return key if isinstance(key, str | bytes) else None

"""The publisher in a cluster: one for each master, so that a master that is away holds up the logs of its slots alone.

A log goes to the publisher of the master that holds its slot. After each trouble of a publisher the cluster is asked
again, and logs whose slots are elsewhere by now move there; their ends are read before more is written.
"""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias

from redis.asyncio import Redis
from redis.exceptions import ClusterDownError, RedisError

from ..contract.entries import Fields
from ..redisio.clients import command_client
from ..redisio.cluster import ClusterClient, on_master_removed
from ..redisio.retry import Backoff
from ..telemetry.events import Telemetry
from .log_writer import AppendBatch, LogWriter
from .publisher import Publisher


class ClusterPublisher:
    """See `Publisher`, whose methods these are."""

    is_full = False

    def __init__(self, cluster: ClusterClient, telemetry: Telemetry) -> None:
        self._cluster = cluster
        self._telemetry = telemetry
        self._parts: dict[Redis, _Part] = {}
        self._homes: dict[LogWriter, _Part] = {}
        self._homeless: set[LogWriter] = set()
        self._group: asyncio.TaskGroup | None = None
        self._leaving = False
        self._work = asyncio.Event()
        on_master_removed(cluster, self._drop)

    @property
    def has_shards(self) -> bool:
        """Whether the feed goes to sharded channels: where every master knows them."""
        return all(part.knows_shards for part in self._parts.values())

    def attach(self, log: LogWriter) -> None:
        """See `Publisher.attach`."""
        part = self._part_of(log.key)
        if part is None:
            self._homeless.add(log)
            self._work.set()
        else:
            self._homes[log] = part
            part.attach(log)

    def detach(self, log: LogWriter) -> None:
        """See `Publisher.detach`."""
        self._homeless.discard(log)
        part = self._homes.pop(log, None)
        if part is not None:
            part.detach(log)

    def enqueue(self, run: AppendBatch) -> None:
        """Of a log without a home: it keeps this itself until it has one."""

    def dequeue(self, log: LogWriter) -> None:
        """Likewise there is nothing to drop."""

    def release_bytes(self, size: int) -> None:
        """Likewise nothing was counted."""

    def publish(self, channel: str, entries: Iterable[tuple[str, Fields]]) -> None:
        """See `Publisher.publish`."""
        part = self._part_of(channel)
        if part is not None:
            part.publish(channel, entries)

    def verify_all(self) -> None:
        """See `Publisher.verify_all`."""
        for part in self._parts.values():
            part.verify_all()

    def verify_idle(self) -> None:
        """See `Publisher.verify_idle`."""
        for part in self._parts.values():
            part.verify_idle()

    def verify(self, request_id: str) -> None:
        """See `Publisher.verify`."""
        for part in self._parts.values():
            part.verify(request_id)

    def stop(self) -> None:
        """See `Publisher.stop`."""
        self._leaving = True
        self._work.set()

    async def run(self) -> None:
        """See `Publisher.run`."""
        backoff = Backoff("cluster_unknown", self._telemetry)
        async with asyncio.TaskGroup() as self._group:
            for part in self._parts.values():
                self._group.create_task(part.run())
            while not self._leaving:
                try:
                    for server in await self._cluster.masters():
                        self._part_at(server)
                    self._find_homes()
                except (RedisError, OSError) as error:
                    await backoff.wait(error)
                    continue
                backoff.reset()
                await self._work.wait()
                self._work.clear()
            for part in self._parts.values():
                part.stop()

    async def aclose(self) -> None:
        """See `Publisher.aclose`."""
        for part in self._parts.values():
            await part.aclose()
        await self._cluster.aclose()

    async def rehome(self, part: "_Part") -> None:
        """Move the logs whose slots a publisher's server does not hold any more; nothing of them is in flight."""
        self._cluster.connection_pool.forget()
        with suppress(RedisError, OSError):
            await self._cluster.masters()
        for log in part.logs:
            home = self._part_of(log.key)
            if home is not None and home is not part:
                part.disown(log)
                self._homes[log] = home
                home.adopt(log)

    def _find_homes(self) -> None:
        for log in list(self._homeless):
            part = self._part_of(log.key)
            if part is None:
                self._cluster.connection_pool.forget()
                raise ClusterDownError("CLUSTERDOWN no master holds the slot")
            self._homeless.discard(log)
            self._homes[log] = part
            part.adopt(log)

    def _part_of(self, key: str) -> "_Part | None":
        server = self._cluster.connection_pool.known_master_of(key)
        return None if server is None else self._part_at(server)

    def _part_at(self, server: Redis) -> "_Part":
        part = self._parts.get(server)
        if part is None:
            part = self._parts[server] = _Part(self, server, self._telemetry)
            if self._group is not None:
                self._group.create_task(part.run())
            if self._leaving:
                part.stop()
        return part

    async def _drop(self, server: Redis) -> None:
        part = self._parts.pop(server, None)
        if part is not None:
            part.retire()


class _Part(Publisher):
    """The publisher of one master."""

    def __init__(self, whole: ClusterPublisher, server: Redis, telemetry: Telemetry) -> None:
        super().__init__(server, telemetry, in_cluster=True)
        self._whole = whole
        self._is_retired = False

    @property
    def has_shards(self) -> bool:
        """See `ClusterPublisher.has_shards`."""
        return self._whole.has_shards

    @property
    def knows_shards(self) -> bool:
        """Whether its own master knows sharded channels."""
        return self._wires.has_sharded_channels

    def retire(self) -> None:
        """Its server is no master any more: come to an end once all logs are elsewhere."""
        self._is_retired = True
        self.verify_all()

    async def run(self) -> None:
        """See `Publisher.run`."""
        await super().run()
        if self._is_retired:
            await self.aclose()

    async def _look_at_logs(self) -> None:
        if self._is_retired:
            await self._whole.rehome(self)
            if not self.logs:
                self._look, self._asked, self._leaving = False, set(), True
                self._feed.pending.clear()
                return
        await super()._look_at_logs()

    async def _recover(self, error: BaseException) -> None:
        await super()._recover(error)
        await self._whole.rehome(self)


AnyPublisher: TypeAlias = Publisher | ClusterPublisher


def open_publisher(url: str, telemetry: Telemetry) -> AnyPublisher:
    """The publisher for a URL of Redis; `run` connects it."""
    redis = command_client(url, connections=1)
    return ClusterPublisher(redis, telemetry) if isinstance(redis, ClusterClient) else Publisher(redis, telemetry)

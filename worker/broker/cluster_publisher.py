"""The publisher in a cluster: one for each master, so that a master that is down delays only the logs of its own slots.

The publisher of the master that holds a log's slot writes that log. After each error of a publisher the cluster is
queried again. Logs whose slots have moved go to the publishers of their new masters, which verify the logs' ends before
they write.
"""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias

from redis.asyncio import Redis
from redis.exceptions import ClusterDownError, RedisError

from ..contract.entries import Fields
from ..redisio.clients import COMMAND_TIMEOUT, command_client
from ..redisio.cluster import ClusterClient, on_master_removed
from ..redisio.retry import Backoff
from ..telemetry.events import Telemetry
from .log_writer import AppendBatch, LogWriter
from .publisher import Publisher


class ClusterPublisher:
    """The publishers of all masters. The methods are those of `Publisher`."""

    is_full = False

    def __init__(self, cluster: ClusterClient, telemetry: Telemetry) -> None:
        self._cluster = cluster
        self._telemetry = telemetry
        self._publishers: dict[Redis, _MasterPublisher] = {}
        self._assigned: dict[LogWriter, _MasterPublisher] = {}
        self._unassigned: set[LogWriter] = set()
        self._group: asyncio.TaskGroup | None = None
        self._is_stopping = False
        self._work = asyncio.Event()
        on_master_removed(cluster, self._retire)

    @property
    def has_shards(self) -> bool:
        """Whether the feed uses sharded channels. Every master must support them."""
        return all(publisher.supports_shards for publisher in self._publishers.values())

    def attach(self, log: LogWriter) -> None:
        """See `Publisher.attach`."""
        publisher = self._publisher_of(log.key)
        if publisher is None:
            self._unassigned.add(log)
            self._work.set()
        else:
            self._assigned[log] = publisher
            publisher.attach(log)

    def detach(self, log: LogWriter) -> None:
        """See `Publisher.detach`."""
        self._unassigned.discard(log)
        publisher = self._assigned.pop(log, None)
        if publisher is not None:
            publisher.detach(log)

    def enqueue(self, batch: AppendBatch) -> None:
        """Do nothing: a log without a publisher keeps its own entries until it has one."""

    def dequeue(self, log: LogWriter) -> None:
        """Do nothing, as nothing was enqueued."""

    def release_bytes(self, size: int) -> None:
        """Do nothing, as nothing was enqueued."""

    def publish(self, channel: str, entries: Iterable[tuple[str, Fields]]) -> None:
        """See `Publisher.publish`."""
        publisher = self._publisher_of(channel)
        if publisher is not None:
            publisher.publish(channel, entries)

    def verify_all(self) -> None:
        """See `Publisher.verify_all`."""
        for publisher in self._publishers.values():
            publisher.verify_all()

    def verify_idle(self) -> None:
        """See `Publisher.verify_idle`."""
        for publisher in self._publishers.values():
            publisher.verify_idle()

    def verify(self, request_id: str) -> None:
        """See `Publisher.verify`."""
        for publisher in self._publishers.values():
            publisher.verify(request_id)

    def stop(self) -> None:
        """See `Publisher.stop`."""
        self._is_stopping = True
        self._work.set()

    async def run(self) -> None:
        """See `Publisher.run`."""
        backoff = Backoff("cluster_unknown", self._telemetry)
        async with asyncio.TaskGroup() as self._group:
            for publisher in self._publishers.values():
                self._group.create_task(publisher.run())
            while not self._is_stopping:
                try:
                    for master in await self._cluster.masters():
                        self._publisher_at(master)
                    self._assign_all()
                except (RedisError, OSError) as error:
                    await backoff.wait(error)
                    continue
                backoff.reset()
                await self._work.wait()
                self._work.clear()
            for publisher in self._publishers.values():
                publisher.stop()

    async def aclose(self) -> None:
        """See `Publisher.aclose`."""
        for publisher in self._publishers.values():
            await publisher.aclose()
        await self._cluster.aclose()

    async def reassign(self, publisher: "_MasterPublisher") -> None:
        """Move the logs whose slots the publisher's master no longer holds. None of their entries is in flight."""
        self._cluster.connection_pool.forget()
        with suppress(RedisError, OSError):
            await self._cluster.masters()
        for log in publisher.logs:
            successor = self._publisher_of(log.key)
            if successor is not None and successor is not publisher:
                publisher.disown(log)
                self._assigned[log] = successor
                successor.adopt(log)

    def _assign_all(self) -> None:
        """Assign each log without a publisher to the publisher of its master.

        Raises:
            ClusterDownError: when a log's slot has no master.
        """
        for log in list(self._unassigned):
            publisher = self._publisher_of(log.key)
            if publisher is None:
                self._cluster.connection_pool.forget()
                raise ClusterDownError("CLUSTERDOWN no master holds the slot")
            self._unassigned.discard(log)
            self._assigned[log] = publisher
            publisher.adopt(log)

    def _publisher_of(self, key: str) -> "_MasterPublisher | None":
        master = self._cluster.connection_pool.known_master_of(key)
        return None if master is None else self._publisher_at(master)

    def _publisher_at(self, master: Redis) -> "_MasterPublisher":
        publisher = self._publishers.get(master)
        if publisher is None:
            publisher = self._publishers[master] = _MasterPublisher(self, master, self._telemetry)
            if self._group is not None:
                self._group.create_task(publisher.run())
            if self._is_stopping:
                publisher.stop()
        return publisher

    async def _retire(self, master: Redis) -> None:
        publisher = self._publishers.pop(master, None)
        if publisher is not None:
            publisher.retire()


class _MasterPublisher(Publisher):
    """The publisher of one master."""

    def __init__(self, cluster_publisher: ClusterPublisher, master: Redis, telemetry: Telemetry) -> None:
        super().__init__(master, telemetry, in_cluster=True)
        self._cluster_publisher = cluster_publisher
        self._is_retired = False

    @property
    def has_shards(self) -> bool:
        """See `ClusterPublisher.has_shards`."""
        return self._cluster_publisher.has_shards

    @property
    def supports_shards(self) -> bool:
        """Whether this master supports sharded channels."""
        return self._connections.has_sharded_channels

    def retire(self) -> None:
        """End once all logs are with other publishers, because the server is no longer a master."""
        self._is_retired = True
        self.verify_all()

    async def run(self) -> None:
        """See `Publisher.run`."""
        await super().run()
        if self._is_retired:
            await self.aclose()

    async def _verify_logs(self) -> None:
        if self._is_retired:
            await self._cluster_publisher.reassign(self)
            if not self.logs:
                self._must_verify_all, self._to_verify, self._is_stopping = False, set(), True
                self.feed.pending.clear()
                return
        await super()._verify_logs()

    async def _recover(self, error: BaseException) -> None:
        await super()._recover(error)
        await self._cluster_publisher.reassign(self)


AnyPublisher: TypeAlias = Publisher | ClusterPublisher


def open_publisher(url: str, telemetry: Telemetry, command_timeout: float = COMMAND_TIMEOUT) -> AnyPublisher:
    """The publisher for a URL of Redis. Its `run` connects it."""
    redis = command_client(url, connections=1, timeout=command_timeout)
    return ClusterPublisher(redis, telemetry) if isinstance(redis, ClusterClient) else Publisher(redis, telemetry)

"""The job streams: reading through the consumer group, leases, acknowledgement and trimming.

The lease of a job is the idle time of its entry in the group's pending list. Reading, claiming or renewing the entry
sets the idle time to zero. When it exceeds the length of a lease, any worker may take the job over
(`abandoned_jobs.py`).
"""

import math
import time
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.ids import EntryId
from ..contract.keys import GROUP, Keys
from ..redisio.batching import CommandBatcher
from ..redisio.cluster import servers_of
from ..redisio.errors import is_permission_denied
from ..redisio.pipelined import PipelinedConnection, pack
from ..telemetry.events import NO_TELEMETRY, ConsumerRemoved, GroupRecreated, StoppedLeasesEnded, Telemetry
from .consumers import HANDED_OVER, HANDED_OVER_IDLE, consumers_of, is_pseudo_consumer
from .group_progress import acknowledged_below
from .queue_depth import Depth, depth_of

_NO_LIMIT = 2**31

_REPORT_EVERY = 30.0
"""Seconds between two reports of a group that vanished."""

_RENEWAL_BATCH = 500
"""Leases in one XCLAIM. A command for each lease would cost the worker 30 us. A batch blocks Redis while it runs."""

_REMOVE = """
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local is = {}
  for n = 1, #consumer, 2 do is[consumer[n]] = consumer[n + 1] end
  if is.name == ARGV[2] and is.pending == 0 and is.idle >= tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  end
end
"""
"""Removes an idle consumer. Check and deletion are one step: a job that the consumer gets in between would be lost."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A job as the group delivered it. `queue` and `id` (of the stream's entry) identify it together.

    `redelivered` is true if another worker had the job before. `count` is how often the group has delivered the job: a
    claim increases the count, even if its reply was lost; a hand-over, parking or a renewal does not.

    `left_for` is how many seconds the job had no owner at its delivery, where that is known: since the former owner
    handed the job over (`handed_over` is true), or since it last renewed a lease that has expired.

    `tries` is how many tries at servers former owners made before they parked the job; None if it was not begun.
    """

    queue: str
    id: str
    fields: Mapping[bytes, bytes]
    redelivered: bool = False
    count: int = 1
    left_for: float | None = None
    handed_over: bool = False
    tries: int | None = None

    @property
    def enqueued(self) -> int:
        """When the job was added, in Unix ms by Redis's clock."""
        return int(self.id.partition("-")[0])


async def give_up(
    redis: Redis, keys: Keys, consumer: str, lease_ms: int, jobs: Sequence[tuple[Delivery, str, int]]
) -> list[bool | Exception]:
    """Move a worker's jobs to pseudo-consumers, without raising their delivery counts.

    Each job is given with its pseudo-consumer and its idle time there in ms. Returns for each whether the worker still
    had the job, or the error with which Redis refused. If the reply is lost, this may be repeated.
    """
    pipe = redis.pipeline(transaction=False)
    for job, _, _ in jobs:  # a repeated XCLAIM would take the job from a worker that has taken it meanwhile
        pipe.xpending_range(keys.jobs(job.queue), GROUP, job.id, job.id, 1, consumer)
    held = await pipe.execute(raise_on_error=False) if jobs else []
    for (job, pseudo_consumer, idle), pending in zip(jobs, held, strict=True):
        if pending and not isinstance(pending, Exception):
            least = max(0, pending[0]["time_since_delivered"] - lease_ms // 2)
            # The claim of the next owner adds one, which gives the count of this owner's delivery.
            count = job.count - 1
            pipe.xclaim(
                keys.jobs(job.queue), GROUP, pseudo_consumer, least, [job.id], idle=idle, retrycount=count, justid=True
            )
    replies = iter(await pipe.execute(raise_on_error=False))
    results = [pending if not pending or isinstance(pending, Exception) else next(replies) for pending in held]
    return [result if isinstance(result, Exception) else bool(result) for result in results]


class JobQueue:
    """One worker's access to the job streams. `consumer` is unique to the process; `lease` is in seconds.

    `blocking` is the client for reads that wait, `commands` the client for all other commands. `batcher` sends the
    acknowledgements. `connection_type` is the class of the connections that wait for new jobs.
    """

    def __init__(
        self, commands: Redis, blocking: Redis, keys: Keys, consumer: str, lease: float,
        telemetry: Telemetry = NO_TELEMETRY, batcher: CommandBatcher | None = None,
        connection_type: type[PipelinedConnection] = PipelinedConnection,
    ) -> None:  # fmt: skip
        self._commands = commands
        self._batcher = batcher or CommandBatcher(commands)
        self._blocking = blocking
        self._keys = keys
        self._consumer = consumer
        self._lease_ms = int(lease * 1000)
        self._connection_type = connection_type
        self._readers: dict[str, CommandBatcher] = {}
        """A connection for each queue, on which its reads wait: a tenth of the time of redis-py's command."""
        self._reported = float("-inf")
        self._telemetry = telemetry

    async def ensure_group(self, queue: str) -> None:
        """Create the stream and its group if they are missing. The group also gets jobs added before it."""
        try:
            await self._commands.xgroup_create(self._keys.jobs(queue), GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def read_new(self, queue: str, count: int, block_ms: int) -> list[Delivery]:
        """Read up to `count` new jobs, waiting up to `block_ms` for the first. Their leases begin with the call."""
        key = self._keys.jobs(queue).encode()
        limits = (b"COUNT", b"%d" % count, b"BLOCK", b"%d" % block_ms)
        command = pack(b"XREADGROUP", b"GROUP", GROUP.encode(), self._consumer.encode(), *limits, b"STREAMS", key, b">")
        if queue not in self._readers:
            self._readers[queue] = CommandBatcher(self._blocking, self._connection_type)
        try:
            (reply,) = await self._readers[queue].execute(self._keys.jobs(queue), command, 1)
        except ResponseError as error:
            if not await self._recreate_group(queue, error):
                raise
            return []
        if reply is None:
            return []
        ((_, messages),) = cast("list[tuple[bytes, list[tuple[bytes, list[bytes]]]]]", reply)
        return [
            Delivery(queue, job.decode(), dict(zip(fields[::2], fields[1::2], strict=True))) for job, fields in messages
        ]

    async def renew_leases(self, leases: Sequence[tuple[Delivery, float]]) -> list[bool | Exception]:
        """Renew leases, each given with the seconds since its last renewal.

        Returns for each whether this worker still has the job, or the error with which Redis refused.

        A worker that takes a job over resets its idle time. XCLAIM therefore gets a min-idle that the entry cannot
        have reached with another worker. With min-idle 0, a late renewal would steal the job back. Leases that were
        last renewed together are renewed in one command.
        """
        batches: dict[tuple[str, int], list[str]] = {}
        for delivery, age in leases:
            idle = max(0, int(age * 1000) - self._lease_ms // 2)
            batches.setdefault((delivery.queue, idle), []).append(delivery.id)
        pipe = self._commands.pipeline(transaction=False)
        parts = [
            (queue, idle, ids[first : first + _RENEWAL_BATCH])
            for (queue, idle), ids in batches.items()
            for first in range(0, len(ids), _RENEWAL_BATCH)
        ]
        for queue, idle, ids in parts:
            pipe.xclaim(self._keys.jobs(queue), GROUP, self._consumer, idle, ids, justid=True)  # type: ignore[arg-type]  # list is invariant
        results: dict[tuple[str, str], bool | Exception] = {}
        for (queue, _, ids), reply in zip(parts, await pipe.execute(raise_on_error=False), strict=True):
            kept = reply if isinstance(reply, Exception) else set(reply)
            results |= {(queue, job): kept if isinstance(kept, Exception) else job.encode() in kept for job in ids}
        return [results[delivery.queue, delivery.id] for delivery, _ in leases]

    async def hand_over(self, deliveries: Sequence[Delivery]) -> list[bool | Exception]:
        """Let other workers take over running jobs at once, without raising their delivery counts.

        The results are those of `renew_leases`.
        """
        jobs = [(delivery, HANDED_OVER, HANDED_OVER_IDLE) for delivery in deliveries]
        return await give_up(self._commands, self._keys, self._consumer, self._lease_ms, jobs)

    async def publish_hand_over(self) -> None:
        """Let other workers search for jobs that were handed over. Without this hint they do so within half a second.

        Raises:
            RedisError: when Redis does not answer, or refuses the hint.
        """
        await self._commands.publish(self._keys.control, HANDED_OVER)

    async def idle_times(self, deliveries: Sequence[Delivery]) -> list[float | None]:
        """For each job the seconds for which its entry has been idle with this worker; None if it is not with it."""
        pipe = self._commands.pipeline(transaction=False)
        for delivery in deliveries:
            pipe.xpending_range(self._keys.jobs(delivery.queue), GROUP, delivery.id, delivery.id, 1, self._consumer)
        replies = await pipe.execute(raise_on_error=False) if deliveries else []
        for reply in replies:
            if isinstance(reply, Exception) and not str(reply).startswith("NOGROUP"):
                raise reply
        return [
            None if isinstance(reply, Exception) or not reply else reply[0]["time_since_delivered"] / 1000
            for reply in replies
        ]

    async def is_held(self, delivery: Delivery) -> bool:
        """Whether this job is still pending with this worker."""
        return bool(await self._pending(delivery.queue, delivery.id, self._consumer))

    async def is_outstanding(self, queue: str, job: str) -> bool:
        """Whether a job is not done yet: pending with any worker, or not read by any."""
        if await self._pending(queue, job):
            return True
        key = self._keys.jobs(queue)
        if not await self._commands.exists(key):
            return False
        unread = [
            group for group in await self._groups(key) if EntryId.parse(group["last-delivered-id"]) < EntryId.parse(job)
        ]
        return bool(unread and await self._commands.xrange(key, job, job))

    async def acknowledge(self, delivery: Delivery) -> None:
        """Remove a finished job from the group's pending list."""
        key = self._keys.jobs(delivery.queue)
        await self._batcher.execute(key, pack(b"XACK", key.encode(), GROUP.encode(), delivery.id.encode()), 1)

    async def trim(self, queue: str) -> None:
        """Remove the jobs that are done from the stream, never a pending or unread job.

        XDEL is never used: it hides the lag that autoscalers read.
        """
        key = self._keys.jobs(queue)
        for group in await self._groups(key):
            below = await acknowledged_below(self._commands, key, group)
            await self._commands.xtrim(key, minid=str(below), approximate=False)

    async def probe_writable(self) -> None:
        """Check that Redis accepts writes, without writing: XREADGROUP works even when it does not.

        If somebody has created a stream at the key of the probe, the stream is kept at one entry.

        Raises:
            RedisError: the error that Redis returns for a write, such as an OutOfMemoryError.
        """
        await self._commands.xadd(self._keys.probe, {"type": "probe"}, nomkstream=True, maxlen=1, approximate=False)

    async def memory(self) -> tuple[float, float]:
        """The used memory and the maxmemory of Redis in bytes: in a cluster, of the master that is the fullest.

        Without the right to INFO both are NaN.
        """
        measured = []
        for server in await servers_of(self._commands):
            try:
                info = await server.info("memory")
            except ResponseError as error:
                if not is_permission_denied(error):
                    raise
                return math.nan, math.nan
            measured.append((float(info["used_memory"]), float(info.get("maxmemory", 0))))
        return max(measured, key=lambda memory: memory[0] / (memory[1] or math.inf))

    async def depth(self, queue: str) -> Depth:
        """The number of waiting jobs and the time of the oldest pending job."""
        return await depth_of(self._commands, self._keys.jobs(queue))

    async def remove_stale_consumers(self, queue: str, alive: Collection[str], idle: float) -> None:
        """Remove consumers that are not in `alive`, have nothing pending, and were idle for at least `idle` seconds."""
        key = self._keys.jobs(queue)
        for consumer in await self._commands.xinfo_consumers(key, GROUP):
            name = consumer["name"].decode("utf-8", "replace")
            if name not in alive and not consumer["pending"] and consumer["idle"] >= idle * 1000:
                await cast("Awaitable[object]", self._commands.eval(
                    _REMOVE, 1, key, GROUP, consumer["name"], str(int(idle * 1000))
                ))  # fmt: skip
                if not is_pseudo_consumer(name):
                    self._telemetry.emit(ConsumerRemoved(queue, name))

    async def busy_consumers(self, queue: str) -> list[str]:
        """The names of all workers that have pending jobs."""
        consumers = await consumers_of(self._commands, self._keys.jobs(queue))
        return [consumer.name for consumer in consumers if not is_pseudo_consumer(consumer.name)]

    async def jobs_without_idle_time(self, queue: str, consumer: str) -> set[str]:
        """The pending jobs of a consumer for which Redis reports no idle time."""
        pending = await self._commands.xpending_range(self._keys.jobs(queue), GROUP, "-", "+", _NO_LIMIT, consumer)
        return {cast("bytes", one["message_id"]).decode() for one in pending if not one["time_since_delivered"]}

    async def end_leases(self, queue: str, consumer: str, ids: Collection[str]) -> None:
        """End the leases of a consumer's jobs: hand them over, so that any worker takes them."""
        key = self._keys.jobs(queue)
        await self._commands.xclaim(key, GROUP, HANDED_OVER, 0, sorted(ids), idle=HANDED_OVER_IDLE, justid=True)  # type: ignore[arg-type]  # list is invariant
        self._telemetry.emit(StoppedLeasesEnded(queue, consumer, len(ids)))

    async def remove_consumer(self, queues: Iterable[str]) -> None:
        """Remove this consumer from the queues where it has no pending jobs. Pending jobs would be lost with it."""
        for queue in queues:
            key = self._keys.jobs(queue)
            for consumer in await self._commands.xinfo_consumers(key, GROUP):
                if consumer["name"] == self._consumer.encode() and not consumer["pending"]:
                    await self._commands.xgroup_delconsumer(key, GROUP, self._consumer)

    async def _pending(self, queue: str, job: str, consumer: str | None = None) -> list[dict[str, Any]]:
        """The group's record of a job that was read and not acknowledged; empty if there is no record or no group."""
        try:
            return await self._commands.xpending_range(self._keys.jobs(queue), GROUP, job, job, 1, consumer)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return []

    async def _groups(self, key: str) -> list[dict[str, bytes]]:
        groups = await self._commands.xinfo_groups(key)
        return [group for group in groups if group["name"] == GROUP.encode()]

    async def _recreate_group(self, queue: str, error: ResponseError) -> bool:
        """Recreate a group that vanished (FLUSHALL, a failover). Returns false if the error has another reason."""
        if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
            return False
        if time.monotonic() - self._reported > _REPORT_EVERY:
            self._reported = time.monotonic()
            self._telemetry.emit(GroupRecreated(queue))
        await self.ensure_group(queue)
        return True

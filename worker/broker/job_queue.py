"""The job streams: reading through the consumer group, leases, acknowledgement and trimming.

A lease is the idle time of the entry in the group's pending list. Whoever reads, claims or renews an entry sets it to
zero; whoever finds it longer than a lease may take the entry over.
"""

import time
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.ids import EntryId
from ..contract.keys import GROUP, Keys
from ..telemetry.events import NO_TELEMETRY, ConsumerRemoved, GroupMadeAgain, StoppedLeasesEnded, Telemetry
from .queue_depth import Depth, depth_of

_LOOKS = 64
"""Redis passes over ten live entries for each that is asked for: with one free slot, one look a second is too few."""

_NO_LIMIT = 2**31

_REPORT_EVERY = 30.0
"""Seconds between two reports of a group that vanished."""

_RENEWED_AT_ONCE = 500
"""Leases in one XCLAIM: one for each costs 30 us here, and Redis does nothing else while it goes through them."""

_REMOVE = """
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local is = {}
  for n = 1, #consumer, 2 do is[consumer[n]] = consumer[n + 1] end
  if is.name == ARGV[2] and is.pending == 0 and is.idle >= tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
  end
end
"""
"""Look and delete in one step. A WATCH does not do: on 6.2 and 7.0 XREADGROUP and XCLAIM do not touch the key for it,
and what the consumer is given between the look and the deletion would be pending with nobody, and lost."""

_Message: TypeAlias = tuple[bytes | None, dict[bytes, bytes] | None]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A job as the group handed it over. `queue` and `id` (of the stream's entry) name it together.

    `again` says that another worker had it before, `count` how often the group has delivered it: a hand-over and a
    renewal do not raise this, the lost reply of an XAUTOCLAIM does.
    """

    queue: str
    id: str
    fields: Mapping[bytes, bytes]
    again: bool = False
    count: int = 1

    @property
    def enqueued(self) -> int:
        """When the job was added, in Unix ms by Redis's clock."""
        return _added(self.id)


class JobQueue:
    """One worker's view of the job streams. `consumer` is unique to the process; `lease` is in seconds."""

    def __init__(
        self, commands: Redis, blocking: Redis, keys: Keys, consumer: str, lease: float,
        telemetry: Telemetry = NO_TELEMETRY,
    ) -> None:  # fmt: skip
        self._commands = commands
        self._blocking = blocking
        self._keys = keys
        self._consumer = consumer
        self._lease_ms = int(lease * 1000)
        self._cursors: dict[str, str] = {}
        self._said = float("-inf")
        self._telemetry = telemetry

    async def ensure_group(self, queue: str) -> None:
        """Make the stream and its group where they are missing. From 0: jobs added before the group count too."""
        try:
            await self._commands.xgroup_create(self._keys.jobs(queue), GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def read_new(self, queue: str, count: int, block_ms: int) -> list[Delivery]:
        """Take up to `count` new jobs, waiting up to `block_ms` for the first. The lease counts from the call."""
        try:
            reply = await self._blocking.xreadgroup(
                GROUP, self._consumer, {self._keys.jobs(queue): ">"}, count=count, block=block_ms
            )
        except ResponseError as error:
            if not await self._mend_group(queue, error):
                raise
            return []
        streams = cast("list[tuple[bytes, list[_Message]]]", reply)
        return [delivery for _, messages in streams for delivery in _deliveries(queue, messages)]

    async def claim_expired(self, queue: str, count: int) -> list[Delivery]:
        """Take over up to `count` jobs whose lease has run out.

        Jobs that were removed from the stream while they were pending are passed over. Redis counts them in `count`.

        The cursor goes on where the last call stopped: from the start each time, a few live entries at the front
        would hide the expired ones behind them for ever.
        """
        key, looks, purged = self._keys.jobs(queue), 0, False
        deliveries: list[Delivery] = []
        while looks < _LOOKS:
            try:
                reply = await self._commands.xautoclaim(
                    key, GROUP, self._consumer, self._lease_ms, self._cursors.get(queue, "0-0"), count=count
                )
            except ResponseError as error:
                if not await self._mend_group(queue, error):
                    raise
                return []
            cursor, messages, *dropped = cast("tuple[bytes, list[_Message], list[bytes]]", reply)
            self._cursors[queue] = cursor.decode()
            deliveries = _deliveries(queue, messages, again=True)
            purged = purged or len(deliveries) < len(messages)
            if deliveries or cursor == b"0-0":
                break
            # A reply of purged jobs alone is progress: what follows may be a job. 7.0 lists these apart.
            looks += not (messages or any(dropped))
        if purged:
            await self._forget_deleted(queue)
        return await self._counted(deliveries)

    async def _counted(self, deliveries: list[Delivery]) -> list[Delivery]:
        pipe = self._commands.pipeline(transaction=False)
        for delivery in deliveries:
            pipe.xpending_range(self._keys.jobs(delivery.queue), GROUP, delivery.id, delivery.id, 1)
        replies = await pipe.execute() if deliveries else []
        return [
            replace(delivery, count=int(lines[0]["times_delivered"])) if lines else delivery
            for delivery, lines in zip(deliveries, replies, strict=True)
        ]

    async def renew_leases(self, leases: Sequence[tuple[Delivery, float]]) -> list[bool | Exception]:
        """Renew leases, each given with the seconds since its own last renewal.

        False where the job is ours no more, and Redis's error where it refused.

        XCLAIM only takes an entry that is idle for longer than a thief's can be: a thief has reset it since. With 0
        long after the last renewal it would steal the entry back. Those last renewed together are renewed together.
        """
        asked: dict[tuple[str, int], list[str]] = {}
        for delivery, age in leases:
            idle = max(0, int(age * 1000) - self._lease_ms // 2)
            asked.setdefault((delivery.queue, idle), []).append(delivery.id)
        pipe = self._commands.pipeline(transaction=False)
        parts = [
            (queue, idle, ids[first : first + _RENEWED_AT_ONCE])
            for (queue, idle), ids in asked.items()
            for first in range(0, len(ids), _RENEWED_AT_ONCE)
        ]
        for queue, idle, ids in parts:
            pipe.xclaim(self._keys.jobs(queue), GROUP, self._consumer, idle, ids, justid=True)  # type: ignore[arg-type]  # list is invariant
        said: dict[tuple[str, str], bool | Exception] = {}
        for (queue, _, ids), reply in zip(parts, await pipe.execute(raise_on_error=False), strict=True):
            kept = reply if isinstance(reply, Exception) else set(reply)
            said |= {(queue, job): kept if isinstance(kept, Exception) else job.encode() in kept for job in ids}
        return [said[delivery.queue, delivery.id] for delivery, _ in leases]

    async def hand_over(self, leases: Sequence[tuple[Delivery, float]]) -> list[bool | Exception]:
        """Let other workers take running jobs at once, without counting against them; each is given with its age.

        The age is the seconds since its own last renewal, and the replies are those of `renew`.
        """
        pipe = self._commands.pipeline(transaction=False)
        for delivery, _ in leases:  # XCLAIM would make an entry pending that nobody has
            pipe.xpending_range(self._keys.jobs(delivery.queue), GROUP, delivery.id, delivery.id, 1, self._consumer)
        held = await pipe.execute(raise_on_error=False)
        for (delivery, age), lines in zip(leases, held, strict=True):
            if not lines or isinstance(lines, Exception):
                continue
            pipe.xclaim(
                self._keys.jobs(delivery.queue),
                GROUP,
                self._consumer,
                max(0, int(age * 1000) - self._lease_ms // 2),
                [delivery.id],
                idle=2 * self._lease_ms,
                # The taker's XAUTOCLAIM adds one again, and so comes to the count of this owner's claim.
                retrycount=delivery.count - 1,
                justid=True,
            )
        replies = iter(await pipe.execute(raise_on_error=False))
        last = [lines if not lines or isinstance(lines, Exception) else next(replies) for lines in held]
        return [reply if isinstance(reply, Exception) else bool(reply) for reply in last]

    async def is_held(self, delivery: Delivery) -> bool:
        """Whether the group still counts this job as ours."""
        return bool(await self._pending(delivery.queue, delivery.id, self._consumer))

    async def is_outstanding(self, queue: str, job: str) -> bool:
        """Whether a job is still to be done: pending with some worker, or not read yet."""
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
        """The job is done with."""
        await self._commands.xack(self._keys.jobs(delivery.queue), GROUP, delivery.id)

    async def trim(self, queue: str) -> None:
        """Drop what every worker has done with, never what is pending or unread.

        Last delivered is read before the oldest pending: the other way round, a job that is delivered in between
        would be neither, and be trimmed. XDEL is never used: it hides the lag that autoscalers read.
        """
        key = self._keys.jobs(queue)
        for group in await self._groups(key):
            delivered = EntryId.parse(group["last-delivered-id"])
            oldest = (await self._commands.xpending(key, GROUP))["min"]
            below = min(delivered, EntryId.parse(oldest)) if oldest else delivered
            await self._commands.xtrim(key, minid=str(below), approximate=False)

    async def probe_writable(self) -> None:
        """Ask Redis whether it takes writes, and write nothing: XREADGROUP works while it does not.

        Where somebody made a stream of the key, it is kept at one entry.

        Raises:
            RedisError: what it would answer to a write, such as an OutOfMemoryError.
        """
        await self._commands.xadd(self._keys.probe, {"type": "probe"}, nomkstream=True, maxlen=1, approximate=False)

    async def depth(self, queue: str) -> Depth:
        """How many jobs wait, and how old the oldest is that a worker has."""
        return await depth_of(self._commands, self._keys.jobs(queue))

    async def remove_stale_consumers(self, queue: str, alive: Collection[str], idle: float) -> None:
        """Remove consumers that are not alive, have nothing pending, and did nothing for so many seconds."""
        key = self._keys.jobs(queue)
        for consumer in await self._commands.xinfo_consumers(key, GROUP):
            name = consumer["name"].decode("utf-8", "replace")
            if name not in alive and not consumer["pending"] and consumer["idle"] >= idle * 1000:
                await cast("Awaitable[object]", self._commands.eval(
                    _REMOVE, 1, key, GROUP, consumer["name"], str(int(idle * 1000))
                ))  # fmt: skip
                self._telemetry.emit(ConsumerRemoved(queue, name))

    async def busy_consumers(self, queue: str) -> list[str]:
        """The names of all consumers that have jobs pending."""
        consumers = await self._commands.xinfo_consumers(self._keys.jobs(queue), GROUP)
        return [consumer["name"].decode("utf-8", "replace") for consumer in consumers if consumer["pending"]]

    async def jobs_without_idle_time(self, queue: str, consumer: str) -> set[str]:
        """The jobs pending with a consumer for which Redis reports no idle time."""
        lines = await self._commands.xpending_range(self._keys.jobs(queue), GROUP, "-", "+", _NO_LIMIT, consumer)
        return {cast("bytes", line["message_id"]).decode() for line in lines if not line["time_since_delivered"]}

    async def end_leases(self, queue: str, consumer: str, ids: Collection[str]) -> None:
        """End the leases of a consumer's jobs, so that XAUTOCLAIM takes them."""
        key = self._keys.jobs(queue)
        await self._commands.xclaim(key, GROUP, consumer, 0, sorted(ids), idle=2 * self._lease_ms, justid=True)  # type: ignore[arg-type]  # list is invariant
        self._telemetry.emit(StoppedLeasesEnded(queue, consumer, len(ids)))

    async def remove_consumer(self, queues: Iterable[str]) -> None:
        """Remove this consumer where it has nothing pending; with pending entries they would be lost."""
        for queue in queues:
            key = self._keys.jobs(queue)
            for consumer in await self._commands.xinfo_consumers(key, GROUP):
                if consumer["name"] == self._consumer.encode() and not consumer["pending"]:
                    await self._commands.xgroup_delconsumer(key, GROUP, self._consumer)

    async def _forget_deleted(self, queue: str) -> None:
        """Acknowledge what is pending with us and not in the stream any more.

        7.0 does it by itself; 6.2 would hand it from worker to worker for ever, and it would hold the trimming back.
        """
        key = self._keys.jobs(queue)
        for line in await self._commands.xpending_range(key, GROUP, "-", "+", _NO_LIMIT, self._consumer):
            job = line["message_id"]
            if not await self._commands.xrange(key, job, job):
                await self._commands.xack(key, GROUP, job)

    async def _pending(self, queue: str, job: str, consumer: str | None = None) -> list[dict[str, Any]]:
        """The group's line of a job that was read and not acknowledged; of a group that is gone there is none."""
        try:
            return await self._commands.xpending_range(self._keys.jobs(queue), GROUP, job, job, 1, consumer)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return []

    async def _groups(self, key: str) -> list[dict[str, bytes]]:
        groups = await self._commands.xinfo_groups(key)
        return [group for group in groups if group["name"] == GROUP.encode()]

    async def _mend_group(self, queue: str, error: ResponseError) -> bool:
        """Make a group that vanished (FLUSHALL, a failover) again; whether that was the trouble."""
        if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
            return False
        if time.monotonic() - self._said > _REPORT_EVERY:
            self._said = time.monotonic()
            self._telemetry.emit(GroupMadeAgain(queue))
        await self.ensure_group(queue)
        return True


def _added(job: str | bytes) -> int:
    """When a job was added, in Unix ms: the first part of its entry's id."""
    return EntryId.parse(job).attempt


def _deliveries(queue: str, messages: Iterable[_Message], *, again: bool = False) -> list[Delivery]:
    """Entries that 6.2 gives as nil were trimmed while pending: there is nothing left to run."""
    return [Delivery(queue, entry_id.decode(), fields, again) for entry_id, fields in messages if entry_id and fields]

"""Measures a queue: its waiting jobs and their times, its oldest pending job, and whether a live worker serves it."""

from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from ..contract.ids import EntryId
from ..contract.keys import GROUP, Keys
from ..contract.records import WorkerRecord
from .consumers import consumers_by_xinfo, consumers_of, is_line

_DEAD_AFTER = 60.0
"""Seconds without a beat after which a worker counts as dead. A worker beats three times a lease, and few leases are
longer than three minutes."""


@dataclass(frozen=True, slots=True)
class Depth:
    """The depth of a queue.

    `waiting` is the number of jobs that no worker has read, and of parked jobs; None if Redis cannot count them.
    `oldest` is when the oldest other pending job was added, in Unix ms; None if there is none.
    """

    waiting: int | None
    oldest: int | None


@dataclass(frozen=True, slots=True)
class Backlog:
    """The waiting jobs of a queue: how many no worker has read (`unread`), and how many are `parked`.

    `first` and `last` are when the first and the last unread job were added, in Unix ms. They are 0 if none is unread.
    """

    unread: int = 0
    parked: int = 0
    first: int = 0
    last: int = 0


async def depth_of(redis: Redis, key: str) -> Depth:
    """The depth of the queue in a job stream.

    Raises:
        RedisError: when Redis returns an error, which includes a stream that does not exist.
    """
    group = _worker_group(await redis.xinfo_groups(key))
    if group is None:
        return Depth(None, None)
    unread = await _unread(redis, key, group, await redis.xlen(key))
    consumers = await consumers_of(redis, key)
    parked = sum(consumer.pending for consumer in consumers if is_line(consumer.name))
    if not parked:
        first = (await redis.xpending(key, GROUP))["min"]
        return Depth(unread, EntryId.parse(first).attempt if first else None)
    pipe = redis.pipeline(transaction=False)
    for consumer in consumers:
        if not is_line(consumer.name):
            pipe.xpending_range(key, GROUP, "-", "+", 1, consumer.name)
    firsts = [EntryId.parse(reply[0]["message_id"]) for reply in await pipe.execute() if reply]
    return Depth(None if unread is None else unread + parked, min(firsts).attempt if firsts else None)


async def waiting_in(redis: Redis, key: str) -> int:
    """The number of jobs of a stream that no worker has: jobs that none has read yet, and parked jobs.

    If Redis does not know the group's lag (before 7.0, and after an XDEL), the result is the stream's length without
    the pending jobs. That includes the jobs that are done and not yet trimmed.
    """
    pipe = redis.pipeline(transaction=False)
    pipe.exists(key)
    pipe.xlen(key)
    pipe.xinfo_groups(key)
    exists, length, groups = await pipe.execute(raise_on_error=False)
    if exists == 0:
        return 0
    for reply in (exists, length, groups):
        if isinstance(reply, Exception):
            raise reply
    group = _worker_group(groups)
    if group is None:
        return int(length)
    unread = await _unread(redis, key, group, int(length))
    if unread is None:
        unread = max(0, int(length) - int(group["pending"]))
    if not group["pending"]:
        return unread
    return unread + sum(consumer.pending for consumer in await consumers_by_xinfo(redis, key) if is_line(consumer.name))


async def backlog_of(redis: Redis, key: str) -> Backlog:
    """The backlog of the queue in a job stream; an empty one if there is no stream.

    Where Redis does not know the group's lag, `unread` is as approximate as in `waiting_in`.

    Raises:
        RedisError: when Redis returns an error.
    """
    if not await redis.exists(key):
        return Backlog()
    pipe = redis.pipeline(transaction=False)
    pipe.xlen(key)
    pipe.xinfo_groups(key)
    pipe.xrevrange(key, count=1)
    length, groups, newest = await pipe.execute()
    group = _worker_group(groups)
    start = f"({group['last-delivered-id'].decode()}" if group else "-"
    oldest = await redis.xrange(key, min=start, count=1)
    parked = 0
    if group and group["pending"]:
        parked = sum(consumer.pending for consumer in await consumers_by_xinfo(redis, key) if is_line(consumer.name))
    if not oldest or not newest:
        return Backlog(parked=parked)
    lag = group.get("lag") if group else length
    unread = int(length) - int(group["pending"]) if lag is None and group else min(int(lag or 1), int(length))
    first, last = (EntryId.parse(cast("bytes", entries[0][0])).attempt for entries in (oldest, newest))
    return Backlog(max(1, unread), parked, first, max(first, last))


def jobs_before(added: int, backlog: Backlog) -> int:
    """Estimate how many waiting jobs are before the one that was added at a time, in Unix ms.

    A job that is older than every unread one is parked, or is about to start. Any of the parked jobs may be before it.
    """
    if not backlog.unread or added < backlog.first:
        return max(0, backlog.parked - 1)
    span = backlog.last - backlog.first
    share = min(1.0, (added - backlog.first) / span) if span else 1.0
    return backlog.parked + round((backlog.unread - 1) * share)


async def is_served(redis: Redis, keys: Keys, queue: str) -> bool:
    """Whether a live worker serves a queue. A worker without a list of queues in its record counts as one.

    Raises:
        RedisError: when Redis returns an error.
    """
    records = await live_records(redis, keys)
    return any(not record.queues or queue in record.queues for record in records)


async def live_records(redis: Redis, keys: Keys) -> list[WorkerRecord]:
    """The records of the workers that live, by Redis's clock.

    Raises:
        RedisError: when Redis returns an error.
    """
    seconds, _ = await redis.time()
    records = map(WorkerRecord.read, cast("dict[bytes, bytes]", await redis.hgetall(keys.workers)).values())
    return [record for record in records if record and abs(seconds - record.beat / 1000) < _DEAD_AFTER]


async def _unread(redis: Redis, key: str, group: dict[str, Any], length: int) -> int | None:
    """The number of entries after the last one that the group delivered; None if Redis cannot count them.

    Redis 7.0 still counts unread jobs that were trimmed, so its lag may be too high, and stay above 0 forever.
    """
    lag = group.get("lag")
    if lag == 0:
        return 0
    last = group["last-delivered-id"].decode()
    if not await redis.xrange(key, min=f"({last}", count=1):
        return 0
    return None if lag is None else min(int(lag), length)


def _worker_group(groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((group for group in groups if group["name"] == GROUP.encode()), None)

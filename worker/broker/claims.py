"""Claims of pending jobs: lists the jobs of a consumer that have been idle for long enough, and takes them from it.

Listing and claiming are two commands. A claim is a compare-and-set: it takes only the jobs whose idle time is still at
least the minimum, so of several workers that have listed a job one gets it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.keys import GROUP
from .job_queue import Delivery

_Message: TypeAlias = tuple[bytes | None, dict[bytes, bytes] | None]


@dataclass(frozen=True, slots=True)
class PendingJob:
    """A job in the group's pending list: the id of its entry, its idle time in ms, and its number of deliveries."""

    id: str
    idle: int
    deliveries: int


async def list_pending(redis: Redis, key: str, consumer: str, *, idle: int, count: int) -> list[PendingJob]:
    """Up to `count` pending jobs of a consumer that have been idle for at least `idle` ms, the oldest first."""
    try:
        replies = await redis.xpending_range(key, GROUP, "-", "+", count, consumer, idle=idle)
    except ResponseError as error:
        if not str(error).startswith("NOGROUP"):
            raise
        return []
    return [
        PendingJob(reply["message_id"].decode(), int(reply["time_since_delivered"]), int(reply["times_delivered"]))
        for reply in cast("list[dict[str, Any]]", replies)
    ]


async def claim(
    redis: Redis, key: str, queue: str, consumer: str, jobs: Sequence[PendingJob], *, idle: int
) -> list[tuple[Delivery, PendingJob]]:
    """Claim listed jobs that have still been idle for at least `idle` ms. Their leases begin with the call.

    Returns the jobs that this consumer has now, each with what was listed of it. Jobs that were removed from the stream
    while pending are acknowledged: Redis 7.0 drops them, but on 6.2 they would stay pending forever.
    """
    if not jobs:
        return []
    try:
        reply = await redis.xclaim(key, GROUP, consumer, idle, cast("Any", [job.id for job in jobs]))
    except ResponseError as error:
        if not str(error).startswith("NOGROUP"):
            raise
        return []
    messages = cast("list[_Message]", reply)
    listed = {job.id: job for job in jobs}
    claimed = [
        (Delivery(queue, entry.decode(), fields, redelivered=True, count=listed[entry.decode()].deliveries + 1),
         listed[entry.decode()])
        for entry, fields in messages if entry and fields
    ]  # fmt: skip
    if len(claimed) < len(messages):
        await _acknowledge_removed(redis, key, consumer, listed.keys() - {delivery.id for delivery, _ in claimed})
    return claimed


async def _acknowledge_removed(redis: Redis, key: str, consumer: str, ids: Collection[str]) -> None:
    """Acknowledge those of the given pending jobs of a consumer that are no longer in the stream."""
    pipe = redis.pipeline(transaction=False)
    for job in ids:
        pipe.xpending_range(key, GROUP, job, job, 1, consumer)
        pipe.xrange(key, job, job)
    replies = await pipe.execute()
    removed = [job for job, held, found in zip(ids, replies[::2], replies[1::2], strict=True) if held and not found]
    if removed:
        await redis.xack(key, GROUP, *removed)

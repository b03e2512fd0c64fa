"""Records of the lifecycle, and consumers that leave them behind."""

from typing import Any, cast

from redis.asyncio import Redis

from worker.broker.lifecycle import LifecycleWriter
from worker.contract.keys import Keys
from worker.contract.records import Lifecycle
from worker.redisio.batching import CommandBatcher

KEY = Keys().lifecycle
LOSSES = Keys().lifecycle_losses
MIB = 1024 * 1024


async def write_records(redis: Redis, number: int, *kinds: str, first: int = 0) -> list[str]:
    """Write records of requests, `finished` by default; returns the ids of the requests."""
    batcher = CommandBatcher(redis)
    writer = LifecycleWriter(batcher, Keys())
    ids = [f"request-{n}" for n in range(first, first + number)]
    written = [
        writer.write(Lifecycle(type=kind, id=one, job="5-0", queue="default", attempt=1, time=9, worker="w"))
        for one in ids
        for kind in kinds or ("finished",)
    ]
    await written[-1]
    await batcher.aclose()
    return ids


async def pending(redis: Redis, group: str) -> int:
    """How many records the group has read and not acknowledged."""
    return int(cast("Any", await redis.xpending(KEY, group))["pending"])


async def abandon(redis: Redis, group: str) -> None:
    """Make the pending records of a group as old as after half a minute."""
    for entry in cast("list[dict[str, Any]]", await redis.xpending_range(KEY, group, "-", "+", 1000)):
        await redis.xclaim(KEY, group, entry["consumer"], 0, [entry["message_id"]], idle=31_000, justid=True)

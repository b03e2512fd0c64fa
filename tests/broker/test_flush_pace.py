"""The pace of a busy publisher: it pauses between flushes, never longer than its interval. Others do not pause."""

import math

from processes import delta, process
from redis.asyncio import Redis

from worker.broker.flush_pace import FlushPace


async def pauses_of(redis_url: str, redis: Redis, busy_rate: float) -> list[float]:
    """The pauses, in seconds, while a log is written by a publisher that is busy from so many entries a second on."""
    pauses: list[float] = []
    async with process(redis_url, "one", pace=FlushPace(busy_rate=busy_rate, sleep=pauses.append)) as one:
        await one.jobs.ensure_group("default")
        await redis.xadd("chat:jobs", {"id": "r"})
        log = await one.acquire(await one.claim())
        for n in range(100):
            log.append(delta(str(n)))
            await log.wait_drained()
        assert await redis.xlen(log.key) == 101
    return pauses


async def test_a_busy_publisher_pauses_for_at_most_its_interval(redis_url: str, redis: Redis) -> None:
    pauses = await pauses_of(redis_url, redis, 0)
    assert pauses
    assert all(0 < pause <= FlushPace().interval for pause in pauses)


async def test_a_publisher_that_is_not_busy_does_not_pause(redis_url: str, redis: Redis) -> None:
    assert await pauses_of(redis_url, redis, math.inf) == []

"""The beat of a busy publisher: between flushes it rests for no longer than that, and without need not at all."""

import math
import time
from types import SimpleNamespace

import pytest
from processes import Process, delta
from redis.asyncio import Redis

from worker.broker import publisher


async def rests_of(one: Process, redis: Redis, busy: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it sleeps each time, while a log is written that is busy from so many entries a second on."""
    rests: list[float] = []
    monkeypatch.setattr(publisher, "time", SimpleNamespace(monotonic=time.monotonic, sleep=rests.append))
    monkeypatch.setattr(publisher, "_BUSY", busy)
    await redis.xadd("chat:jobs", {"id": "r"})
    log = await one.acquire(await one.claim())
    for n in range(100):
        log.append(delta(str(n)))
        await log.wait_drained()
    assert await redis.xlen(log.key) == 101
    return rests


async def test_a_busy_publisher_rests_until_its_next_beat(
    one: Process, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests = await rests_of(one, redis, 0, monkeypatch)
    assert rests
    assert all(0 < rest <= publisher._BEAT for rest in rests)


async def test_one_that_is_not_busy_does_not_rest(one: Process, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await rests_of(one, redis, math.inf, monkeypatch) == []

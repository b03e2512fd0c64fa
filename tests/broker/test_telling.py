"""What the publisher tells the feed: everything that is accepted, as long as somebody listens."""

import json
import math

import pytest
from conftest import eventually
from processes import Process, delta
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from worker.broker.job_queue import Delivery
from worker.broker.log_writer import LogWriter


@pytest.fixture
async def log(one: Process, redis: Redis) -> LogWriter:
    await redis.xadd("chat:jobs", {"id": "r"})
    delivery: Delivery = await one.claim()
    return await one.acquire(delivery)


async def heard(feed: PubSub, upto: str) -> list[str]:
    """The ids that the feed tells, up to this one."""
    ids: list[str] = []
    async for message in feed.listen():
        if message["type"] == "message":
            ids += [entry_id for entry_id, _ in json.loads(message["data"])]
        if upto in ids:
            break
    return ids


async def told(redis: Redis) -> int:
    """How often Redis was asked to publish."""
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_publish", {"calls": 0})["calls"])


async def test_a_listener_hears_every_entry_also_the_last_before_a_silence(log: LogWriter, redis: Redis) -> None:
    async with redis.pubsub() as feed:
        await feed.subscribe("chat:feed:{r}")
        assert (await feed.get_message(timeout=5) or {})["type"] == "subscribe"
        log.feed_idle_until = 0
        for n in range(1, 31):
            log.append(delta(str(n)))
            if n % 10 == 0:
                await log.wait_drained()
            if n % 15 == 0:
                assert (await heard(feed, f"1-{n}"))[-15:] == [f"1-{m}" for m in range(n - 14, n + 1)]


async def test_a_log_that_nobody_listens_to_is_told_of_only_now_and_then(
    log: LogWriter, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.broker.feed.MAX_SILENCE", math.inf)
    log.append(delta("1"))

    async def unheard() -> bool:
        return log.feed_idle_until > 0

    await eventually(unheard)
    before = await told(redis)
    for n in range(2, 12):
        log.append(delta(str(n)))
        await log.wait_drained()
    async with redis.pubsub() as feed:
        await feed.subscribe("chat:feed:{r}")
        assert (await feed.get_message(timeout=5) or {})["type"] == "subscribe"
        log.feed_idle_until = 1e-9  # the time is over
        log.extend([delta("12"), delta("13")])
        assert await heard(feed, "1-13") == ["1-13"], "what was not told is a gap, and the last shows where it ends"
        log.extend([delta("14"), delta("15")])
        assert await heard(feed, "1-15") == ["1-14", "1-15"], "one who listens is told all"
    assert await told(redis) == before + 2

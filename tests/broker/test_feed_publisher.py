"""What the publisher publishes to the feed: everything that Redis accepts, as long as somebody listens."""

import json
import math

import pytest
from processes import Process, delta, process
from proxy import Proxy
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from waits import eventually

from worker.broker.flush_pace import FlushPace
from worker.broker.log_writer import LogFenced, LogWriter
from worker.contract.ids import EntryId


async def own_log(one: Process, redis: Redis) -> LogWriter:
    await one.jobs.ensure_group("default")
    await redis.xadd("chat:jobs", {"id": "r"})
    return await one.acquire(await one.claim())


async def received(feed: PubSub, upto: str) -> list[str]:
    """The ids of the entries that arrive, up to this one."""
    ids: list[str] = []
    async for message in feed.listen():
        if message["type"] == "message":
            ids += [entry_id for entry_id, _ in json.loads(message["data"])]
        if upto in ids:
            break
    return ids


async def published(redis: Redis) -> int:
    """How often Redis executed PUBLISH."""
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_publish", {"calls": 0})["calls"])


async def test_a_listener_receives_every_entry_and_also_the_last_before_a_silence(one: Process, redis: Redis) -> None:
    log = await own_log(one, redis)
    async with redis.pubsub() as feed:
        await feed.subscribe("chat:feed:{r}")
        assert (await feed.get_message(timeout=60) or {})["type"] == "subscribe"
        log.feed_idle_until = 0
        for n in range(1, 31):
            log.append(delta(str(n)))
            if n % 10 == 0:
                await log.wait_drained()
            if n % 15 == 0:
                assert (await received(feed, f"1-{n}"))[-15:] == [f"1-{m}" for m in range(n - 14, n + 1)]


async def test_a_listener_receives_the_start_and_the_first_entries_before_their_writer_gets_a_reply(
    redis_proxy: Proxy, redis: Redis
) -> None:
    async with process(redis_proxy.redis_url, "one", pace=FlushPace(feed_delay=3600)) as one, redis.pubsub() as feed:
        await feed.subscribe("chat:feed:{r}")
        assert (await feed.get_message(timeout=60) or {})["type"] == "subscribe"
        log = await own_log(one, redis)
        assert await received(feed, "1-0") == ["1-0"]
        reply = redis_proxy.hold_reply(b"^EXEC")
        log.extend([delta("1"), delta("2")])
        log.append(delta("3"))
        assert await received(feed, "1-3") == ["1-1", "1-2", "1-3"]
        assert log.accepted == EntryId(1, 0)
        reply.release()
        await log.wait_drained()
        log.append(delta("4"))
        await log.wait_drained()
        log.append(delta("5"))
        assert await received(feed, "1-4") == ["1-4"]


async def test_first_entries_that_redis_refuses_are_not_published(one: Process, redis: Redis) -> None:
    log = await own_log(one, redis)
    async with redis.pubsub() as feed:
        await feed.subscribe(log.feed)
        assert (await feed.get_message(timeout=60) or {})["type"] == "subscribe"
        await redis.xadd(log.key, {"type": "claimed"}, id="2-0")
        log.append(delta("1"))
        with pytest.raises(LogFenced):
            await log.wait_drained()
        await redis.publish(log.feed, json.dumps([["2-0", {"type": "claimed"}]]))
        assert await received(feed, "2-0") == ["2-0"]


async def test_only_the_first_entries_are_published_without_another_flush(redis_url: str, redis: Redis) -> None:
    async with process(redis_url, "one", pace=FlushPace(feed_delay=3600)) as one:
        log = await own_log(one, redis)
        async with redis.pubsub() as feed:
            await feed.subscribe("chat:feed:{r}")
            assert (await feed.get_message(timeout=60) or {})["type"] == "subscribe"
            log.append(delta("1"))
            assert "1-1" in await received(feed, "1-1")
            log.append(delta("2"))
            assert await received(feed, "1-2") == ["1-2"]
            log.append(delta("3"))
            await log.wait_drained()
            before = await published(redis)
            log.append(delta("4"))
            assert await received(feed, "1-3") == ["1-3"]
            assert await published(redis) == before + 1


async def test_a_log_without_listeners_is_published_only_now_and_then(redis_url: str, redis: Redis) -> None:
    async with process(redis_url, "one", pace=FlushPace(feed_idle_for=math.inf)) as one:
        log = await own_log(one, redis)
        log.append(delta("1"))

        async def has_no_listeners() -> bool:
            return log.feed_idle_until > 0

        await eventually(has_no_listeners)
        before = await published(redis)
        for n in range(2, 12):
            log.append(delta(str(n)))
            await log.wait_drained()
        async with redis.pubsub() as feed:
            await feed.subscribe("chat:feed:{r}")
            assert (await feed.get_message(timeout=60) or {})["type"] == "subscribe"
            log.feed_idle_until = 1e-9  # the time is over
            log.extend([delta("12"), delta("13")])
            assert await received(feed, "1-13") == ["1-13"], "the earlier ones are a gap, and the last shows its end"
            log.extend([delta("14"), delta("15")])
            assert await received(feed, "1-15") == ["1-14", "1-15"], "a listener receives everything"
        assert await published(redis) == before + 2

"""The script that ends an ordinary job, and the feed's last message in it."""

import json

from processes import STONE, Process, delta, process
from redis.asyncio import Redis

from worker.broker.endings import JobEnder
from worker.broker.flush_pace import FlushPace
from worker.broker.job_queue import Delivery
from worker.broker.lifecycle import LifecycleWriter
from worker.broker.log_writer import LogWriter
from worker.contract.entries import Done
from worker.contract.ids import SEAL
from worker.contract.keys import Keys
from worker.contract.records import Lifecycle
from worker.redisio.batching import CommandBatcher

RECORD = Lifecycle(type="finished", id="r", job="1-1", queue="default", attempt=1, time=1)


async def end(one: Process, log: LogWriter, delivery: Delivery) -> bool:
    batcher = CommandBatcher(one.commands)
    ender = JobEnder(batcher, Keys(), LifecycleWriter(batcher, Keys()), one.publisher)
    done = Done(id=SEAL, attempt=1)
    try:
        return await ender.end(log, delivery, done, RECORD, STONE, retention=60, remember=120)
    finally:
        await batcher.aclose()


async def test_the_last_message_has_the_entries_that_the_feed_has_not_published(redis_url: str, redis: Redis) -> None:
    async with process(redis_url, "one", pace=FlushPace(feed_delay=3600)) as one, redis.pubsub() as feed:
        await one.jobs.ensure_group("default")
        await redis.xadd("chat:jobs", {"id": "r"})
        delivery = await one.claim()
        await feed.subscribe("chat:feed:{r}")
        assert (await feed.get_message(timeout=60) or {})["type"] == "subscribe"
        log = await one.acquire(delivery)
        for n in range(1, 6):
            log.append(delta(str(n)))
            await log.drained()
        assert await end(one, log, delivery)
        ids: list[str] = []
        async for message in feed.listen():
            ids += [entry_id for entry_id, _ in json.loads(message["data"])]
            if str(SEAL) in ids:
                break
        assert ids == [*(f"1-{n}" for n in range(6)), str(SEAL)]

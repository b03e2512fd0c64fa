"""The script that seals a log, and settles its job in the same step."""

import json

import pytest
from conftest import stream
from processes import KEY, STONE, Process, deliver, delta, process, texts
from redis.asyncio import Redis

from worker.broker.flush_pace import FlushPace
from worker.broker.job_queue import Delivery
from worker.broker.log_writer import LogWriter
from worker.broker.ownership import LogOwnership
from worker.broker.replicas import Replicas
from worker.contract.entries import Done
from worker.contract.ids import SEAL
from worker.contract.keys import Keys

RECORD = ("chat:lifecycle", "*", "type", "finished", "id", "r")


async def end(owner: LogOwnership, log: LogWriter, delivery: Delivery) -> bool:
    done = Done(id=SEAL, attempt=1)
    written, is_settled = await owner.seal(
        log, delivery, done, STONE, retention=60, remember=120, finished_record=RECORD
    )
    assert written.type == "done"
    return is_settled


async def is_acknowledged(redis: Redis) -> bool:
    return not (await redis.xpending("chat:jobs", "workers"))["pending"]


async def test_the_last_message_has_the_entries_that_the_feed_has_not_published(redis_url: str, redis: Redis) -> None:
    async with process(redis_url, "one", pace=FlushPace(feed_delay=3600)) as one, redis.pubsub() as feed:
        delivery = await deliver(one, redis)
        await feed.subscribe("chat:feed:{r}")
        assert (await feed.get_message(timeout=60) or {})["type"] == "subscribe"
        log = await one.acquire(delivery)
        for n in range(1, 6):
            log.append(delta(str(n)))
            await log.drained()
        assert await end(one.owner, log, delivery)
        ids: list[str] = []
        async for message in feed.listen():
            ids += [entry_id for entry_id, _ in json.loads(message["data"])]
            if str(SEAL) in ids:
                break
        assert ids == [*(f"1-{n}" for n in range(6)), str(SEAL)]


async def test_all_last_steps_are_done_with_the_seal(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    assert await end(one.owner, log, delivery)
    assert await texts(redis) == ["1-0:started", f"{SEAL}:done"]
    assert 0 < await redis.ttl(KEY) <= 60
    assert 60 < await redis.ttl("chat:ended:{r}") <= 120
    assert [fields for _, fields in await stream(redis, "chat:lifecycle")] == [{b"type": b"finished", b"id": b"r"}]
    assert await is_acknowledged(redis)
    assert not await end(one.owner, log, delivery), "after a lost reply, the caller repeats the steps"


@pytest.mark.parametrize("refused", ["xadd", "publish", "xack"])
async def test_a_last_step_that_redis_refuses_leaves_it_and_the_later_ones_to_the_caller(
    refused: str, redis_url: str, redis: Redis
) -> None:
    """The seal stands, and a job without one of the steps before is not acknowledged."""
    await redis.acl_setuser("limited", enabled=True, passwords="+pw", keys=["*"], channels=["*"], categories=["+@all"])
    try:
        async with process(redis_url.replace("//", "//limited:pw@"), "one") as one:
            delivery = await deliver(one, redis)
            log = await one.acquire(delivery)
            if refused == "xadd":
                await redis.set("chat:lifecycle", "in the way", ex=60)
            else:
                await redis.acl_setuser("limited", enabled=True, commands=[f"-{refused}"])
            assert not await end(one.owner, log, delivery)
    finally:
        await redis.acl_deluser("limited")
    assert await texts(redis) == ["1-0:started", f"{SEAL}:done"]
    assert await redis.exists("chat:ended:{r}")
    assert not await is_acknowledged(redis)
    assert await redis.type("chat:lifecycle") == (b"string" if refused == "xadd" else b"stream")


async def test_a_feed_that_redis_is_known_to_refuse_keeps_no_job_from_being_settled(
    redis_url: str, redis: Redis
) -> None:
    await redis.acl_setuser(
        "silent", enabled=True, passwords="+pw", keys=["*"], categories=["+@all"], reset_channels=True
    )
    try:
        async with process(redis_url.replace("//", "//silent:pw@"), "one") as one:
            delivery = await deliver(one, redis)
            log = await one.acquire(delivery)
            one.publisher.feed.is_muted = True
            assert await end(one.owner, log, delivery)
    finally:
        await redis.acl_deluser("silent")


async def test_the_job_is_not_settled_with_the_seal_if_replicas_must_have_it(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    owner = LogOwnership(
        one.batcher, Keys(), one.jobs, one.publisher, worker="one", nonce="n", now=lambda: 1, replicas=Replicas(1)
    )
    log = await one.acquire(delivery)
    assert not await end(owner, log, delivery)
    assert await texts(redis) == ["1-0:started", f"{SEAL}:done"]
    assert not await redis.exists("chat:lifecycle")
    assert not await is_acknowledged(redis)

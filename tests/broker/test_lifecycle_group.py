"""Reading the lifecycle as a consumer of a group: every record once acknowledged, none lost unnoticed."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from lifecycle_records import KEY, LOSSES, MIB, abandon, pending, write_records
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ConnectionError  # noqa: A004 - so in redis-py

from worker.broker.lifecycle_group import LifecycleGroup
from worker.broker.lifecycle_retention import LifecycleTrimmer
from worker.contract.keys import Keys
from worker.redisio.clients import blocking_client

GROUP = "log"

Join = Callable[..., LifecycleGroup]


@pytest.fixture
async def join(redis_url: str) -> AsyncIterator[Join]:
    """Makes consumers of the group, each with a client of its own."""
    async with AsyncExitStack() as stack:

        def make(name: str, url: str = redis_url) -> LifecycleGroup:
            client = blocking_client(url, 1)
            stack.push_async_callback(client.aclose)
            return LifecycleGroup(client, Keys(), GROUP, name)

        yield make


async def drain(*groups: LifecycleGroup) -> list[str]:
    """Read and acknowledge in turn until nothing is left."""
    got: list[str] = []
    while True:
        before = len(got)
        for group in groups:
            records = await group.read(0.01)
            await group.acknowledge(records)
            got += [record.id for record in records]
        if len(got) == before:
            return got


async def consumers(redis: Redis) -> set[str]:
    return {consumer["name"].decode() for consumer in await redis.xinfo_consumers(KEY, GROUP)}


async def test_consumers_share_the_records_and_a_healthy_group_loses_none(redis: Redis, join: Join) -> None:
    one, two = join("one"), join("two")
    assert not await one.read(0.01), "it has created the group"
    ids = await write_records(redis, 10_000)
    await LifecycleTrimmer(redis, Keys(), length=1, max_bytes=100_000_000).trim()
    got = await drain(one, two)
    assert sorted(got) == sorted(ids)
    assert not await pending(redis, GROUP)
    assert (one.lost, two.lost) == (0, 0)


async def test_records_of_a_consumer_that_leaves_go_to_the_others_at_once(redis: Redis, join: Join) -> None:
    one, two = join("one"), join("two")
    await one.read(0.01)
    ids = await write_records(redis, 150)
    records = await one.read(1)
    await one.acknowledge(records[:30])
    await one.leave()
    assert sorted(await drain(two)) == sorted(ids[30:])


async def test_records_of_a_consumer_that_died_come_again_after_a_while(redis: Redis, join: Join) -> None:
    one, two = join("one"), join("two")
    await one.read(0.01)
    ids = await write_records(redis, 100)
    assert len(await one.read(1)) == 100
    assert not await drain(two), "it may be alive"
    await abandon(redis, GROUP)
    assert await drain(join("three")) == ids
    assert not await pending(redis, GROUP)


async def test_records_whose_delivery_was_not_seen_are_read_again(redis: Redis, join: Join, redis_proxy: Proxy) -> None:
    one = join("one", redis_proxy.redis_url)
    await one.read(0.01)
    ids = await write_records(redis, 250)
    order = redis_proxy.drop_reply(rb"^XREADGROUP .* >$")
    with pytest.raises(ConnectionError):
        await one.read(1)
    assert order.done.is_set()
    assert await pending(redis, GROUP) == 100
    assert await drain(one) == ids
    assert not await pending(redis, GROUP)


async def test_what_a_group_reads_and_what_it_loses_is_all_there_was(redis: Redis, join: Join) -> None:
    """Of three pages, the first is acknowledged, the second is pending and removed, and the third only partly kept."""
    trimmer = LifecycleTrimmer(redis, Keys(), length=1, max_bytes=MIB // 2)
    one, two = join("one"), join("two")
    await one.read(0.01)
    ids = await write_records(redis, 20_000)
    await one.acknowledge(await one.read(1))
    await one.read(1)
    await trimmer.trim()
    got = await drain(two)
    assert got == ids[-len(got) :]
    assert 100 + len(got) + two.lost == 20_000
    one.lost = two.lost
    await two.losses_reported()
    await one.losses_reported()  # at the same time
    assert await redis.hget(LOSSES, GROUP) == b"0"
    assert not await drain(join("three"))


async def test_pending_records_that_somebody_else_removes_are_lost(redis: Redis, join: Join) -> None:
    one, two = join("one"), join("two")
    await one.read(0.01)
    ids = await write_records(redis, 100)
    await one.read(1)
    await redis.xtrim(KEY, maxlen=40, approximate=False)
    await one.leave()
    assert await drain(two) == ids[60:]
    assert two.lost == 60


async def test_a_group_that_somebody_removes_is_created_again_and_begins_with_the_oldest_record(
    redis: Redis, join: Join
) -> None:
    one = join("one")
    await one.read(0.01)
    ids = await write_records(redis, 10)
    assert await drain(one) == ids
    await redis.hset(LOSSES, GROUP, "5")
    await redis.delete(KEY)
    ids = await write_records(redis, 10, first=10)
    assert not await one.read(0.01)
    assert await drain(one) == ids
    assert not await redis.exists(LOSSES), "the losses of the former group"


async def test_consumers_that_ended_are_removed_but_never_with_pending_records(redis: Redis, join: Join) -> None:
    one, two, three = join("one"), join("two"), join("three")
    await one.read(0.01)
    await write_records(redis, 150)
    await one.acknowledge(await one.read(1))
    await two.read(1)
    await one.leave()
    await two.leave()
    assert await consumers(redis) == {"two"}
    await drain(three)
    assert await consumers(redis) == {"two", "three"}
    await two.leave()
    assert await consumers(redis) == {"three"}

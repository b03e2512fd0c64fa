"""The job streams: leases are compared before they are set, the cursor is kept, and trimming loses nothing."""

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator
from typing import cast

import pytest
from processes import claim_expired
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from waits import eventually

from worker.broker.abandoned_jobs import AbandonedJobs
from worker.broker.job_queue import Delivery, JobQueue
from worker.contract.keys import GROUP, Keys
from worker.redisio.clients import blocking_client, command_client
from worker.telemetry.logging import LogReceiver, configure_logging

LEASE = 60.0
"""Seconds: so long that real time plays no part."""


class Group:
    """Several consumers of one group."""

    def __init__(self, url: str) -> None:
        self.commands = command_client(url)
        self.blocking = blocking_client(url, 60)

    def consumer(self, name: str, lease: float = LEASE) -> JobQueue:
        return JobQueue(self.commands, self.blocking, Keys(), name, lease, LogReceiver())

    def abandoned(self, name: str, lease: float = LEASE) -> AbandonedJobs:
        return AbandonedJobs(self.commands, Keys(), name, lease)

    async def claim_expired(self, name: str, count: int, lease: float = LEASE) -> list[Delivery]:
        return await claim_expired(self.abandoned(name, lease), count)


@pytest.fixture
async def group(redis_url: str) -> AsyncIterator[Group]:
    group = Group(redis_url)
    await group.consumer("maker").ensure_group("default")
    yield group
    await group.commands.aclose()
    await group.blocking.aclose()


async def add(redis: Redis, count: int) -> list[str]:
    return [str(cast("bytes", await redis.xadd("chat:jobs", {"id": f"j{n}"})), "ascii") for n in range(count)]


async def expired(redis: Redis, entry: str, idle: int = int(LEASE * 1000) + 1) -> None:
    """Let a lease run out."""
    owner = await owner_of(redis, entry)
    await redis.xclaim("chat:jobs", GROUP, owner, 0, [entry], idle=idle, justid=True)


async def owner_of(redis: Redis, entry: str) -> bytes:
    return cast("bytes", (await redis.xpending_range("chat:jobs", GROUP, entry, entry, 1))[0]["consumer"])


async def test_jobs_are_delivered_once_and_in_order(group: Group, redis: Redis) -> None:
    ids = await add(redis, 5)
    one, two = group.consumer("one"), group.consumer("two")
    first = await one.read_new("default", 3, 100)
    rest = await two.read_new("default", 10, 100)
    assert [delivery.id for delivery in first + rest] == ids
    assert await one.read_new("default", 1, 10) == []


async def test_jobs_added_before_the_group_are_delivered(redis_url: str, redis: Redis) -> None:
    await add(redis, 2)
    group = Group(redis_url)
    jobs = group.consumer("one")
    assert await jobs.read_new("default", 10, 10) == [], "the first read that misses the group creates it"
    assert len(await jobs.read_new("default", 10, 10)) == 2
    await group.commands.aclose()
    await group.blocking.aclose()


async def test_fields_that_are_not_utf8_are_delivered_unchanged(group: Group, redis: Redis) -> None:
    await redis.xadd("chat:jobs", {b"id": b"\xff\xfe"})
    (delivery,) = await group.consumer("one").read_new("default", 1, 100)
    assert delivery.fields == {b"id": b"\xff\xfe"}


async def test_only_an_expired_lease_is_claimed(group: Group, redis: Redis) -> None:
    (entry,) = await add(redis, 1)
    await group.consumer("one").read_new("default", 1, 100)
    assert await group.claim_expired("two", 10) == []
    await expired(redis, entry)
    (claimed,) = await group.claim_expired("two", 10)
    assert claimed.id == entry
    assert await owner_of(redis, entry) == b"two"


async def test_a_renewal_keeps_the_lease_and_a_late_one_does_not_steal_the_job_back(group: Group, redis: Redis) -> None:
    (entry,) = await add(redis, 1)
    one = group.consumer("one")
    (delivery,) = await one.read_new("default", 1, 100)
    assert await one.renew_leases([(delivery, LEASE / 3)]) == [True]

    await expired(redis, entry)
    assert await group.claim_expired("two", 1)
    assert await one.renew_leases([(delivery, LEASE * 2)]) == [False], "min-idle 0 would steal it back"
    assert await owner_of(redis, entry) == b"two"


async def test_many_leases_are_renewed_together_and_a_stolen_one_is_found_among_them(
    group: Group, redis: Redis
) -> None:
    ids = await add(redis, 1200)
    one = group.consumer("one", lease=60)
    deliveries = await one.read_new("default", 1200, 100)
    await expired(redis, ids[700], idle=61_000)
    assert [claimed.id for claimed in await group.claim_expired("two", 1200, lease=60)] == [ids[700]]
    leases = [
        (delivery, 31.0 + number % 2 if delivery.id == ids[700] else number % 2)
        for number, delivery in enumerate(deliveries)
    ]
    kept = await one.renew_leases(leases)
    assert [delivery.id for delivery, is_ours in zip(deliveries, kept, strict=True) if not is_ours] == [ids[700]]


async def test_a_renewal_does_not_count_as_a_delivery(group: Group, redis: Redis) -> None:
    (entry,) = await add(redis, 1)
    one = group.consumer("one")
    (delivery,) = await one.read_new("default", 1, 100)
    for _ in range(3):
        await one.renew_leases([(delivery, 0)])
    assert (await redis.xpending_range("chat:jobs", GROUP, entry, entry, 1))[0]["times_delivered"] == 1


async def test_a_handed_over_job_is_claimed_at_once_without_raising_its_count(group: Group, redis: Redis) -> None:
    (entry,) = await add(redis, 1)
    one = group.consumer("one")
    (delivery,) = await one.read_new("default", 1, 100)
    assert await one.hand_over([delivery]) == [True]
    (claimed,) = await group.claim_expired("two", 1)
    assert claimed.left_for is not None
    assert 0 <= claimed.left_for < 30, "the time since the hand-over"
    assert claimed == dataclasses.replace(delivery, redelivered=True, handed_over=True, left_for=claimed.left_for)
    assert (await redis.xpending_range("chat:jobs", GROUP, entry, entry, 1))[0]["times_delivered"] == 1


async def test_a_hand_over_returns_refusals_and_jobs_that_are_not_ours_any_more(group: Group, redis: Redis) -> None:
    await add(redis, 3)
    one = group.consumer("one")
    first, *others = await one.read_new("default", 3, 100)
    await one.acknowledge(first)
    await redis.config_set("min-replicas-to-write", "1")
    try:
        results = await one.hand_over([first, *others])
        assert [type(reply) for reply in results] == [bool, *[ResponseError] * 2]
        assert results[0] is False
        assert "NOREPLICAS" in str(results[1])
    finally:
        await redis.config_set("min-replicas-to-write", "0")
    assert await one.hand_over([first, *others]) == [False, True, True]


async def test_a_delivery_has_the_count_of_deliveries(group: Group, redis: Redis) -> None:
    (entry,) = await add(redis, 1)
    (delivery,) = await group.consumer("one").read_new("default", 1, 100)
    counts = [delivery.count]
    for name in ("two", "three"):
        await expired(redis, entry)
        counts += [delivery.count for delivery in await group.claim_expired(name, 1)]
    assert counts == [1, 2, 3]


async def test_a_hand_over_leaves_a_job_that_another_worker_takes_in_the_same_moment(
    redis_proxy: Proxy, redis: Redis
) -> None:
    group = Group(redis_proxy.redis_url)
    one = group.consumer("one", lease=60)
    await one.ensure_group("default")
    (entry,) = await add(redis, 1)
    (delivery,) = await one.read_new("default", 1, 100)
    await expired(redis, entry, idle=61_000)
    claim = redis_proxy.hold(rb"^XCLAIM")
    giving = asyncio.create_task(one.hand_over([delivery]))
    await claim.met.wait()
    await redis.xclaim("chat:jobs", GROUP, "two", 60_000, [entry])
    claim.release()
    assert await giving == [False]
    assert await owner_of(redis, entry) == b"two"
    await group.commands.aclose()
    await group.blocking.aclose()


async def test_a_hand_over_after_a_lost_reply_does_not_raise_the_count_either(group: Group, redis: Redis) -> None:
    """A claim of a job that already runs here raises Redis's count, not the delivery's."""
    (entry,) = await add(redis, 1)
    one = group.consumer("one")
    (delivery,) = await one.read_new("default", 1, 100)
    await expired(redis, entry)
    await group.claim_expired("one", 1)
    await one.hand_over([delivery])
    (claimed,) = await group.claim_expired("two", 1)
    assert claimed.count == delivery.count == 1


async def test_a_job_of_another_worker_is_not_handed_over(group: Group, redis: Redis) -> None:
    (entry,) = await add(redis, 1)
    one = group.consumer("one")
    (delivery,) = await one.read_new("default", 1, 100)
    await expired(redis, entry)
    await group.claim_expired("two", 1)
    assert await one.hand_over([delivery]) == [False]
    assert await group.claim_expired("three", 1) == []


async def test_an_expired_lease_behind_many_live_ones_is_found(group: Group, redis: Redis) -> None:
    ids = await add(redis, 60)
    await group.consumer("one", lease=30).read_new("default", 60, 100)
    await expired(redis, ids[-1], idle=31_000)
    assert [delivery.id for delivery in await group.claim_expired("two", 1, lease=30)] == [ids[-1]]


async def test_jobs_purged_while_pending_do_not_hold_up_the_take_over(group: Group, redis: Redis) -> None:
    """Redis 6.2 returns each as nil, and 7.0 leaves it out."""
    ids = await add(redis, 101)
    await group.consumer("dead").read_new("default", 101, 1)
    await redis.xclaim("chat:jobs", GROUP, "dead", 0, list(ids), idle=int(LEASE * 1000) + 1, justid=True)
    await redis.xtrim("chat:jobs", maxlen=1, approximate=False)
    assert [delivery.id for delivery in await group.claim_expired("one", 1)] == [ids[-1]]
    assert (await redis.xpending("chat:jobs", GROUP))["pending"] == 1, "the purged jobs are not pending any more"


async def test_probing_whether_redis_accepts_writes_writes_nothing(group: Group, redis: Redis) -> None:
    """The probe does not let a stream grow either that somebody has created at its key."""
    one = group.consumer("one")
    await one.probe_writable()
    assert not await redis.exists("chat:probe")
    await redis.xadd("chat:probe", {"of": "somebody"})
    for _ in range(3):
        await one.probe_writable()
    assert await redis.xlen("chat:probe") == 1
    await redis.delete("chat:probe")


async def test_trimming_keeps_pending_and_unread_jobs(group: Group, redis: Redis) -> None:
    ids = await add(redis, 6)
    one = group.consumer("one")
    read = await one.read_new("default", 4, 100)
    for delivery in (read[0], read[1], read[3]):
        await one.acknowledge(delivery)
    await one.trim("default")
    assert [entry.decode() for entry, _ in await redis.xrange("chat:jobs")] == ids[2:]  # type: ignore[union-attr]
    await one.acknowledge(read[2])
    await one.trim("default")
    assert [entry.decode() for entry, _ in await redis.xrange("chat:jobs")] == ids[3:]  # type: ignore[union-attr]
    assert len(await one.read_new("default", 10, 100)) == 2


async def test_a_job_is_outstanding_while_it_is_unread_or_pending(group: Group, redis: Redis) -> None:
    (entry,) = await add(redis, 1)
    one = group.consumer("one")
    assert await one.is_outstanding("default", entry)
    (delivery,) = await one.read_new("default", 1, 100)
    assert await one.is_outstanding("default", entry)
    assert await one.is_held(delivery)
    await one.acknowledge(delivery)
    assert not await one.is_outstanding("default", entry)
    assert not await one.is_held(delivery)
    assert not await one.is_outstanding("default", "1-1")


async def test_a_consumer_is_removed_only_with_nothing_pending(group: Group, redis: Redis) -> None:
    await add(redis, 1)
    one = group.consumer("one")
    (delivery,) = await one.read_new("default", 1, 100)
    await one.remove_consumer(["default"])
    assert await one.is_held(delivery)
    await one.acknowledge(delivery)
    await one.remove_consumer(["default"])
    assert await redis.xinfo_consumers("chat:jobs", GROUP) == []


async def test_a_read_waits_for_a_job(group: Group, redis: Redis) -> None:
    reading = asyncio.create_task(group.consumer("one").read_new("default", 1, 60_000))

    async def waits() -> bool:
        return bool((await redis.info("clients"))["blocked_clients"])

    await eventually(waits)
    (entry,) = await add(redis, 1)
    assert [delivery.id for delivery in await reading] == [entry]


@pytest.mark.parametrize("gone", ["group", "stream"])
async def test_no_job_of_a_deleted_queue_is_outstanding_or_held(gone: str, group: Group, redis: Redis) -> None:
    (entry,) = await add(redis, 1)
    one = group.consumer("one")
    (delivery,) = await one.read_new("default", 1, 100)
    await (redis.delete("chat:jobs") if gone == "stream" else redis.xgroup_destroy("chat:jobs", GROUP))
    assert not await one.is_outstanding("default", entry)
    assert not await one.is_held(delivery)
    await one.hand_over([delivery])


async def test_an_expired_lease_behind_many_live_ones_is_found_at_once_for_a_single_slot(
    group: Group, redis: Redis
) -> None:
    ids = await add(redis, 500)
    await group.consumer("one", lease=60).read_new("default", 500, 100)
    await expired(redis, ids[-1], idle=61_000)
    assert [delivery.id for delivery in await group.claim_expired("two", 1, lease=60)] == [ids[-1]]


async def test_only_the_consumer_of_a_dead_worker_is_removed(group: Group, redis: Redis) -> None:
    await add(redis, 3)
    for name in ("busy", "gone", "alive"):
        (job,) = await group.consumer(name).read_new("default", 1, 1)
        if name != "busy":
            await group.consumer(name).acknowledge(job)

    async def names() -> set[str]:
        return {line["name"].decode() for line in await redis.xinfo_consumers("chat:jobs", GROUP)}

    one = group.consumer("one")
    await one.remove_stale_consumers("default", {"alive"}, idle=60)
    assert await names() == {"busy", "gone", "alive"}, "none has been idle for a minute"
    await one.remove_stale_consumers("default", {"alive"}, idle=0)
    assert await names() == {"busy", "alive"}, "pending jobs would be lost with their consumer"


async def test_a_consumer_that_gets_a_job_just_before_its_removal_stays(
    group: Group, redis: Redis, redis_proxy: Proxy
) -> None:
    """As when a paused worker continues."""
    woken = group.consumer("woken")
    await add(redis, 1)
    await woken.acknowledge((await woken.read_new("default", 1, 1))[0])
    held = redis_proxy.hold_reply(b"XINFO CONSUMERS")
    async with command_client(redis_proxy.redis_url) as commands, blocking_client(redis_proxy.redis_url, 1) as blocking:
        one = JobQueue(commands, blocking, Keys(), "one", LEASE)
        removing = asyncio.create_task(one.remove_stale_consumers("default", set(), idle=0))
        await held.done.wait()
        await add(redis, 1)
        await woken.read_new("default", 1, 1)
        held.release()
        await removing
    assert (await redis.xpending("chat:jobs", GROUP))["pending"] == 1


async def test_a_group_that_keeps_vanishing_is_reported_once(
    group: Group, redis: Redis, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json", "warning")
    one = group.consumer("one")
    for _ in range(5):
        await redis.flushall()
        assert await one.read_new("default", 1, 1) == []
        await add(redis, 1)
        assert len(await one.read_new("default", 1, 1)) == 1
    assert capfd.readouterr().err.count("group_made_again") == 1


async def test_depth_counts_waiting_jobs_and_dates_the_oldest_pending_one(group: Group, redis: Redis) -> None:
    one = group.consumer("one")
    ids = await add(redis, 3)
    before = await one.depth("default")
    await one.read_new("default", 1, 1)
    after = await one.depth("default")
    assert (before.oldest, after.oldest) == (None, int(ids[0].partition("-")[0]))
    known = (await redis.xinfo_groups("chat:jobs"))[0].get("lag") is not None
    assert (before.waiting, after.waiting) == ((3, 2) if known else (None, None))


async def test_a_job_that_was_deleted_while_its_worker_died_is_pending_with_nobody(group: Group, redis: Redis) -> None:
    (job, kept) = await add(redis, 2)
    await group.consumer("dead").read_new("default", 2, 1)
    await expired(redis, job)
    await expired(redis, kept)
    await redis.xdel("chat:jobs", job)
    assert [delivery.id for delivery in await group.claim_expired("one", 5)] == [kept]
    assert (await redis.xpending("chat:jobs", GROUP))["pending"] == 1


async def test_the_memory_of_redis_is_measured(group: Group, redis: Redis) -> None:
    await redis.config_set("maxmemory", 300_000_000)
    try:
        used, limit = await group.consumer("a").memory()
    finally:
        await redis.config_set("maxmemory", 0)
    assert 0 < used < limit == 300_000_000
    assert (await group.consumer("a").memory())[1] == 0


async def test_without_the_right_to_info_the_memory_is_unknown(redis: Redis, redis_url: str) -> None:
    await redis.acl_setuser(
        "blind", enabled=True, passwords="+pw", keys=["*"], commands=["-info"], categories=["+@all"]
    )
    group = Group(redis_url.replace("//", "//blind:pw@"))
    try:
        assert all(math.isnan(value) for value in await group.consumer("a").memory())
    finally:
        await group.commands.aclose()
        await group.blocking.aclose()
        await redis.acl_deluser("blind")

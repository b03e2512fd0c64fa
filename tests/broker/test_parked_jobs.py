"""Parked jobs: any worker takes them, each job once and the oldest first, and no delivery is counted for the wait."""

import asyncio
import time
from dataclasses import replace
from typing import cast

import pytest
from processes import Process, claim_expired, process
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from waits import eventually

from worker.broker.claims import claim, list_pending
from worker.broker.consumers import DEADLINE_IDLE, HANDED_OVER, LEAST_PARKED
from worker.broker.job_queue import Delivery
from worker.broker.parked_jobs import ParkedJob, ParkedJobs, ParkedLine, bucket_of, model_of_line
from worker.broker.queue_depth import waiting_in
from worker.contract.entries import Claimed, Started
from worker.contract.ids import EntryId
from worker.contract.keys import GROUP, Keys
from worker.engine.poison import count_failures

LEASE = 10.0


def now() -> int:
    return int(time.time() * 1000)


def parked_by(one: Process) -> ParkedJobs:
    return ParkedJobs(one.commands, Keys(), one.name, LEASE, now)


def job(delivery: Delivery, *, model: str = "m", tenant: str = "", left: int = 60_000) -> ParkedJob:
    return ParkedJob(delivery, tenant, model, now() + left)


async def taken(one: Process, redis: Redis, count: int) -> list[Delivery]:
    for number in range(count):
        await redis.xadd("chat:jobs", {"id": f"j{number}"})
    return await one.jobs.read_new("default", count, 500)


async def the_line(parked: ParkedJobs) -> ParkedLine:
    (line,) = await parked.lines("default")
    return line


@pytest.fixture
def parked(one: Process) -> ParkedJobs:
    return parked_by(one)


async def test_a_parked_job_is_taken_by_another_worker_as_it_was(
    one: Process, two: Process, parked: ParkedJobs, redis: Redis
) -> None:
    (delivery,) = await taken(one, redis, 1)
    assert await parked.park([job(delivery)]) == [True]
    assert await one.jobs.idle_times([delivery]) == [None]
    line = await the_line(parked)
    assert (line.queue, line.bucket, line.model, line.jobs) == ("default", "-", "m", 1)
    assert await parked_by(two).take(line, 5) == [replace(delivery, redelivered=True)]
    assert await two.jobs.idle_times([delivery]) != [None]
    assert await parked.lines("default") == []


@pytest.mark.parametrize("tries", [0, 2])
async def test_a_begun_job_waits_in_another_line_which_keeps_its_tries(
    tries: int, one: Process, two: Process, parked: ParkedJobs, redis: Redis
) -> None:
    fresh, begun = await taken(one, redis, 2)
    begun = replace(begun, tries=tries)
    assert await parked.park([job(fresh), job(begun)]) == [True, True]
    lines = {line.tries: line for line in await parked.lines("default")}
    assert lines.keys() == {None, tries}
    assert await parked_by(two).take(lines[tries], 5) == [replace(begun, redelivered=True)]
    assert await parked_by(two).take(lines[None], 5) == [replace(fresh, redelivered=True)]


async def test_the_oldest_jobs_of_a_line_are_taken_first(one: Process, parked: ParkedJobs, redis: Redis) -> None:
    deliveries = await taken(one, redis, 6)
    for delivery in reversed(deliveries):
        await parked.park([job(delivery)])
    line = await the_line(parked)
    found = [delivery.id for size in (2, 1, 5) for delivery in await parked.take(line, size)]
    assert found == [delivery.id for delivery in deliveries]


async def test_of_two_workers_each_job_of_a_line_has_one(
    one: Process, two: Process, parked: ParkedJobs, redis: Redis
) -> None:
    deliveries = await taken(one, redis, 40)
    await parked.park([job(delivery) for delivery in deliveries])
    line = await the_line(parked)

    async def take_all(process: Process) -> list[str]:
        found: list[str] = []
        while some := await parked_by(process).take(line, 3):
            found += [delivery.id for delivery in some]
        return found

    first, second = await asyncio.gather(take_all(one), take_all(two))
    assert sorted(first + second) == sorted(delivery.id for delivery in deliveries)


async def test_a_job_that_two_workers_have_listed_is_taken_by_one(
    one: Process, two: Process, parked: ParkedJobs, redis: Redis
) -> None:
    (delivery,) = await taken(one, redis, 1)
    await parked.park([job(delivery)])
    line = await the_line(parked)
    listed = await list_pending(redis, "chat:jobs", line.consumer, idle=LEAST_PARKED, count=1)
    results = [
        await claim(process.commands, "chat:jobs", "default", process.name, listed, idle=LEAST_PARKED)
        for process in (one, two)
    ]
    assert [len(result) for result in results] == [1, 0]


async def test_waiting_is_no_failure_however_often_a_job_is_parked(
    one: Process, two: Process, parked: ParkedJobs, redis: Redis
) -> None:
    (delivery,) = await taken(one, redis, 1)
    owned = {"queue": "default", "job": delivery.id, "worker": "w", "owner": "n", "time": 1}
    log = [Started(id=EntryId(1, 0), delivery=delivery.count, digest="", **owned)]  # type: ignore[arg-type]  # mixed
    claims: list[Claimed] = []
    for attempt in range(2, 8):
        owner = parked_by(one if attempt % 2 == 0 else two)
        await owner.park([job(delivery)])
        (delivery,) = await parked_by(two if attempt % 2 == 0 else one).take(await the_line(parked), 1)
        assert count_failures([*log, *claims], delivery) == 0
        claims.append(
            Claimed(id=EntryId(attempt, 0), reason="takeover", delivery=delivery.count, **owned)  # type: ignore[arg-type]  # mixed
        )
    assert delivery.count == 1


async def test_only_a_job_whose_deadline_has_passed_is_overdue(one: Process, parked: ParkedJobs, redis: Redis) -> None:
    first, second, third = await taken(one, redis, 3)
    await parked.park([job(first, left=60_000), job(second, left=-5), job(third, left=3 * DEADLINE_IDLE)])
    line = await the_line(parked)
    assert line.jobs == 3
    assert [delivery.id for delivery in await parked.take_overdue(line, 5)] == [second.id]
    assert await parked.take_overdue(line, 5) == []
    assert [delivery.id for delivery in await parked.take(line, 5)] == [first.id, third.id]


@pytest.mark.parametrize("deadline", [1, 10**9, 2**53])
async def test_a_deadline_far_away_from_now_is_in_the_line_too(
    deadline: int, one: Process, parked: ParkedJobs, redis: Redis
) -> None:
    """Redis replaces an idle time that is longer than the time since 1970 by 0. No worker would then list the job."""
    (delivery,) = await taken(one, redis, 1)
    await parked.park([ParkedJob(delivery, "", "m", deadline)])
    line = await the_line(parked)
    assert [each.id for each in await parked.take(line, 5)] == [delivery.id]


async def test_a_job_becomes_overdue_as_time_passes(one: Process, parked: ParkedJobs, redis: Redis) -> None:
    (delivery,) = await taken(one, redis, 1)
    await parked.park([job(delivery, left=300)])
    line = await the_line(parked)
    found: list[Delivery] = []

    async def is_overdue() -> bool:
        found.extend(await parked.take_overdue(line, 5))
        return bool(found)

    await eventually(is_overdue)
    assert [each.id for each in found] == [delivery.id]


async def test_the_take_over_does_not_touch_parked_jobs(
    one: Process, two: Process, parked: ParkedJobs, redis: Redis
) -> None:
    (delivery,) = await taken(one, redis, 1)
    await parked.park([job(delivery)])
    assert await claim_expired(two.abandoned) == []


async def test_a_worker_of_an_earlier_version_takes_parked_and_handed_over_jobs(
    one: Process, parked: ParkedJobs, redis: Redis
) -> None:
    """It searches by XAUTOCLAIM for jobs that were idle for a lease."""
    first, second = await taken(one, redis, 2)
    await parked.park([job(first)])
    assert await one.jobs.hand_over([second]) == [True]
    _, messages, *_ = await redis.xautoclaim("chat:jobs", GROUP, "old", int(LEASE * 1000), "0-0", count=10)
    assert [entry.decode() for entry, _ in messages] == [first.id, second.id]
    pending = await redis.xpending_range("chat:jobs", GROUP, "-", "+", 10, "old")
    assert [entry["times_delivered"] for entry in pending] == [1, 1]


async def test_jobs_that_were_trimmed_while_parked_do_not_hide_those_behind_them(
    one: Process, parked: ParkedJobs, redis: Redis
) -> None:
    """On Redis 6.2 they stay pending, and a claim returns them as nil."""
    deliveries = await taken(one, redis, 8)
    await parked.park([job(delivery) for delivery in deliveries])
    await redis.xtrim("chat:jobs", maxlen=1, approximate=False)
    line = await the_line(parked)
    assert [delivery.id for delivery in await parked.take(line, 2)] == [deliveries[-1].id]
    assert (await redis.xpending("chat:jobs", GROUP))["pending"] == 1, "the trimmed jobs are not pending any more"
    assert await parked.take(line, 2) == []


async def test_a_job_of_another_worker_or_an_acknowledged_job_is_not_parked(
    one: Process, two: Process, parked: ParkedJobs, redis: Redis
) -> None:
    kept, stolen, ended = await taken(one, redis, 3)
    await redis.xclaim("chat:jobs", GROUP, "two", 0, [stolen.id], justid=True)
    await one.jobs.acknowledge(ended)
    assert await parked.park([job(kept), job(stolen), job(ended)]) == [True, False, False]
    assert await two.jobs.idle_times([stolen]) != [None]
    assert (await redis.xpending("chat:jobs", GROUP))["pending"] == 2


async def test_parking_again_after_a_lost_reply_does_not_take_the_job_from_its_next_owner(
    one: Process, two: Process, redis: Redis, redis_proxy: Proxy
) -> None:
    (delivery,) = await taken(one, redis, 1)
    order = redis_proxy.drop_reply(rb"^XCLAIM")
    async with process(redis_proxy.redis_url, "one") as behind:
        with pytest.raises(RedisConnectionError):
            await parked_by(behind).park([job(delivery)])
        assert order.done.is_set()
        parked = parked_by(two)
        assert len(await parked.take(await the_line(parked), 1)) == 1
        assert await parked_by(behind).park([job(delivery)]) == [False]
    assert await two.jobs.idle_times([delivery]) != [None]


async def test_a_refusal_is_returned_for_each_job(one: Process, parked: ParkedJobs, redis: Redis) -> None:
    deliveries = await taken(one, redis, 2)
    await redis.config_set("min-replicas-to-write", "1")
    try:
        results = await parked.park([job(delivery) for delivery in deliveries])
    finally:
        await redis.config_set("min-replicas-to-write", "0")
    assert [type(result) for result in results] == [ResponseError] * 2
    assert await parked.park([job(delivery) for delivery in deliveries]) == [True, True]


@pytest.mark.parametrize("gone", ["group", "stream"])
async def test_a_group_that_has_vanished_has_no_lines(
    gone: str, one: Process, parked: ParkedJobs, redis: Redis
) -> None:
    first, second = await taken(one, redis, 2)
    await parked.park([job(first)])
    line = await the_line(parked)
    await (redis.delete("chat:jobs") if gone == "stream" else redis.xgroup_destroy("chat:jobs", GROUP))
    assert await parked.lines("default") == []
    assert await parked.take(line, 1) == []
    assert await parked.take_overdue(line, 1) == []
    assert True not in await parked.park([job(second)])


async def test_a_consumer_whose_name_is_no_text_is_no_line(one: Process, parked: ParkedJobs, redis: Redis) -> None:
    await redis.xadd("chat:jobs", {"id": "r"})
    await redis.execute_command("XREADGROUP", "GROUP", GROUP, b"waiting\xff:\xfe", "STREAMS", "chat:jobs", ">")  # type: ignore[no-untyped-call]  # so in redis-py 8.1
    assert await parked.lines("default") == []
    (delivery,) = await taken(one, redis, 1)
    await parked.park([job(delivery)])
    assert (await the_line(parked)).jobs == 1


@pytest.mark.parametrize(
    "model",
    ["", "qwen/Qwen3-8B", "a:b:c", "x" * 200, "x" * 201, "with space", "模型", "tab\t", "#marked", "\udc80 alone"],
    ids=ascii,
)
async def test_every_name_of_a_model_makes_a_line(model: str, one: Process, parked: ParkedJobs, redis: Redis) -> None:
    (delivery,) = await taken(one, redis, 1)
    assert await parked.park([job(delivery, model=model, tenant="t")]) == [True]
    line = await the_line(parked)
    assert (line.model, line.bucket) == (model_of_line(model), bucket_of("t"))
    assert (line.model == model) == (model in ("", "qwen/Qwen3-8B", "a:b:c", "x" * 200))
    assert len(await parked.take(line, 1)) == 1


def test_tenants_share_64_buckets() -> None:
    buckets = {bucket_of(f"tenant-{number}") for number in range(5000)}
    assert len(buckets) == 64
    assert bucket_of("") not in buckets


async def test_parked_jobs_count_as_waiting_and_not_as_pending(one: Process, parked: ParkedJobs, redis: Redis) -> None:
    deliveries = await taken(one, redis, 4)
    await redis.xadd("chat:jobs", {"id": "unread"})
    await parked.park([job(delivery) for delivery in deliveries[:3]])
    depth = await one.jobs.depth("default")
    assert depth.oldest == deliveries[3].enqueued
    knows_lag = (await redis.xinfo_groups("chat:jobs"))[0].get("lag") is not None
    assert depth.waiting == (4 if knows_lag else None)
    assert await waiting_in(redis, "chat:jobs") == 4
    await one.jobs.acknowledge(deliveries[3])
    assert (await one.jobs.depth("default")).oldest is None


async def test_parked_jobs_are_not_trimmed(one: Process, parked: ParkedJobs, redis: Redis) -> None:
    first, second = await taken(one, redis, 2)
    await parked.park([job(first)])
    await one.jobs.acknowledge(second)
    await one.jobs.trim("default")
    assert [delivery.id for delivery in await parked.take(await the_line(parked), 1)] == [first.id]


async def test_empty_lines_are_removed_like_consumers_of_dead_workers(
    one: Process, parked: ParkedJobs, redis: Redis
) -> None:
    full, empty = await taken(one, redis, 2)
    await parked.park([job(full, model="full"), job(empty, model="empty")])
    (line,) = [line for line in await parked.lines("default") if line.model == "empty"]
    await parked.take(line, 1)
    await one.jobs.hand_over([empty])
    await claim_expired(one.abandoned)
    await one.jobs.remove_stale_consumers("default", {"one"}, idle=0)
    names = {cast("bytes", consumer["name"]).decode() for consumer in await redis.xinfo_consumers("chat:jobs", GROUP)}
    assert names == {"one", "waiting:-:full"}
    assert HANDED_OVER not in names

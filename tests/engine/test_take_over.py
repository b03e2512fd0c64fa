"""Which jobs are taken over, when idle times are read for that, and what counts as an outage of Redis, after which
take-overs wait for a moment.
"""

import asyncio
from typing import Any, cast

import pytest
from conftest import StartSimulator, StartWorker
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker import Client, Delta
from worker.contract.keys import GROUP
from worker.engine.pace import Pace
from worker.engine.take_over import OutageHoldOff, SilenceForecast
from worker.sandbox.simulator.server import Simulator
from worker.telemetry.logging import configure_logging

LEASE = 12.0
LIMIT = 1.0
"""The longest round trip that is prompt, with this lease."""


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def hold_off(time: Time) -> OutageHoldOff:
    """A hold-off of a process that has started long ago."""
    hold_off = OutageHoldOff(LEASE, time)
    time.now = 100.0
    return hold_off


def test_a_process_that_has_just_started_holds_off(time: Time) -> None:
    hold_off = OutageHoldOff(LEASE, time)
    assert hold_off.holds
    time.now = LEASE / 2
    assert not has_held(hold_off)


def test_after_an_outage_there_is_half_a_lease_for_the_owners(time: Time, hold_off: OutageHoldOff) -> None:
    assert not has_held(hold_off)
    hold_off.on_failure()
    time.now += 2 * LEASE
    assert hold_off.holds, "Redis has not answered yet"
    hold_off.on_reply(0.0)
    time.now += LEASE / 2 - 0.1
    hold_off.on_reply(0.0)
    assert hold_off.holds
    time.now += 0.2
    assert not has_held(hold_off)


def has_held(hold_off: OutageHoldOff) -> bool:
    return hold_off.holds


@pytest.mark.parametrize(("took", "holds"), [(LIMIT, False), (LIMIT + 0.1, True), (3 * LEASE, True)])
def test_a_slow_reply_is_an_outage(took: float, holds: bool, hold_off: OutageHoldOff) -> None:  # noqa: FBT001 - drawn
    hold_off.on_reply(took)
    assert hold_off.holds is holds


def test_with_a_short_lease_a_shorter_wait_is_an_outage(time: Time) -> None:
    hold_off = OutageHoldOff(0.6, time)
    time.now = 1.0
    hold_off.on_reply(0.2)
    assert hold_off.holds


def test_a_redis_that_is_always_slow_does_not_prevent_take_overs_forever(time: Time, hold_off: OutageHoldOff) -> None:
    began = time.now
    hold_off.on_reply(2.0)
    while hold_off.holds:
        time.now += 2.0
        hold_off.on_reply(2.0)
        assert time.now < began + 4 * LEASE
    assert time.now > began + 2 * LEASE


def test_a_long_outage_after_long_slowness_holds_off_too(time: Time, hold_off: OutageHoldOff) -> None:
    for _ in range(100):
        time.now += 2.0
        hold_off.on_reply(2.0)
    assert not hold_off.holds
    hold_off.on_reply(20.0)
    assert hold_off.holds


@pytest.fixture
def forecast(time: Time) -> SilenceForecast:
    """A forecast whose process has listed workers before."""
    forecast = SilenceForecast(LEASE, time)
    forecast.on_listed([], time.now)
    return forecast


def is_due(forecast: SilenceForecast) -> bool:
    return forecast.may_be_silent


def test_a_process_that_has_just_started_reads_the_idle_times_if_workers_have_jobs(time: Time) -> None:
    forecast = SilenceForecast(LEASE, time)
    forecast.on_listed([], time.now)
    assert not is_due(forecast)
    forecast = SilenceForecast(LEASE, time)
    forecast.on_listed(["one"], time.now)
    assert is_due(forecast)


def test_idle_times_are_read_when_the_lease_of_the_most_idle_worker_may_have_passed(
    time: Time, forecast: SilenceForecast
) -> None:
    forecast.on_listed(["one", "two"], time.now)
    assert forecast.on_read({"one": 5.0, "two": 1.0, "idle": 99.0}, time.now) == set()
    time.now += LEASE - 5.0
    assert not is_due(forecast)
    time.now += 0.1
    assert is_due(forecast)
    assert forecast.on_read({"one": 0.1, "two": 8.1}, time.now) == set(), "one has renewed"
    assert not is_due(forecast)
    time.now += LEASE - 8.0
    assert is_due(forecast)
    assert forecast.on_read({"one": 4.1, "two": LEASE + 0.1}, time.now) == {"two"}
    assert is_due(forecast), "until another worker has the jobs of the silent one"
    forecast.on_listed(["one"], time.now)
    assert not is_due(forecast)


def test_a_worker_that_has_jobs_again_cannot_be_silent_for_a_lease(time: Time, forecast: SilenceForecast) -> None:
    time.now += 100.0
    forecast.on_listed([], time.now)
    time.now += 1.0
    forecast.on_listed(["one"], time.now)
    time.now += LEASE - 1.0
    assert not is_due(forecast), "it got the jobs after the list without it"
    time.now += 0.1
    assert is_due(forecast)


CHAT: dict[str, object] = {"model": "reciter", "messages": [{"role": "user", "content": "Hello"}]}


async def read_as(redis: Redis, consumer: str) -> str:
    reply = cast("Any", await redis.xreadgroup(GROUP, consumer, {"chat:jobs": ">"}, count=1))
    return cast("bytes", reply[0][1][0][0]).decode()


async def test_a_queue_whose_key_has_the_wrong_type_does_not_prevent_take_overs_in_others(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    request_id = await client.enqueue(CHAT)
    await read_as(redis, "gone")
    await start_worker(await start_simulator(), lease=2, queues="bad,default")
    await eventually(lambda: has_key(redis, "chat:workers"))
    await redis.delete("chat:jobs:bad")
    await redis.set("chat:jobs:bad", "no stream")
    try:
        assert (await asyncio.wait_for(client.result(request_id), 300)).outcome == "done"
    finally:
        await redis.delete("chat:jobs:bad")


async def has_key(redis: Redis, key: str) -> bool:
    return bool(await redis.exists(key))


async def test_a_search_rarely_reads_the_idle_times_of_workers_that_renew_their_leases(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """With many lines of parked jobs, XINFO CONSUMERS is the most expensive command of an idle worker."""
    await redis.xgroup_create("chat:jobs", GROUP, id="0", mkstream=True)
    await client.enqueue(CHAT)
    job = await read_as(redis, "other")
    read = await calls_of(redis, "xinfo|consumers", "xinfo")
    await start_worker(await start_simulator(), lease=4, pace=Pace(scan_every=0.05))

    async def has_read() -> bool:
        await redis.xclaim("chat:jobs", GROUP, "other", 0, [job], justid=True)
        return await calls_of(redis, "xinfo|consumers", "xinfo") > read

    await eventually(has_read)
    read, searched = await calls_of(redis, "xinfo|consumers", "xinfo"), await calls_of(redis, "xpending")

    async def has_searched() -> bool:
        await redis.xclaim("chat:jobs", GROUP, "other", 0, [job], justid=True)
        return await calls_of(redis, "xpending") >= searched + 40

    await eventually(has_searched)
    assert await calls_of(redis, "xinfo|consumers", "xinfo") <= read + 10


async def calls_of(redis: Redis, *commands: str) -> int:
    """The calls of a command. Redis before 7.0 does not count subcommands on their own."""
    stats = await redis.info("commandstats")
    return sum(stats[name]["calls"] for name in (f"cmdstat_{command}" for command in commands) if name in stats)


async def test_a_job_that_a_worker_of_an_earlier_version_handed_over_continues(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """It is still pending with that worker, which renews the leases of its other jobs."""
    await redis.xgroup_create("chat:jobs", GROUP, id="0", mkstream=True)
    request_id, _ = [await client.enqueue(CHAT) for _ in range(2)]
    handed_over, other = await read_as(redis, "old"), await read_as(redis, "old")
    await start_worker(await start_simulator(), lease=8)
    await redis.xclaim("chat:jobs", GROUP, "old", 0, [handed_over], idle=16_000, retrycount=0, justid=True)

    async def renew() -> None:
        while True:
            await redis.xclaim("chat:jobs", GROUP, "old", 0, [other], justid=True)
            await asyncio.sleep(0.5)

    renewing = asyncio.create_task(renew())
    assert (await asyncio.wait_for(client.result(request_id), 60)).outcome == "done"
    renewing.cancel()


SELDOM = Pace(scan_every=1000)
STALLS: dict[str, object] = {"simulate": {"fault": "stall", "after": 3, "times": 1}}
"""The first answer stands still until its worker has left."""


@pytest.mark.parametrize("may_publish", [True, False], ids=["with a hint", "without the right to hints"])
async def test_a_job_that_is_handed_over_continues_at_once(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator, redis_url: str, *, may_publish: bool
) -> None:
    """The worker that hands it over publishes a hint. Workers that do not get it search twice a second."""
    await redis.acl_setuser(
        "draining", enabled=True, passwords="+pw", keys=["*"], categories=["+@all"], reset_channels=not may_publish,
        channels=["*"] if may_publish else [],
    )  # fmt: skip
    as_user = redis_url.replace("//", "//draining:pw@")
    first = await start_worker(simulator, redis_url=as_user, drain_timeout=0, lease=3600, gap_timeout=600)
    request_id = await client.enqueue(CHAT | STALLS)
    async for entry in client.follow(request_id):
        if isinstance(entry, Delta):
            break
    await start_worker(simulator, lease=3600, pace=SELDOM if may_publish else Pace(scan_every=0.1))

    async def is_subscribed() -> bool:
        return dict(await redis.pubsub_numsub("chat:control"))[b"chat:control"] == 1 + may_publish

    await eventually(is_subscribed)
    first.stop()
    answer = await asyncio.wait_for(client.result(request_id), 60)
    assert (answer.outcome, answer.attempt) == ("done", 2)
    await redis.acl_deluser("draining")


async def test_a_hand_over_is_reported_though_redis_does_not_answer_its_hint(
    client: Client,
    redis_proxy: Proxy,
    start_worker: StartWorker,
    simulator: Simulator,
    capfd: pytest.CaptureFixture[str],
) -> None:
    configure_logging("json", "info")
    hint = redis_proxy.hold(rb"^PUBLISH chat:control handed-over")
    worker = await start_worker(
        simulator, redis_url=redis_proxy.redis_url, drain_timeout=0, lease=3600, gap_timeout=600
    )
    async for entry in client.follow(await client.enqueue(CHAT | STALLS)):
        if isinstance(entry, Delta):
            break
    worker.stop()
    await asyncio.wait_for(hint.met.wait(), 60)
    logged = capfd.readouterr().err
    assert "jobs_handed_over" in logged
    assert "hand_over_failed" not in logged

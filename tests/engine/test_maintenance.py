"""What maintenance logs of a Redis that does not answer or refuses: all that it met, and nothing else."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from processes import Process, process, stolen
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError
from structlog.testing import capture_logs
from waits import eventually

from worker.broker.job_queue import Delivery, JobQueue
from worker.broker.publisher import Publisher
from worker.contract.keys import Keys
from worker.engine.job_context import Stop
from worker.engine.maintenance import Maintenance
from worker.engine.running_jobs import RunningJobs
from worker.redisio.clients import command_client
from worker.settings import load_settings
from worker.telemetry.events import Receivers
from worker.telemetry.logging import LogReceiver, configure_logging


def of_leases(lease: float, leases: RunningJobs, publisher: object) -> Maintenance:
    """The part of maintenance that needs nothing but the leases and the publisher."""
    absent = cast("Any", None)
    return Maintenance(
        load_settings(lease=lease),
        jobs=absent,
        running_jobs=leases,
        registry=absent,
        lifecycle=absent,
        dead_letters=absent,
        publisher=cast("Publisher", publisher),
        clock=absent,
        record=absent,
        telemetry=LogReceiver(),
    )


async def test_a_round_without_leases_does_not_report_redis_as_recovered() -> None:
    redis = command_client("redis://127.0.0.1:1")
    leases = RunningJobs(
        JobQueue(redis, redis, Keys(), "w", 0.5), until_stopped, lambda: None, lease=0.5, telemetry=Receivers()
    )
    looks: list[None] = []
    publisher = SimpleNamespace(verify_idle=lambda: looks.append(None))
    maintenance = of_leases(0.5, leases, publisher)

    async def renewal_has_failed() -> bool:
        return bool(logs)

    async def rounds_without_a_job() -> bool:
        if leases:
            looks.clear()
        return len(looks) > 1

    configure_logging("json")
    with capture_logs() as logs:
        leases.start([Delivery("default", "1-0", {})], time.monotonic())
        keeping = asyncio.create_task(maintenance.keep_leases())
        await eventually(renewal_has_failed)
        leases.cancel()
        await eventually(rounds_without_a_job)
        maintenance.stop()
        await keeping
    await redis.aclose()
    assert [line["event"] for line in logs] == ["renewal_failed"]


async def test_a_renewal_that_redis_refuses_is_raised(one: Process, redis: Redis) -> None:
    """Without permission to XCLAIM a job stream, a worker would otherwise lose its jobs without a warning."""
    await redis.xadd("chat:jobs", {"id": "a"})
    await one.jobs.ensure_group("other")
    await redis.xadd("chat:jobs:other", {"id": "b"})
    leases = RunningJobs(one.jobs, until_stopped, lambda: None, lease=10, telemetry=Receivers())
    for queue in ("default", "other"):
        leases.start(await one.jobs.read_new(queue, 1, 500), time.monotonic())
    await redis.acl_setuser("default", commands=["-xclaim"], enabled=True)
    try:
        with pytest.raises(NoPermissionError):
            await leases.renew_all()
    finally:
        await redis.acl_setuser("default", commands=["+xclaim"], enabled=True)
    assert await leases.renew_all()
    leases.cancel()


async def until_stopped(
    _: Delivery, stop: "asyncio.Future[Stop]", _free: Callable[[], None], _demand: object, *, may_park: bool
) -> None:
    del may_park
    await stop


async def test_a_lease_that_expires_while_redis_does_not_answer_is_renewed_when_it_does(
    redis_proxy: Proxy, redis: Redis
) -> None:
    """A lease that expires in an outage says nothing about its owner."""
    await redis.xadd("chat:jobs", {"id": "a"})
    async with process(redis_proxy.redis_url, "behind") as behind:
        await behind.jobs.ensure_group("default")
        leases = RunningJobs(behind.jobs, until_stopped, lambda: None, lease=0.6, telemetry=Receivers())
        leases.start(deliveries := await behind.jobs.read_new("default", 1, 500), time.monotonic())
        renewal = redis_proxy.hold(b"XCLAIM")
        renewing = asyncio.create_task(leases.renew_all())
        await renewal.met.wait()

        async def expired() -> bool:
            (pending,) = await redis.xpending_range("chat:jobs", "workers", "-", "+", 1)
            return int(pending["time_since_delivered"]) > 1200

        await eventually(expired)
        renewal.release()
        assert await renewing
        assert len(leases) == 1
        assert (await behind.jobs.idle_times(deliveries))[0] is not None
        leases.cancel()


async def test_a_renewal_counts_though_its_reply_was_lost(one: Process, redis: Redis) -> None:
    """The entry is then too young for the next renewal, which would look as if another worker had the job."""
    await redis.xadd("chat:jobs", {"id": "a"})
    leases = RunningJobs(one.jobs, until_stopped, lambda: None, lease=10, telemetry=Receivers())
    (delivery,) = await one.jobs.read_new("default", 1, 500)
    long_ago = time.monotonic() - 9
    leases.start([delivery], long_ago)
    assert await one.jobs.renew_leases([(delivery, 4.0)]) == [True], "the renewal whose reply was lost"
    assert await leases.renew_all()
    assert len(leases) == 1
    await leases_are_kept(leases)
    leases.cancel()


async def leases_are_kept(leases: RunningJobs) -> None:
    await asyncio.sleep(0)
    assert len(leases) == 1
    assert await leases.renew_all()


@pytest.mark.parametrize("expired", [True, False])
async def test_a_job_whose_renewal_is_refused_is_stopped_once_its_lease_has_expired(
    expired: bool,  # noqa: FBT001 - a parameter of the test
    one: Process,
    redis: Redis,
) -> None:
    await redis.xadd("chat:jobs", {"id": "a"})
    reasons: list[Stop] = []

    async def work(
        _: Delivery, stop: "asyncio.Future[Stop]", _free: Callable[[], None], _demand: object, *, may_park: bool
    ) -> None:
        del may_park
        reasons.append(await stop)

    leases = RunningJobs(one.jobs, work, lambda: None, lease=10, telemetry=Receivers())
    leases.start(await one.jobs.read_new("default", 1, 500), time.monotonic() - (11 if expired else 5))
    await redis.acl_setuser("default", commands=["-xclaim"], enabled=True)
    try:
        with pytest.raises(NoPermissionError):
            await leases.renew_all()
    finally:
        await redis.acl_setuser("default", commands=["+xclaim"], enabled=True)
    if expired:

        async def stopped() -> bool:
            return reasons == [Stop.LEASE_LOST]

        await eventually(stopped)
    else:
        await leases_are_kept(leases)
    leases.cancel()


async def test_a_job_that_another_worker_has_is_stopped(one: Process, two: Process, redis: Redis) -> None:
    await redis.xadd("chat:jobs", {"id": "a"})
    stopped: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()

    async def work(
        _: Delivery, stop: "asyncio.Future[Stop]", _free: Callable[[], None], _demand: object, *, may_park: bool
    ) -> None:
        del may_park
        stopped.set_result(await stop)

    leases = RunningJobs(one.jobs, work, lambda: None, lease=10, telemetry=Receivers())
    (delivery,) = await one.jobs.read_new("default", 1, 500)
    leases.start([delivery], time.monotonic() - 12)
    await stolen(redis, two, delivery)
    await leases.renew_all()
    assert await stopped is Stop.LEASE_LOST

"""What maintenance logs of a Redis that does not answer or refuses: all that it met, and nothing else."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from processes import Process, process
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

    async def rounds_without_a_job() -> bool:
        if leases:
            looks.clear()
        return len(looks) > 1

    configure_logging("json")
    with capture_logs() as logs:
        leases.start([Delivery("default", "1-0", {})], time.monotonic())
        keeping = [asyncio.create_task(keep()) for keep in (maintenance.keep_leases, maintenance.watch_expiry)]
        await eventually(rounds_without_a_job)
        maintenance.stop()
        await asyncio.gather(*keeping)
    await redis.aclose()
    assert [line["event"] for line in logs] == ["renewal_failed"]


async def test_a_renewal_that_redis_refuses_is_raised(one: Process, redis: Redis) -> None:
    """Without permission to XCLAIM a job stream, a worker would otherwise lose its jobs without a warning."""
    await redis.xadd("chat:jobs", {"id": "a"})
    await one.jobs.ensure_group("other")
    await redis.xadd("chat:jobs:other", {"id": "b"})
    leases = RunningJobs(one.jobs, until_stopped, lambda: None, lease=10, telemetry=Receivers())
    for queue in ("default", "other"):
        leases.start(await one.jobs.read_new(queue, 1, 500), sent=0.0)
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


async def test_a_job_whose_lease_ends_is_stopped_while_a_renewal_waits_for_redis(
    redis_proxy: Proxy, redis: Redis
) -> None:
    await redis.xadd("chat:jobs", {"id": "a"})
    async with process(redis_proxy.redis_url, "behind") as behind:
        await behind.jobs.ensure_group("default")
        stopped: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()

        async def work(
            _: Delivery, stop: "asyncio.Future[Stop]", _free: Callable[[], None], _demand: object, *, may_park: bool
        ) -> None:
            del may_park
            stopped.set_result(await stop)

        leases = RunningJobs(behind.jobs, work, lambda: None, lease=0.6, telemetry=Receivers())
        maintenance = of_leases(0.6, leases, behind.publisher)
        leases.start(await behind.jobs.read_new("default", 1, 500), time.monotonic())
        renewal = redis_proxy.hold(b"XCLAIM")
        configure_logging("json")
        with capture_logs() as logs:
            keeping = [asyncio.create_task(keep()) for keep in (maintenance.keep_leases, maintenance.watch_expiry)]
            assert await stopped is Stop.LEASE_LOST
        assert renewal.met.is_set()
        assert logs == [], "the renewal still waits"
        await redis_proxy.heal()
        maintenance.stop()
        await asyncio.gather(*keeping)

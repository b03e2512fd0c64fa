"""Stalls of Redis: which logs count, and for how long."""

import asyncio
import time

from processes import Process, deliver, delta, process
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker.broker.log_writer import LogWriter
from worker.contract.ids import SEAL
from worker.telemetry.events import Event, ReaderGap, WriteFailed


class Gaps:
    """Keeps the gaps, counts the writes that failed, and ignores other events."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.failures = 0

    def emit(self, event: Event) -> None:
        self.failures += isinstance(event, WriteFailed)
        if isinstance(event, ReaderGap):
            assert event.cause == "redis"
            self.seconds.append(event.seconds)


async def begun(one: Process, redis: Redis) -> LogWriter:
    """A log with a delta that Redis has accepted."""
    log = await one.acquire(await deliver(one, redis))
    log.append(delta("a"))
    await log.wait_drained()
    return log


async def interrupted(proxy: Proxy, log: LogWriter, gaps: Gaps) -> None:
    """Let writes fail until some time after the first failure with the next entry of the log."""
    proxy.refuse()
    await proxy.cut()
    log.append(delta("b"))
    before = gaps.failures

    async def has_failed() -> bool:
        return gaps.failures > before

    await eventually(has_failed)
    failed = time.monotonic()

    async def some_time_later() -> bool:
        return time.monotonic() > failed + 0.5

    await eventually(some_time_later)


async def test_a_write_that_failed_leaves_a_gap_up_to_the_next_accepted_entry(redis_proxy: Proxy, redis: Redis) -> None:
    gaps = Gaps()
    async with process(redis_proxy.redis_url, "one", telemetry=gaps) as one:
        began = time.monotonic()
        log = await begun(one, redis)
        await interrupted(redis_proxy, log, gaps)
        await redis_proxy.heal()
        await log.wait_drained()

        async def emitted() -> bool:
            return bool(gaps.seconds)

        await eventually(emitted)
        log.append(delta("c"))
        await log.wait_drained()
    (gap,) = gaps.seconds
    # The gap begins with the first attempt after the entry, which may wait for a backoff.
    assert 0 < gap <= time.monotonic() - began


async def test_a_write_that_was_late_leaves_a_gap(redis_url: str, redis: Redis) -> None:
    gaps = Gaps()
    async with process(redis_url, "one", telemetry=gaps) as one:
        log = await begun(one, redis)
        await redis.client_pause(60_000, all=False)
        log.append(delta("b"))
        for _ in range(5):  # the event loop runs meanwhile, however late: the publisher looks as often
            await asyncio.sleep(0.5)
        await redis.client_unpause()
        await log.wait_drained()
    (gap,) = gaps.seconds
    assert 2 <= gap < 60


async def test_a_reply_that_is_late_because_the_process_stood_still_leaves_no_gap(redis_url: str, redis: Redis) -> None:
    gaps = Gaps()
    async with process(redis_url, "one", telemetry=gaps) as one:
        log = await begun(one, redis)
        log.append(delta("b"))
        await asyncio.sleep(0)  # the entry is sent
        time.sleep(2)  # noqa: ASYNC251 - it stands for a process without CPU
        await log.wait_drained()
    assert gaps.seconds == []


async def test_a_log_that_had_not_begun_or_is_lost_has_no_gap(redis_proxy: Proxy, redis: Redis) -> None:
    gaps = Gaps()
    async with process(redis_proxy.redis_url, "one", telemetry=gaps) as one:
        log = await one.acquire(await deliver(one, redis))
        await interrupted(redis_proxy, log, gaps)
        await redis_proxy.heal()
        await log.wait_drained()
        await interrupted(redis_proxy, log, gaps)
        await redis.xadd(log.key, {"type": "cancelled"}, id=str(SEAL))
        await redis.expire(log.key, 60)
        await redis_proxy.heal()
        await log.lost
    assert gaps.seconds == []

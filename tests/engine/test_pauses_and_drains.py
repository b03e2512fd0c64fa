"""What operators ask of a running worker: it takes no jobs of a paused queue, and drains when that is asked of it."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from conftest import StartWorker, metric, stream
from redis.asyncio import Redis
from waits import eventually

from worker import Client, Delta
from worker.broker.control import Control
from worker.broker.worker_registry import WorkerRegistry
from worker.contract.keys import Keys
from worker.contract.records import WorkerRecord
from worker.redisio.clock import Clock
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator
from worker.telemetry.logging import configure_logging

MESSAGES = [{"role": "user", "content": "Who are you?"}]
REQUEST = {"messages": MESSAGES}
SLOW = REQUEST | {"simulate": {"rate": 20}}


@pytest.fixture
async def control(redis: Redis) -> Control:
    clock = Clock(redis)
    await clock.sync()
    return Control(redis, Keys(), clock.now)


async def records(redis: Redis) -> list[WorkerRecord]:
    return list((await WorkerRegistry(redis, Keys()).records()).values())


def shows_paused(redis: Redis, *queues: str) -> Callable[[], Awaitable[bool]]:
    async def shown() -> bool:
        return [record.paused_queues for record in await records(redis)] == [queues]

    return shown


def is_removed(redis: Redis) -> Callable[[], Awaitable[bool]]:
    async def removed() -> bool:
        return not await redis.exists("chat:control")

    return removed


async def has_begun(client: Client, request_id: str) -> None:
    async with asyncio.timeout(60):
        async for entry in client.follow(request_id):
            if isinstance(entry, Delta):
                return


async def test_no_job_of_a_paused_queue_starts_while_others_and_running_ones_go_on(
    redis: Redis, client: Client, control: Control, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, queues="default,bulk")
    running = await client.enqueue(SLOW, queue="bulk")
    await has_begun(client, running)
    await control.pause("bulk", by="ops")
    await eventually(shows_paused(redis, "bulk"))
    assert metric(worker, "queue_paused", queue="bulk") == 1
    assert metric(worker, "queue_paused", queue="default") == 0
    waits = await client.enqueue(REQUEST, queue="bulk")
    for _ in range(3):
        assert (await client.result(await client.enqueue(REQUEST))).outcome == "done"
    assert (await client.result(running)).text == answer_to(MESSAGES)
    assert (await client.status(waits)).state.value == "queued"
    await control.resume("bulk")
    assert (await client.result(waits)).outcome == "done"
    await eventually(shows_paused(redis))
    assert await redis.smembers("chat:queues") == {b"default", b"bulk"}


async def test_a_pause_from_before_the_start_holds_and_ends_by_itself(
    redis: Redis, client: Client, control: Control, start_worker: StartWorker, simulator: Simulator
) -> None:
    pause = await control.pause("default", by="ops", seconds=0.5)
    waits = await client.enqueue(REQUEST)
    await start_worker(simulator, lease=60)  # so that no regular read is due at the end of the pause
    assert (await client.result(waits)).outcome == "done"
    (begun,) = [fields for _, fields in await stream(redis, Keys().tokens(waits)) if b"worker" in fields]
    assert int(begun[b"time"]) >= pause.until
    await eventually(is_removed(redis))


async def test_a_worker_drains_when_it_is_asked_and_another_continues_its_jobs(
    redis: Redis,
    client: Client,
    control: Control,
    start_worker: StartWorker,
    simulator: Simulator,
    capfd: pytest.CaptureFixture[str],
) -> None:
    configure_logging("json", "warning")
    await start_worker(simulator, drain_timeout=0.1)
    running = await client.enqueue(SLOW)
    await has_begun(client, running)
    await eventually(shows_paused(redis))
    (former,) = await records(redis)
    await start_worker(simulator)
    await control.drain(former.name, by="ops@host", why="maintenance")
    answer = await client.result(running)
    assert answer.text == answer_to(MESSAGES)

    async def has_left() -> bool:
        return former.name not in [record.name for record in await records(redis)]

    await eventually(has_left)
    await eventually(is_removed(redis))
    logged = [line for line in capfd.readouterr().err.splitlines() if "drain_requested" in line]
    assert len(logged) == 1
    assert '"by":"ops@host"' in logged[0].replace(": ", ":")


async def test_drains_of_other_processes_are_removed_and_ignored(
    redis: Redis, client: Client, control: Control, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator)
    await eventually(shows_paused(redis))
    (record,) = await records(redis)
    await redis.hset("chat:control", f"drain:{record.name}", '{"since": 1}')  # of an earlier process of that name
    await control.drain("gone", by="ops")
    await eventually(is_removed(redis))
    assert (await client.result(await client.enqueue(REQUEST))).outcome == "done"
    assert not (await records(redis))[0].draining


async def test_a_control_hash_that_cannot_be_read_is_reported_and_jobs_go_on(
    redis: Redis, client: Client, start_worker: StartWorker, simulator: Simulator, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json", "info")
    await redis.set("chat:control", "of somebody else")
    await start_worker(simulator, lease=1)
    for _ in range(2):
        assert (await client.result(await client.enqueue(REQUEST))).outcome == "done"
    await redis.delete("chat:control")
    logged = ""

    async def has_recovered() -> bool:
        nonlocal logged
        logged += capfd.readouterr().err
        return "recovered" in logged

    await eventually(has_recovered)
    assert logged.count("control_failed") == 2, "once for the failure, once for its end"

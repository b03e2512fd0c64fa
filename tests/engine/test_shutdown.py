"""A worker that must stop at once: other workers continue its jobs, and nothing is lost."""

import asyncio

import pytest
from conftest import StartSimulator, StartWorker
from proxy import Proxy
from redis.asyncio import Redis
from steered_clock import SteeredClock
from structlog.testing import capture_logs
from waits import eventually

from worker import Answer, Client
from worker.broker.consumers import HANDED_OVER, HANDED_OVER_IDLE
from worker.engine.application import Worker
from worker.engine.pace import Pace
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario
from worker.settings import load_settings
from worker.telemetry.logging import configure_logging

NEVER = 60
"""A lease of a minute: within a test only a job that is handed over goes to another worker."""


def chat_request(content: str = "Who are you?") -> dict[str, object]:
    return {"model": "reciter", "messages": [{"role": "user", "content": content}]}


def stop_at_once(worker: Worker) -> None:
    """Stop as a second SIGTERM or SIGINT does."""
    worker.stop()
    worker.stop()


async def pending(redis: Redis) -> int:
    return sum([group["pending"] for group in await redis.xinfo_groups("chat:jobs")])


async def all_whole(redis: Redis, answers: list[Answer], questions: list[str]) -> None:
    assert [answer.text for answer in answers] == [
        answer_to(chat_request(question)["messages"]) for question in questions
    ]

    async def nothing_pending() -> bool:
        return not await pending(redis)

    await eventually(nothing_pending)


async def test_a_second_stop_signal_loses_nothing(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=8)
    simulator = await start_simulator(clock=clock)
    first = await start_worker(simulator, lease=NEVER, drain_timeout=600, gap_timeout=600)
    questions = [f"question {n}" for n in range(4)]
    ids = [await client.enqueue(chat_request(question)) for question in questions]

    async def all_run() -> bool:
        return sum(served.chunks > 2 for served in simulator.served) == 4

    await eventually(all_run)
    configure_logging("json")
    with capture_logs() as logs:
        stop_at_once(first)

        async def are_handed_over() -> bool:
            return any(line["event"] == "jobs_handed_over" for line in logs)

        await eventually(are_handed_over)
        clock.release()
        await start_worker(simulator, lease=NEVER)
        await all_whole(redis, list(await asyncio.gather(*map(client.result, ids))), questions)

    assert [line["attempt"] for line in logs if line["event"] == "job_taken_over"] == [2] * 4
    assert [line["jobs"] for line in logs if line["event"] == "jobs_handed_over"] == [4]
    assert first._running_jobs.finished == 0, "jobs that were handed over have not ended here"


async def test_a_worker_whose_only_slot_waits_in_a_read_also_takes_over(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=8)
    simulator = await start_simulator(clock=clock)
    first = await start_worker(simulator, lease=NEVER, drain_timeout=600, gap_timeout=600)
    request_id = await client.enqueue(chat_request())

    async def runs() -> bool:
        return [served.chunks > 2 for served in simulator.served] == [True]

    await eventually(runs)
    second = await start_worker(simulator, lease=NEVER, slots=1, queues="default,other,third")

    async def all_slots_wait() -> bool:
        return second._intake._slots._free == 0

    await eventually(all_slots_wait)
    stop_at_once(first)
    assert (await second_attempt(client, request_id)) == 2
    clock.release()
    await all_whole(redis, [await client.result(request_id)], ["Who are you?"])


async def second_attempt(client: Client, request_id: str) -> int:
    """Wait until another worker has taken the job over. Returns the number of its attempt."""
    async for entry in client.follow(request_id):
        if entry.id.attempt > 1:
            return entry.id.attempt
    raise AssertionError("no worker has taken the job over")


@pytest.mark.parametrize("command", ["XREADGROUP", "XCLAIM"])
async def test_jobs_that_arrive_during_the_shutdown_are_handed_over_too(
    command: str,
    client: Client,
    redis: Redis,
    redis_proxy: Proxy,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(rate=100)))
    await redis.xgroup_create("chat:jobs", "workers", mkstream=True)
    request_id = await client.enqueue(chat_request())
    if command == "XCLAIM":  # a dead worker had the job
        await redis.xreadgroup("workers", "dead", {"chat:jobs": ">"})
        job = (await redis.xpending("chat:jobs", "workers"))["min"]
        await redis.xclaim("chat:jobs", "workers", HANDED_OVER, 0, [job], idle=HANDED_OVER_IDLE, justid=True)
    held = redis_proxy.hold_reply(command.encode(), reply=b"request")
    first = await start_worker(simulator, lease=NEVER, drain_timeout=600, redis_url=redis_proxy.redis_url)
    await held.done.wait()
    stop_at_once(first)

    async def no_other_read_is_out() -> bool:
        return not (await redis.info("clients"))["blocked_clients"]

    await eventually(no_other_read_is_out)
    for _ in range(100):  # let the worker do everything that does not depend on the held reply
        await asyncio.sleep(0)
    held.release()
    await start_worker(simulator, lease=NEVER)
    await all_whole(redis, [await client.result(request_id)], ["Who are you?"])


async def test_a_worker_ends_though_redis_does_not_answer_its_last_commands(
    client: Client, redis_proxy: Proxy, start_simulator: StartSimulator
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(rate=100, tokens=2000)))
    settings = load_settings(redis_url=redis_proxy.redis_url, vllm_urls=simulator.url, drain_timeout=600)
    worker = Worker(settings, pace=Pace(last_steps=0.2))
    running = asyncio.create_task(worker.run())
    await client.enqueue(chat_request())

    async def runs() -> bool:
        return [served.chunks > 2 for served in simulator.served] == [True]

    await eventually(runs)
    handing_over = redis_proxy.hold(b"XCLAIM .* RETRYCOUNT")
    configure_logging("json")
    with capture_logs() as logs:
        stop_at_once(worker)
        await handing_over.met.wait()
        redis_proxy.half_open()
        async with asyncio.timeout(60):
            await running
    failed = [entry["event"] for entry in logs if entry["event"].endswith("_failed")]
    assert failed == ["hand_over_failed", "leave_failed"]

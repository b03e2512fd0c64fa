"""Workers that die, stop, leave or stall at the worst moments: another one goes on, and the first does no harm."""

import asyncio
import json
import signal
from pathlib import Path

import pytest
from checks import begun_by_a_dead_worker, chat_request, expected, has_begun, log_of, pending, promise_kept
from conftest import StartProcess, StartSimulator, StartWorker
from proxy import Proxy
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from steered_clock import SteeredClock
from waits import eventually

from worker import Client
from worker.contract.entries import to_json
from worker.sandbox.simulator.server import Options, Scenario, Simulator

LEASE = 1.0


@pytest.fixture
async def paced(start_simulator: StartSimulator) -> Simulator:
    """A vLLM whose answers take about a second."""
    return await start_simulator(Options(scenario=Scenario(rate=40)))


@pytest.fixture
def clock() -> SteeredClock:
    return SteeredClock(halt_after=8)


@pytest.fixture
async def halting(start_simulator: StartSimulator, clock: SteeredClock) -> Simulator:
    """A vLLM whose answers halt after eight tokens, so that every request stays mid-stream."""
    return await start_simulator(clock=clock)


RUN = ["-m", "worker", "run"]
STEPWISE = [str(Path(__file__).with_name("stepwise_worker.py"))]


@pytest.mark.parametrize(
    ("before", "program"),
    [
        (rb"^MULTI\nXADD \S+ NOMKSTREAM 1-[1-9]", RUN),
        (rb"^EVALSHA .* type done .* type finished ", RUN),
        (rb"^EVALSHA .* type done ", STEPWISE),
        (rb"^XADD chat:lifecycle .* finished", STEPWISE),
        (rb"^MULTI\nPUBLISH .*18446744073709551615-", STEPWISE),
        (rb"^XACK", STEPWISE),
    ],
    ids=["mid-stream", "end", "seal", "lifecycle", "feed", "acknowledgement"],
)
async def test_a_worker_that_is_killed_before_it_sends_a_command(
    before: bytes,
    program: list[str],
    client: Client,
    redis: Redis,
    redis_proxy: Proxy,
    start_process: StartProcess,
    start_worker: StartWorker,
    simulator: Simulator,
) -> None:
    held = redis_proxy.hold(before)
    process = start_process(simulator, lease=LEASE, redis_url=redis_proxy.redis_url, program=program)
    request_id = await client.enqueue(chat_request())
    async with asyncio.timeout(300):
        await held.met.wait()
    process.kill()
    await redis_proxy.cut()  # the held command must not arrive later
    process.wait()
    await start_worker(simulator, lease=LEASE)
    await promise_kept(redis, request_id)


@pytest.mark.parametrize("wakes", ["mid-stream of the next", "after the end"])
async def test_a_worker_that_was_paused_past_its_lease_writes_nothing_more_and_does_not_acknowledge(
    wakes: str,
    client: Client,
    redis: Redis,
    redis_proxy: Proxy,
    start_process: StartProcess,
    start_worker: StartWorker,
    simulator: Simulator,
    halting: Simulator,
    *,
    clock: SteeredClock,
) -> None:
    lease = 4.0  # the first worker, once it is awake, takes over what this process does not renew in time
    first = start_process(halting, lease=lease, slots=1)
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id)
    first.send_signal(signal.SIGSTOP)
    try:
        clock.allow(20)  # which the paused worker has yet to read and write
        seal = redis_proxy.hold(rb"^EVALSHA .* type done ")
        await start_worker(simulator, lease=lease, redis_url=redis_proxy.redis_url)
        async with asyncio.timeout(300):
            await seal.met.wait()
        if wakes == "after the end":
            seal.release()
            await promise_kept(redis, request_id)
        before = await log_of(redis, request_id)
        live = await pending(redis)
        seconds, _ = await redis.time()
    finally:
        first.send_signal(signal.SIGCONT)

    async def let_go() -> bool:
        lines = [json.loads(line) for line in (await redis.hgetall("chat:workers")).values()]
        return any(line["slots"] == 1 and not line["running"] and line["beat"] > seconds * 1000 for line in lines)

    await eventually(let_go)
    assert await log_of(redis, request_id) == before
    assert await pending(redis) == live
    seal.release()
    await promise_kept(redis, request_id)


@pytest.mark.parametrize("drain", [20, 0.1], ids=["below the drain", "past the drain"])
async def test_a_worker_that_gets_sigterm_finishes_or_hands_over(
    drain: float,
    client: Client,
    redis: Redis,
    start_process: StartProcess,
    start_worker: StartWorker,
    simulator: Simulator,
    halting: Simulator,
    paced: Simulator,
) -> None:
    # With leases of a minute only a hand-over lets the next worker continue within the time of this test.
    process = start_process(paced if drain == 20 else halting, lease=60, drain_timeout=drain)
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id, 2)
    process.terminate()
    await start_worker(simulator, lease=60)
    ended = await promise_kept(redis, request_id)
    assert await asyncio.to_thread(process.wait, 60) == 0
    assert ended.attempts == (1 if drain == 20 else 2)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_that_gets_a_second_signal_hands_over_at_once(
    how: signal.Signals,
    client: Client,
    redis: Redis,
    start_process: StartProcess,
    start_worker: StartWorker,
    simulator: Simulator,
    halting: Simulator,
    tmp_path: Path,
) -> None:
    # It would drain for longer than the test may take, and the lease of a minute leaves only a hand-over.
    process = start_process(halting, lease=60, drain_timeout=600)
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id, 2)
    process.send_signal(how)

    async def drains() -> bool:
        return b"worker_draining" in (tmp_path / "worker-0.log").read_bytes()

    await eventually(drains)
    assert process.poll() is None, "the first signal lets the job run on"
    process.send_signal(how)
    assert await asyncio.to_thread(process.wait, 60) == 0
    await start_worker(simulator, lease=60)
    assert (await promise_kept(redis, request_id)).attempts == 2


async def test_a_stalled_event_loop_costs_the_lease_and_nothing_else(
    client: Client, redis: Redis, redis_url: str, start_worker: StartWorker, paced: Simulator
) -> None:
    lease = 0.5
    await start_worker(paced, lease=lease)
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id)
    stall_past_the_lease(redis_url, lease)
    await promise_kept(redis, request_id)


def stall_past_the_lease(redis_url: str, lease: float) -> None:
    """Block the event loop until Redis shows that the job has been idle for longer than a lease."""
    with BlockingRedis.from_url(redis_url) as redis:
        while True:
            (line,) = redis.xpending_range("chat:jobs", "workers", "-", "+", 1)
            if line["time_since_delivered"] > 2 * lease * 1000:
                return


async def test_a_dead_workers_job_is_found_behind_many_live_ones(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    for number in range(100):
        await redis.xadd("chat:jobs", {"id": f"live-{number}"})
    await redis.xreadgroup("workers", "alive", {"chat:jobs": ">"})
    live = [job for job, _ in await pending(redis)]
    request_id = await client.enqueue(chat_request())
    await begun_by_a_dead_worker(redis, request_id)
    await start_worker(simulator, lease=60, slots=4)

    async def answered() -> bool:
        return [job for job, _ in await pending(redis)] == live

    await eventually(answered)
    await redis.xack("chat:jobs", "workers", *live)
    await promise_kept(redis, request_id)


async def test_two_releases_side_by_side_understand_each_other(
    client: Client,
    redis: Redis,
    start_process: StartProcess,
    start_worker: StartWorker,
    simulator: Simulator,
    halting: Simulator,
) -> None:
    """A later release may write types and fields that this one does not know, and each may take over from the other."""
    request_id = await client.enqueue(chat_request())
    await begun_by_a_dead_worker(
        redis,
        request_id,
        {"type": "opened", "model": "reciter", "colour": "blue"},
        {"type": "telemetry", "temperature": "21"},
        {"type": "delta", "content": "The river", "mood": "calm"},
    )
    await redis.hset("chat:workers", "later", '{"v": 2, "pulse": "strong"}')
    first = start_process(halting, lease=LEASE, slots=3, queues="default,low", drain_timeout=0.1)
    await has_begun(redis, request_id, 2, attempt=2)
    questions = [f"question {number}" for number in range(8)]
    ids = [await client.enqueue(chat_request(question)) for question in questions]
    await start_worker(simulator, lease=LEASE, slots=5, tries=7)
    first.terminate()
    await promise_kept(redis, request_id)
    for question, each in zip(questions, ids, strict=True):
        await promise_kept(redis, each, expected(question))


@pytest.mark.parametrize("when", ["while the first runs", "after it ended", "after its worker died"])
async def test_a_request_that_is_added_twice_is_answered_once(
    when: str, redis: Redis, start_worker: StartWorker, paced: Simulator
) -> None:
    async def add() -> None:
        await redis.xadd("chat:jobs", {"id": "twice", "request": to_json(chat_request())})

    await add()
    if when == "after its worker died":
        await begun_by_a_dead_worker(redis, "twice", {"type": "delta", "content": "The river"})
        await add()
        await start_worker(paced, lease=LEASE)
        assert (await promise_kept(redis, "twice")).attempts == 2
        assert len(paced.served) == 1
        return
    await start_worker(paced, lease=10)
    await has_begun(redis, "twice")
    if when == "after it ended":
        await promise_kept(redis, "twice")
    await add()
    assert (await promise_kept(redis, "twice")).attempts == 1
    assert len(paced.served) == 1

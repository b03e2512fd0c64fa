"""A Redis that dies, forgets, is full, slow or silent: streams wait, and go on where they were."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from checks import chat_request, expected, has_begun, log_of, pending, promise_kept
from conftest import StartSimulator, StartWorker
from durable_redis import Durable
from proxy import Proxy
from redis.asyncio import Redis
from steered_clock import SteeredClock
from waits import eventually

from worker import Client, Entry
from worker.broker.log_writer import HIGH_WATER_BYTES
from worker.broker.publisher import Publisher
from worker.contract.ids import SEAL
from worker.engine.application import Worker
from worker.engine.pace import Pace
from worker.sandbox.embedded_redis import EmbeddedRedis
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator

IMPATIENT = Pace(longest_block=0.1, command_timeout=0.3)


@pytest.fixture
async def paced(start_simulator: StartSimulator) -> Simulator:
    """A vLLM whose answers take about a second."""
    return await start_simulator(Options(scenario=Scenario(rate=40)))


@pytest.fixture
def clock() -> SteeredClock:
    return SteeredClock(halt_after=8)


@pytest.fixture
async def halting(start_simulator: StartSimulator, clock: SteeredClock) -> Simulator:
    """A vLLM whose answers halt after eight tokens, until the test releases its clock."""
    return await start_simulator(clock=clock)


@pytest.fixture
async def durable(redis_server: EmbeddedRedis, tmp_path: Path) -> AsyncIterator[Durable]:
    assert redis_server.process is not None
    durable = Durable(Path(str(redis_server.process.args[0])), tmp_path)  # type: ignore[index]  # a list, as started
    durable.start()
    await durable.ready()
    yield durable
    await durable.client.aclose()
    durable.kill()


async def test_a_redis_that_is_killed_and_comes_back_with_its_file(
    durable: Durable, start_worker: StartWorker, paced: Simulator
) -> None:
    await start_worker(paced, lease=15, redis_url=durable.url)
    async with Client(durable.url, patience=30) as client:
        ids = [await client.enqueue(chat_request(question)) for question in ("one", "two", "three")]
        seen: list[Entry] = []

        async def follow() -> None:
            seen.extend([entry async for entry in client.follow(ids[0])])

        follower = asyncio.create_task(follow())
        await has_begun(durable.client, ids[0])
        durable.kill()
        durable.start()
        await durable.ready()
        for question, request_id in zip(("one", "two", "three"), ids, strict=True):
            ended = await promise_kept(durable.client, request_id, expected(question))
            assert ended.attempts == 1
        await follower
        assert [entry.id for entry in seen] == [line.id for line in await log_of(durable.client, ids[0])]


async def test_connections_to_redis_that_are_cut_again_and_again(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, paced: Simulator
) -> None:
    await start_worker(paced, lease=15, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    for deltas in range(1, 40, 4):
        await has_begun(redis, request_id, deltas)
        await redis_proxy.cut()
    assert (await promise_kept(redis, request_id)).attempts == 1


async def test_a_silent_redis_is_given_up_and_commands_sent_to_it_may_arrive_late(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, paced: Simulator
) -> None:
    await start_worker(paced, pace=IMPATIENT, lease=15, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id)
    redis_proxy.half_open()
    before = redis_proxy.accepted

    async def given_up() -> bool:
        return redis_proxy.accepted > before + 2 and paced.served[0].finished

    await eventually(given_up)
    await redis_proxy.heal()
    assert (await promise_kept(redis, request_id)).attempts == 1
    assert len(paced.served) == 1


async def test_a_redis_that_is_silent_past_the_lease_for_one_worker_only(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, halting: Simulator, clock: SteeredClock
) -> None:
    first = await start_worker(halting, pace=IMPATIENT, lease=1, gap_timeout=60, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id)
    redis_proxy.half_open()
    clock.release()
    await start_worker(halting, pace=IMPATIENT, lease=1)
    assert (await promise_kept(redis, request_id)).attempts > 1
    before = await log_of(redis, request_id)
    await redis_proxy.heal()

    async def let_go() -> bool:
        return not len(first._running_jobs)

    await eventually(let_go)
    assert await log_of(redis, request_id) == before
    await promise_kept(redis, request_id)


@pytest.mark.parametrize("when", ["blocked", "streaming"])
async def test_a_redis_that_forgets_everything(
    when: str, client: Client, redis: Redis, start_worker: StartWorker, paced: Simulator
) -> None:
    await start_worker(paced)
    # A minute of text: on a busy machine a shorter answer could end before everything is forgotten.
    scenario = {"rate": 40, "tokens": 2400} if when == "streaming" else {"rate": 0}
    lost = await client.enqueue(chat_request("lost", simulate=scenario))
    await (has_begun(redis, lost) if when == "streaming" else promise_kept(redis, lost, expected("lost")))
    await redis.flushall()
    request_id = await client.enqueue(chat_request())
    await promise_kept(redis, request_id)

    async def dropped() -> bool:
        return paced.served[0].ended is not None

    await eventually(dropped)
    assert paced.served[0].closed_early is (when == "streaming")
    assert not await redis.exists(f"chat:tokens:{{{lost}}}"), "what is gone is not made again"


async def test_a_destroyed_group_is_recreated_with_all_its_jobs(
    client: Client, redis: Redis, start_worker: StartWorker, paced: Simulator
) -> None:
    await start_worker(paced, slots=2, lease=15)
    questions = [f"question {number}" for number in range(3)]
    rates = (80, 20, 0)  # the first one ends while the second runs, and the third comes with the group
    ids = [
        await client.enqueue(chat_request(question, simulate={"rate": rate}))
        for question, rate in zip(questions, rates, strict=True)
    ]
    await has_begun(redis, ids[0])
    await redis.xgroup_destroy("chat:jobs", "workers")

    async def made_again() -> bool:
        return bool(await redis.xinfo_groups("chat:jobs"))

    await eventually(made_again)
    for question, request_id in zip(questions, ids, strict=True):
        ended = await promise_kept(redis, request_id, expected(question))
        assert ended.attempts == 1, "a job that comes again while it runs here is no second run"


async def test_streams_wait_while_redis_has_no_room(
    client: Client, redis: Redis, start_worker: StartWorker, halting: Simulator, clock: SteeredClock
) -> None:
    await start_worker(halting, lease=1, gap_timeout=60)
    questions = ("one", "two", "three")
    ids = [await client.enqueue(chat_request(question)) for question in questions]
    for request_id in ids:
        await has_begun(redis, request_id)
    await redis.config_set("maxmemory", "1")
    try:
        clock.release()

        async def told() -> bool:
            return [served.finished for served in halting.served] == [True] * 3

        await eventually(told)
        for request_id in ids:
            assert (await log_of(redis, request_id))[-1].id != SEAL
        assert len(await pending(redis)) == 3
    finally:
        await redis.config_set("maxmemory", "0")
    for question, request_id in zip(questions, ids, strict=True):
        await promise_kept(redis, request_id, expected(question))


async def test_a_slow_redis_slows_vllm_down_and_memory_is_bounded(
    client: Client,
    redis: Redis,
    redis_proxy: Proxy,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:
    # With its alternatives a token is two kilobytes and a half. The sockets on the way cannot hold the whole answer:
    # the kernel lets them grow to 36 MB together (tcp_rmem, tcp_wmem), and they do if the worker reads in bursts.
    tokens = 20_000
    simulator = await start_simulator(Options(max_model_len=2 * tokens, scenario=Scenario(tokens=tokens)))
    worker = await start_worker(simulator, lease=30, redis_url=redis_proxy.redis_url)
    redis_proxy.up = 0.1
    request_id = await client.enqueue(chat_request(logprobs=True, top_logprobs=20))

    chunks = [-1]

    async def paused() -> bool:
        chunks.append(simulator.served[0].chunks if simulator.served else -1)
        return waiting(worker) > HIGH_WATER_BYTES and len(chunks) > 20 and chunks[-20] == chunks[-1] > 0

    await eventually(paused)
    assert not simulator.served[0].finished
    assert waiting(worker) < 3 * HIGH_WATER_BYTES, "no more than one read beyond the mark"
    await redis_proxy.heal()
    await has_begun(redis, request_id)
    await client.cancel(request_id)
    answer = await client.result(request_id)
    assert answer.outcome == "cancelled"
    assert answer.text
    assert answer_to(chat_request()["messages"], tokens=tokens).startswith(answer.text)


def waiting(worker: Worker) -> int:
    """Bytes that the worker's logs hold until Redis has accepted them."""
    assert isinstance(worker._publisher, Publisher)
    return sum(log.pending_bytes for log in worker._publisher.logs)


@pytest.fixture
async def limited(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The URL of a user for the workers alone, whose rights a test removes and restores."""
    await redis.execute_command("ACL", "SETUSER", "relay", "on", ">secret", "~*", "&*", "+@all")  # type: ignore[no-untyped-call]  # so in redis-py 8.1
    yield redis_url.replace("redis://", "redis://relay:secret@")
    await redis.execute_command("ACL", "DELUSER", "relay")  # type: ignore[no-untyped-call]  # likewise


@pytest.mark.parametrize(
    ("taken", "given"),
    [
        (("resetkeys", "~chat:jobs", "~chat:dead", "~chat:lifecycle", "~chat:workers", "~chat:probe"), ("~*",)),
        (("-multi",), ("+multi",)),
        (("-xrevrange", "-xadd"), ("+xrevrange", "+xadd")),
        (("resetpass", ">another"), (">secret",)),
    ],
    ids=["the logs' keys", "MULTI", "commands", "the password"],
)
async def test_a_right_that_is_removed_and_restored_ends_no_job(
    taken: tuple[str, ...],
    given: tuple[str, ...],
    client: Client,
    redis: Redis,
    limited: str,
    start_worker: StartWorker,
    halting: Simulator,
    clock: SteeredClock,
) -> None:
    worker = await start_worker(halting, lease=15, gap_timeout=60, redis_url=limited)
    questions = [f"question {number}" for number in range(4)]
    ids = [await client.enqueue(chat_request(question)) for question in questions]
    for request_id in ids:
        await has_begun(redis, request_id)

    def failures() -> float:
        return worker.metrics.registry.get_sample_value("vllm_relay_redis_write_failures_total") or 0

    await redis.execute_command("ACL", "SETUSER", "relay", *taken)  # type: ignore[no-untyped-call]  # so in redis-py 8.1
    if "resetpass" in taken:
        await redis.execute_command("CLIENT", "KILL", "USER", "relay")  # type: ignore[no-untyped-call]  # likewise
    clock.release()
    late = await client.enqueue(chat_request("late"))
    before = failures()

    async def refused_again_and_again() -> bool:
        return bool(failures() > before + 2)

    await eventually(refused_again_and_again)
    assert not await redis.exists("chat:dead")
    await redis.execute_command("ACL", "SETUSER", "relay", *given)  # type: ignore[no-untyped-call]  # likewise
    for question, request_id in zip([*questions, "late"], [*ids, late], strict=True):
        assert (await promise_kept(redis, request_id, expected(question))).attempts == 1
    assert not await redis.exists("chat:dead")

"""A full Redis: streams wait, no job is taken, and when there is room again nothing is missing."""

import json
from types import SimpleNamespace

import pytest
from conftest import Entries, StartSimulator, StartWorker, metric, stream
from proxy import Proxy
from redis.asyncio import Redis
from steered_clock import SteeredClock
from structlog.testing import capture_logs
from waits import eventually

from worker import Answer, Client, State, UnknownRequest
from worker.contract.entries import parse
from worker.contract.ids import SEAL
from worker.engine.application import Worker
from worker.engine.intake import NO_VLLM, REDIS_AWAY, REDIS_FULL, REDIS_REFUSES
from worker.engine.pace import Pace
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator
from worker.telemetry.logging import configure_logging


def chat_request(content: str = "Who are you?") -> dict[str, object]:
    return {"model": "reciter", "messages": [{"role": "user", "content": content}]}


async def paused(worker: Worker, why: str) -> None:
    async def is_paused() -> bool:
        reasons = [NO_VLLM, REDIS_FULL, REDIS_REFUSES, REDIS_AWAY]
        return {reason for reason in reasons if metric(worker, "claims_paused", reason=reason)} == {why} - {""}

    await eventually(is_paused)


async def log_of(redis: Redis, request_id: str) -> Entries:
    return await stream(redis, f"chat:tokens:{{{request_id}}}")


async def whole(redis: Redis, client: Client, request_id: str, content: str) -> None:
    """Check that a log has one attempt without a hole, its seal and the whole text, and that nothing is pending."""
    answer = await client.result(request_id)
    assert answer.text == answer_to(chat_request(content)["messages"])
    ids = [str(parse(*entry).id) for entry in await log_of(redis, request_id)]
    assert ids == ["0-1", *(f"1-{n}" for n in range(len(ids) - 2)), str(SEAL)]

    async def nothing_pending() -> bool:
        return all(not group["pending"] for group in await redis.xinfo_groups("chat:jobs"))

    await eventually(nothing_pending)


async def calls(redis: Redis, command: str) -> int:
    return int((await redis.info("commandstats"))[f"cmdstat_{command}"]["calls"])


async def test_mid_stream_the_answer_waits_for_room_and_its_lease_is_kept(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=8)
    simulator = await start_simulator(clock=clock)
    worker = await start_worker(simulator, lease=1, gap_timeout=600)
    request_id = await client.enqueue(chat_request())

    async def begun() -> bool:
        return len(await log_of(redis, request_id)) > 4

    async def answered() -> bool:
        return simulator.served[0].finished

    async def outlasted() -> bool:
        """Wait for so long that a lease without renewal would have ended twice."""
        return await calls(redis, "xclaim") > before + 7

    await eventually(begun)
    await redis.config_set("maxmemory", "1")
    try:
        await paused(worker, REDIS_FULL)
        clock.release()
        await eventually(answered)
        before = await calls(redis, "xclaim")
        await eventually(outlasted)
        assert not Answer(parse(*entry) for entry in await log_of(redis, request_id)).outcome
    finally:
        await redis.config_set("maxmemory", "0")
    await whole(redis, client, request_id, "Who are you?")
    await paused(worker, "")
    assert metric(worker, "lease_lost_total") == 0
    assert metric(worker, "redis_write_failures_total") > 0


async def test_memory_that_ends_at_the_seal_delays_the_seal(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    first, second = [redis_proxy.hold(rb"^EVALSHA .* type done ") for _ in range(2)]
    await start_worker(simulator, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    await first.met.wait()
    await redis.config_set("maxmemory", "1")
    try:
        first.release()
        await second.met.wait()
        second.release()
        assert (await log_of(redis, request_id))[-1][0] != str(SEAL).encode()
        assert not await redis.exists(f"chat:ended:{{{request_id}}}")
    finally:
        await redis.config_set("maxmemory", "0")
    await whole(redis, client, request_id, "Who are you?")
    assert await redis.exists(f"chat:ended:{{{request_id}}}")


async def test_followers_read_on_while_redis_is_full(client: Client, redis: Redis) -> None:
    """A full Redis refuses every MULTI, whatever it holds, and `follow` sends one whenever there is nothing to read."""
    request_id = await client.enqueue(chat_request())
    await redis.config_set("maxmemory", "1")
    try:
        assert (await client.status(request_id)).state is State.QUEUED
        with pytest.raises(UnknownRequest):
            await client.result("nope")
    finally:
        await redis.config_set("maxmemory", "0")


async def test_no_jobs_are_taken_while_redis_is_full(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    port = free_port()
    worker = await start_worker(SimpleNamespace(url=f"http://127.0.0.1:{port}"))
    await paused(worker, NO_VLLM)

    async def shown() -> bool:
        lines = [json.loads(line) for line in (await redis.hgetall("chat:workers")).values()]
        return [line["paused"] for line in lines] == [NO_VLLM]

    await eventually(shown)
    questions = ["Who are you?", "Tell me a story", "你是谁?"]
    ids = [await client.enqueue(chat_request(question)) for question in questions]
    await redis.config_set("maxmemory", "1")
    try:
        simulator = await start_simulator(port=port)
        await paused(worker, REDIS_FULL)
        assert [group["pending"] for group in await redis.xinfo_groups("chat:jobs")] == [0]
        assert not simulator.served
    finally:
        await redis.config_set("maxmemory", "0")
    for request_id, question in zip(ids, questions, strict=True):
        await whole(redis, client, request_id, question)


async def test_a_job_that_was_taken_as_redis_became_full_runs_when_there_is_room(
    client: Client, redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    """The memory may run out between the probe for room and the job's first entry."""
    reading = redis_proxy.hold_reply(b"XREADGROUP", reply=b"request")
    worker = await start_worker(simulator, slots=4, redis_url=redis_proxy.redis_url)
    request_id = await client.enqueue(chat_request())
    await reading.done.wait()
    await redis.config_set("maxmemory", "1")
    try:
        reading.release()
        await paused(worker, REDIS_FULL)
        assert metric(worker, "jobs_running") == 1
        assert not simulator.served
    finally:
        await redis.config_set("maxmemory", "0")
    await whole(redis, client, request_id, "Who are you?")


async def test_refusals_that_come_and_go_are_logged_once(
    redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, pace=Pace(longest_block=0.01, recheck_writes_after=0.01))
    await eventually(lambda: redis.hlen("chat:workers"))  # without room it could not start
    configure_logging("json")
    with capture_logs() as logs:
        try:
            for _ in range(10):
                await redis.config_set("maxmemory", "1")
                await paused(worker, REDIS_FULL)
                await redis.config_set("maxmemory", "0")
                await paused(worker, "")
        finally:
            await redis.config_set("maxmemory", "0")
    logged = [entry["event"] for entry in logs if entry["event"].startswith("claims_")]
    assert logged == ["claims_paused", "claims_resumed"]

"""Several worker processes on one Redis: they share the work and take over from one another."""

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from conftest import StartProcess, StartSimulator, StartWorker, stream
from proxy import Proxy
from redis.asyncio import Redis
from steered_clock import SteeredClock
from topology import whole
from waits import eventually

from worker import Answer, Client, Delta, Entry
from worker.broker.parked_jobs import ParkedJobs, ParkedLine
from worker.contract.entries import parse
from worker.contract.ids import SEAL
from worker.sandbox.embedded_redis import EmbeddedRedis, free_port
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.telemetry.logging import configure_logging

JOBS = 200


def chat_request(content: str, **more: object) -> dict[str, object]:
    return {"model": "reciter", "messages": [{"role": "user", "content": content}], **more}


def expected(content: str) -> str:
    return answer_to([{"role": "user", "content": content}])


async def log_of(redis: Redis, request_id: str) -> list[Entry]:
    return [parse(*entry) for entry in await stream(redis, f"chat:tokens:{{{request_id}}}")]


async def nothing_pending(redis: Redis) -> bool:
    groups = await redis.xinfo_groups("chat:jobs")
    return bool(groups) and all(not group["pending"] for group in groups)


async def test_two_workers_and_two_hundred_jobs_at_once(
    client: Client, redis: Redis, start_simulator: StartSimulator, start_process: StartProcess
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(rate=100)))
    for _ in range(2):
        # Slots for half of the jobs, so that both workers take their share; a timeout that suits two busy cores.
        start_process(simulator, slots=JOBS // 2, lease=15)

    async def both_have_started() -> bool:
        return await redis.hlen("chat:workers") == 2

    await eventually(both_have_started)  # one could do all jobs before the other has started
    questions = [f"question {number}" for number in range(JOBS)]
    ids = await asyncio.gather(*(client.enqueue(chat_request(question)) for question in questions))
    answers = await asyncio.gather(*map(client.result, ids))
    assert [answer.text for answer in answers] == [expected(question) for question in questions]

    await eventually(lambda: nothing_pending(redis))
    workers: Counter[str] = Counter()
    for request_id, question in zip(ids, questions, strict=True):
        entries = await log_of(redis, request_id)
        whole(entries, question)  # in one attempt, or in more if the job has waited in its queue for a place
        assert [entry.type for entry in entries if entry.id == SEAL] == ["done"]
        started = Answer(entries).started
        assert started is not None
        workers[started.worker] += 1
    assert len(workers) == 2, "both workers ran jobs"
    finished = Counter(
        fields[b"id"] for _, fields in await stream(redis, "chat:lifecycle") if fields[b"type"] == b"finished"
    )
    assert finished == {request_id.encode(): 1 for request_id in ids}
    assert len(simulator.served) == JOBS


async def test_a_worker_that_stops_lets_its_jobs_end(
    client: Client, redis: Redis, start_simulator: StartSimulator, start_process: StartProcess
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(rate=50)))
    process = start_process(simulator, drain_timeout=20)
    request_id = await client.enqueue(chat_request("Who are you?"))
    entries = []
    async for entry in client.follow(request_id):
        entries.append(entry)
        if isinstance(entry, Delta) and entry.id.n == 3:
            process.terminate()
    assert Answer(entries).outcome == "done"
    assert Answer(entries).attempt == 1
    assert await asyncio.to_thread(process.wait, 60) == 0
    assert await redis.hgetall("chat:workers") == {}
    assert await redis.xinfo_consumers("chat:jobs", "workers") == []


async def test_jobs_that_do_not_end_in_time_are_handed_over_at_once(
    client: Client, redis: Redis, start_simulator: StartSimulator, start_process: StartProcess
) -> None:
    clock = SteeredClock(halt_after=8)
    simulator = await start_simulator(clock=clock)
    # With leases of a minute only a hand-over lets the second worker continue within this test.
    first = start_process(simulator, drain_timeout=0.1, lease=60, slots=1)
    request_id = await client.enqueue(chat_request("Tell me a story"))
    entries = []
    async for entry in client.follow(request_id):
        entries.append(entry)
        if isinstance(entry, Delta) and entry.id == (1, 5):
            start_process(simulator, lease=60)
            first.terminate()
            assert await asyncio.to_thread(first.wait, 60) == 0
            clock.release()
    assert Answer(entries).text == expected("Tell me a story")
    assert Answer(entries).attempt == 2
    await eventually(lambda: nothing_pending(redis))


async def test_a_worker_has_a_record_in_the_hash_of_workers(
    redis: Redis, start_simulator: StartSimulator, start_process: StartProcess
) -> None:
    start_process(await start_simulator(), lease=0.5, slots=7)

    async def shown() -> bool:
        lines = [json.loads(line) for line in (await redis.hgetall("chat:workers")).values()]
        return [line["slots"] for line in lines] == [7]

    await eventually(shown)


async def test_a_worker_that_waits_for_redis_ends_on_a_signal(start_process: StartProcess, tmp_path: Path) -> None:
    process = start_process(redis_url=f"redis://127.0.0.1:{free_port()}/0")

    async def waits() -> bool:
        return "redis_unavailable" in (tmp_path / "worker-0.log").read_text()

    await eventually(waits)
    process.terminate()
    assert await asyncio.to_thread(process.wait, 60) == 0


async def test_a_read_waits_for_less_than_half_a_lease(
    redis_url: str, start_simulator: StartSimulator, start_process: StartProcess
) -> None:
    """The lease counts from the start of the read, and the first renewal must not look like a theft."""
    start_process(await start_simulator(), lease=1)
    # Until the worker has started there is nothing to see: longer than redis-py's 5 s on a busy machine.
    async with Redis.from_url(redis_url, protocol=2, socket_timeout=30) as redis, redis.monitor() as monitor:
        async for seen in monitor.listen():
            _, found, rest = seen["command"].partition(" BLOCK ")
            if found:
                assert int(rest.split()[0]) <= 250
                break


async def test_jobs_that_wait_for_memory_in_redis_are_handed_over_too(
    client: Client, redis: Redis, start_simulator: StartSimulator, start_process: StartProcess
) -> None:
    clock = SteeredClock(halt_after=8)
    simulator = await start_simulator(clock=clock)
    process = start_process(simulator, drain_timeout=0.1, lease=60)
    request_id = await client.enqueue(chat_request("Who are you?"))

    async def begun() -> bool:
        return len(await log_of(redis, request_id)) > 4

    async def answered() -> bool:
        return simulator.served[0].finished

    await eventually(begun)
    await redis.config_set("maxmemory", "1")
    try:
        clock.release()
        await eventually(answered)
        process.terminate()
        assert await asyncio.to_thread(process.wait, 60) == 0
        (line,) = await redis.xpending_range("chat:jobs", "workers", "-", "+", 10)
        assert int(line["time_since_delivered"]) > 60_000
    finally:
        await redis.config_set("maxmemory", "0")


async def test_a_worker_ends_soon_though_redis_does_not_answer(
    client: Client, redis_server: EmbeddedRedis, start_simulator: StartSimulator, start_process: StartProcess
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(rate=20, tokens=2000)))
    process = start_process(simulator, drain_timeout=0.1, lease=60)
    for number in range(10):
        await client.enqueue(chat_request(f"question {number}"))

    async def begun() -> bool:
        return len(simulator.served) == 10

    await eventually(begun)
    assert redis_server.process is not None
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        process.terminate()
        # A few commands time out, not one for each job.
        assert await asyncio.to_thread(process.wait, 35) == 0
    finally:
        redis_server.process.send_signal(signal.SIGCONT)


async def test_a_worker_reports_no_recovery_while_redis_is_away(
    client: Client, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tries = 0
    lines = ParkedJobs.lines

    async def counted(parked: ParkedJobs, queue: str) -> list[ParkedLine]:
        nonlocal tries
        tries += 1
        return await lines(parked, queue)

    async def has_tried(times: int) -> bool:
        return tries >= times

    monkeypatch.setattr(ParkedJobs, "lines", counted)
    configure_logging("json", "info")
    await start_worker(simulator, redis_url=redis_proxy.redis_url)
    await client.result(await client.enqueue(chat_request("Who are you?")))
    redis_proxy.refuse()
    await redis_proxy.cut()
    before = tries
    await eventually(lambda: has_tried(before + 2))
    capfd.readouterr()
    await eventually(lambda: has_tried(before + 5))
    assert "recovered" not in capfd.readouterr().err
    await redis_proxy.heal()
    await eventually(lambda: has_recovered(capfd))


async def has_recovered(capfd: pytest.CaptureFixture[str]) -> bool:
    return '"after":"claim_failed"' in capfd.readouterr().err

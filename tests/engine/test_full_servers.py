"""Jobs at servers that are full, or that are shutting down: they wait, and none of them fails."""

import asyncio
from dataclasses import replace
from typing import Any, Literal

import pytest
from conftest import StartSimulator, StartWorker, metric
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.contract.entries import Object
from worker.engine.pace import Pace
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.options import Options, Scenario
from worker.sandbox.simulator.record import Served
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator
from worker.vllm.servers.pace import ServerPace


def chat_request(content: str, **more: Any) -> Object:  # noqa: ANN401 - fields of a request
    return {"model": "reciter", "messages": [{"role": "user", "content": content}], **more}


async def have_begun(count: int, *servers: Simulator) -> None:
    """Wait until so many answers have begun."""

    async def begun() -> bool:
        return sum(served.chunks > 1 for server in servers for served in server.served) >= count

    await eventually(begun)


@pytest.mark.parametrize("status", [200, 429, 503])
async def test_many_jobs_at_a_small_server_are_all_done_with_hardly_a_refusal(
    status: Literal[200, 429, 503],
    client: Client,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:
    options = Options(
        max_num_seqs=2,
        max_num_queued_reqs=3,
        full_status=status,
        scenario=Scenario(first_token=0.05, tokens=5, rate=50),
    )
    server = await start_simulator(options)
    await start_worker(server, slots=32, tries=1)
    ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(60)]
    outcomes = [(await client.result(request_id)).outcome for request_id in ids]
    assert outcomes == ["done"] * 60
    assert len(server.served) <= 66


async def test_interrupted_answers_continue_at_once_at_a_server_that_has_as_many_requests_as_its_limit(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    slow = Options(scenario=Scenario(rate=5))
    left = await start_simulator(slow)
    async with Simulator(slow) as dies:
        worker = await start_worker(left, dies, slots=8)
        ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(8)]
        await have_begun(8, left, dies)
        for server in worker._servers.servers:
            server.limit.on_refused(server.in_flight, None)
            assert server.room == 0
        assert [len(server.served) for server in (left, dies)] == [4, 4]

    async def continued() -> bool:
        return len(left.served) == 8

    await eventually(continued)
    left.change(scenario=Scenario())
    for request_id in ids:
        await client.cancel(request_id)


async def test_jobs_at_a_draining_server_are_done_there_or_at_another(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator, server_pace: ServerPace
) -> None:
    server_pace.first_drain_pause = 0.05
    options = Options(scenario=Scenario(rate=50))
    await start_simulator(options)
    servers = [await start_simulator(options) for _ in range(2)]
    await start_worker(*servers, slots=8, tries=1)
    ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(4)]
    await have_begun(4, *servers)
    draining = asyncio.create_task(servers[1].drain())
    ids += [await client.enqueue(chat_request(f"question {n}")) for n in range(4, 20)]
    for n, request_id in enumerate(ids):
        answer = await client.result(request_id)
        assert (answer.outcome, answer.attempt) == ("done", 1)
        assert answer.text == answer_to(chat_request(f"question {n}")["messages"])
    await draining


async def test_a_lone_draining_server_fails_no_job_and_its_successor_answers(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator, server_pace: ServerPace
) -> None:
    server_pace.first_drain_pause = server_pace.probe_every = 0.05
    options, port = Options(scenario=Scenario(rate=50)), free_port()
    async with Simulator(options, port=port) as leaving:
        await start_worker(leaving, slots=8, tries=1)
        ids = [await client.enqueue(chat_request("question 0"))]
        await have_begun(1, leaving)
        draining = asyncio.create_task(leaving.drain())
        ids += [await client.enqueue(chat_request(f"question {n}")) for n in range(1, 10)]
        await draining
    await start_simulator(options, port=port)
    outcomes = [(await client.result(request_id)).outcome for request_id in ids]
    assert outcomes == ["done"] * 10


async def test_a_job_that_fails_while_its_only_server_goes_away_each_time_runs_out_of_tries(
    client: Client, redis: Redis, start_worker: StartWorker, pace: Pace
) -> None:
    """Such a job may kill its vLLM server. It is parked while the server is away, and must not forget its tries."""
    port, requests = free_port(), 0
    await start_worker(vllm_urls=f"http://127.0.0.1:{port}", tries=2, pace=replace(pace, longest_wait_here=0.05))
    request_id = await client.enqueue(chat_request("Hello", simulate={"first_token": 5}))

    def of_the_job(server: Simulator) -> list[Served]:
        return [served for served in server.served if "simulate" in served.request]  # not trials of the worker

    async def is_parked() -> bool:
        groups = await redis.xinfo_consumers("chat:jobs", "workers")
        return any(group["pending"] for group in groups if group["name"].startswith(b"waiting:"))

    async def is_parked_or_ended() -> bool:
        return await is_parked() or bool((await client.status(request_id)).outcome)

    async def is_asked_or_ended() -> bool:
        return bool(of_the_job(server)) or bool((await client.status(request_id)).outcome)

    while not (await client.status(request_id)).outcome and requests < 4:
        async with Simulator(port=port) as server:
            await eventually(is_asked_or_ended)
            requests += len(of_the_job(server))
        await eventually(is_parked_or_ended)
    assert requests in (2, 3), "a failed trial of a server that comes back does not count"
    assert (await client.result(request_id)).outcome == "error"


@pytest.mark.parametrize(("fault", "parks"), [("429", 1), ("500", 0)])
async def test_a_job_that_has_failed_is_not_parked_at_a_full_server_which_would_forget_its_tries(
    fault: str,
    parks: int,
    client: Client,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
    pace: Pace,
) -> None:
    server = await start_simulator()
    worker = await start_worker(server, pace=replace(pace, longest_wait_here=0.05))
    simulate = {"fault": fault, "times": 1, "then": "429", "retry_after": 0.2}
    request_id = await client.enqueue(chat_request("Hello", simulate=simulate))

    async def was_refused_often() -> bool:
        return len(server.served) >= 3

    await eventually(was_refused_often)
    assert min(1, metric(worker, "jobs_parked_total")) == parks
    await client.cancel(request_id)

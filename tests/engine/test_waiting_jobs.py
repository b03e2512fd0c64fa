"""Parked jobs from end to end: a model without a server, a server that refuses, deadlines, cancels and shutdowns."""

import asyncio
import time
from collections import Counter
from itertools import count

import pytest
from conftest import StartSimulator, StartWorker, metric, stream
from redis.asyncio import Redis
from waits import eventually

from worker import Client, Failed
from worker.contract.entries import Object
from worker.contract.keys import GROUP
from worker.engine.application import Worker
from worker.engine.rotation import LineRotation
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.options import Options, Scenario
from worker.sandbox.simulator.server import Simulator


def chat_request(content: str = "Who are you?", model: str = "reciter") -> Object:
    return {"model": model, "messages": [{"role": "user", "content": content}]}


async def parked(redis: Redis) -> int:
    consumers = await redis.xinfo_consumers("chat:jobs", GROUP)
    return sum(consumer["pending"] for consumer in consumers if consumer["name"].startswith(b"waiting:"))


async def has_parked(redis: Redis, count: int) -> None:
    async def all_parked() -> bool:
        return await parked(redis) == count

    await eventually(all_parked)


async def nothing_pending(redis: Redis) -> bool:
    return not (await redis.xpending("chat:jobs", GROUP))["pending"]


class Away:
    """A server that may come later, at a port that is kept for it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"


async def start_beside(start_worker: StartWorker, server: Simulator, away: Away, **settings: object) -> Worker:
    return await start_worker(vllm_urls=f"{server.url},{away.url}", **settings)


async def test_jobs_of_a_model_without_a_server_hold_no_slot_and_start_when_one_comes(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rounds, choose = count(), LineRotation.choose
    monkeypatch.setattr(LineRotation, "choose", lambda *args: (next(rounds), choose(*args))[1])
    away = Away()
    worker = await start_beside(start_worker, await start_simulator(), away, slots=2)
    waiting = [await client.enqueue(chat_request(f"question {n}", "other")) for n in range(10)]
    running = [await client.enqueue(chat_request(f"question {n}")) for n in range(10)]
    assert [(await client.result(request_id)).outcome for request_id in running] == ["done"] * 10
    await has_parked(redis, 10)

    async def all_are_counted() -> bool:
        """The worker counts jobs a moment after Redis has what they wrote."""
        return metric(worker, "jobs_running") == 0 and metric(worker, "jobs_parked_total") >= 10

    await eventually(all_are_counted)
    logs = [await stream(redis, f"chat:tokens:{{{request_id}}}") for request_id in waiting]
    assert [len(log) for log in logs] == [1] * 10
    parks, began = metric(worker, "jobs_parked_total"), next(rounds)
    await asyncio.sleep(1)
    assert metric(worker, "jobs_parked_total") == parks
    assert next(rounds) - began < 100, "the worker spins while the other server has room"
    await start_simulator(Options(model="other"), away.port)
    answers = [await client.result(request_id) for request_id in waiting]
    assert [(answer.outcome, answer.attempt) for answer in answers] == [("done", 1)] * 10
    assert metric(worker, "jobs_parked_total") <= 15
    await eventually(lambda: nothing_pending(redis))


async def test_a_parked_job_ends_at_its_deadline_and_a_cancelled_one_at_once(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_beside(start_worker, await start_simulator(), Away())
    overdue = await client.enqueue(chat_request("a", "other"), timeout=6)
    cancelled = await client.enqueue(chat_request("b", "other"), timeout=10)
    await has_parked(redis, 2)
    await client.cancel(cancelled)
    assert (await client.result(cancelled)).outcome == "cancelled"
    await eventually(lambda: nothing_pending(redis))
    end = (await client.result(overdue)).end
    assert isinstance(end, Failed)
    assert end.code == "deadline"
    finished = [fields[b"id"] for _, fields in await stream(redis, "chat:lifecycle") if fields[b"type"] == b"finished"]
    assert Counter(finished) == Counter([overdue.encode(), cancelled.encode()])


async def test_jobs_at_a_server_that_refuses_everything_for_a_while_do_not_spin(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    server = await start_simulator(Options(scenario=Scenario(fault="503")))
    worker = await start_worker(server, slots=16)
    ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(50)]
    await eventually(lambda: has_requests(server, 1))
    await asyncio.sleep(3)
    assert len(server.served) <= 60
    assert metric(worker, "jobs_parked_total") <= 60
    server.change(scenario=Scenario())
    answers = [await client.result(request_id) for request_id in ids]
    assert {answer.outcome for answer in answers} == {"done"}
    assert max(answer.attempt for answer in answers) <= 6
    await eventually(lambda: nothing_pending(redis))


async def has_requests(server: Simulator, count: int) -> bool:
    return len(server.served) >= count


async def test_parked_jobs_stay_parked_at_a_shutdown_and_go_to_another_worker(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    away = Away()
    worker = await start_beside(start_worker, await start_simulator(), away)
    waiting = [await client.enqueue(chat_request(f"question {n}", "other")) for n in range(5)]
    await has_parked(redis, 5)
    worker.stop()

    async def has_left() -> bool:
        return not await redis.hlen("chat:workers")

    await eventually(has_left)
    assert await parked(redis) == 5
    began = time.monotonic()
    await start_worker(await start_simulator(Options(model="other")))
    assert [(await client.result(request_id)).outcome for request_id in waiting] == ["done"] * 5
    assert time.monotonic() - began < 10


async def test_a_tenant_with_one_job_does_not_wait_behind_the_flood_of_another(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    server = await start_simulator(Options(max_num_seqs=2, scenario=Scenario(tokens=5, rate=20)))
    flood = [await client.enqueue(chat_request(f"question {n}"), tenant="flood") for n in range(60)]
    other = await client.enqueue(chat_request("hello"), tenant="other")
    await start_worker(server)
    for request_id in (other, *flood):
        assert (await client.result(request_id)).outcome == "done"
    assert [served.request["messages"] for served in server.served].index(chat_request("hello")["messages"]) < 45


async def test_a_job_with_a_fallback_does_not_wait_for_a_model_whose_servers_are_away(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_beside(start_worker, await start_simulator(), Away())
    request_id = await client.enqueue(chat_request(model="other"), fallbacks=["reciter"])
    answer = await client.result(request_id)
    assert (answer.outcome, answer.model) == ("done", "reciter")

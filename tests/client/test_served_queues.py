"""Whether a worker serves a queue: the worker records show it, and `enqueue --follow` warns when none does."""

import asyncio
import time

import pytest
from conftest import StartWorker
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.cli.requests import print_answer
from worker.contract.entries import to_json
from worker.contract.records import WorkerRecord
from worker.sandbox.simulator.server import Simulator

ASK: dict[str, object] = {"messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.mark.parametrize(
    ("workers", "is_served"),
    [
        pytest.param([], False, id="no worker"),
        pytest.param([(1, ["fast", "slow"])], True, id="one that serves it"),
        pytest.param([(1, ["default"]), (1, ["fast"])], False, id="others"),
        pytest.param([(1, ["fast"]), (1, [])], True, id="a worker of an earlier version, whose record has no queues"),
        pytest.param([(3600, ["slow"])], False, id="one that died"),
    ],
)
async def test_a_queue_is_served_while_a_live_worker_lists_it(
    workers: list[tuple[int, list[str]]], *, is_served: bool, client: Client, redis: Redis
) -> None:
    await redis.hset("chat:workers", "w", "unreadable")
    for number, (age, queues) in enumerate(workers):
        beat = int((time.time() - age) * 1000)
        line = WorkerRecord(name="w", beat=beat, started=1, slots=1, running=0, finished=0, queues=tuple(queues))
        await redis.hset("chat:workers", f"w{number}", to_json(line))
    assert await client.is_served("slow") is is_served


async def test_a_worker_record_lists_the_queues_that_it_serves(
    client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, queues=("fast", "slow"))
    await eventually(lambda: client.is_served("slow"))
    assert not await client.is_served("default")


async def test_enqueue_with_follow_warns_when_no_worker_serves_the_queue(
    client: Client,
    start_worker: StartWorker,
    simulator: Simulator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After 3 s of waiting `worker enqueue --follow` warns, once."""
    request_id = await client.enqueue(ASK, queue="slow")
    printing = asyncio.create_task(print_answer(client, request_id, as_json=False, queue="slow", unserved_after=0.02))
    logged = ""

    async def has_warned() -> bool:
        nonlocal logged
        logged += capsys.readouterr().err
        return "no worker serves the queue slow: start one with worker run --queues slow" in logged

    await eventually(has_warned)
    await start_worker(simulator, queues=("slow",))
    assert await printing
    assert "serves" not in capsys.readouterr().err

"""`worker pause`, `worker resume` and `worker drain`: what they print, and that they return when it is true."""

import asyncio
import json
import re
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result
from conftest import StartSimulator, StartWorker
from redis.asyncio import Redis
from steered_clock import SteeredClock
from waits import eventually

from worker import Client, Delta
from worker.broker.worker_registry import WorkerRegistry
from worker.cli.main import main
from worker.contract.entries import to_json
from worker.contract.keys import Keys
from worker.contract.records import WorkerRecord
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator

MESSAGES = [{"role": "user", "content": "Who are you?"}]
REQUEST = {"messages": MESSAGES}


async def worker(redis_url: str, *arguments: str) -> Result:
    runner = CliRunner(env={"REDIS_URL": redis_url})
    return await asyncio.to_thread(runner.invoke, main, arguments)


async def names(redis: Redis, count: int) -> list[str]:
    """The names of the workers, once there are so many."""
    registry = WorkerRegistry(redis, Keys())

    async def are_there() -> bool:
        return len(await registry.names()) == count

    await eventually(are_there)
    return sorted(await registry.names())


async def add_record(redis: Redis, name: str, *queues: str, silent: int = 0) -> None:
    """Add the record of a worker that does nothing. It was last renewed `silent` seconds ago."""
    beat = ((await redis.time())[0] - silent) * 1000
    record = WorkerRecord(name=name, beat=beat, started=1, slots=8, running=3, finished=0, queues=queues, lease=30)
    await redis.hset("chat:workers", name, to_json(record))


async def test_after_a_pause_has_returned_no_job_of_the_queue_starts(
    redis: Redis, redis_url: str, client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    for _ in range(2):
        await start_worker(simulator, queues="default,bulk", lease=60)  # the pause waits for up to two beats
    await names(redis, 2)
    paused = await worker(redis_url, "pause", "bulk", "--for", "10m", "--why", "upgrade")
    assert paused.exit_code == 0, paused.output
    assert re.match(
        r"queue bulk is paused until \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ; workers that serve it: 2; jobs that wait: 0\n"
        r"all of them have confirmed: none of its jobs starts\n$",
        paused.stdout,
    )
    waits = await client.enqueue(REQUEST, queue="bulk")
    assert (await client.result(await client.enqueue(REQUEST))).outcome == "done"
    assert not [1 for key in await redis.keys("chat:ended:*") if waits.encode() in key]
    assert (await client.status(waits)).state.value == "queued"
    as_json = json.loads((await worker(redis_url, "pause", "bulk", "--json")).stdout)
    assert (as_json["waiting"], as_json["until"], as_json["unconfirmed"]) == (1, 0, [])
    assert len(as_json["workers"]) == 2
    resumed = await worker(redis_url, "resume", "bulk")
    assert resumed.stdout.startswith("queue bulk is resumed; it was paused since ")
    assert (await client.result(waits)).outcome == "done"
    assert "was not paused; no queue is" in (await worker(redis_url, "resume", "bulk")).stderr


async def test_a_pause_names_the_workers_that_have_not_confirmed_it(redis: Redis, redis_url: str) -> None:
    await add_record(redis, "dead", "bulk", silent=200)
    paused = await worker(redis_url, "pause", "bulk", "--json")
    assert paused.exit_code == 1
    assert json.loads(paused.stdout)["unconfirmed"] == ["dead"]
    assert re.search(r"dead has been silent for 2\d\d s", paused.stderr)
    assert await redis.hexists("chat:control", "pause:bulk")


async def test_a_resume_of_a_queue_that_is_not_paused_names_those_that_are(redis: Redis, redis_url: str) -> None:
    await worker(redis_url, "pause", "bulk")
    resumed = await worker(redis_url, "resume", "bluk")
    assert (resumed.exit_code, resumed.stderr) == (0, "· queue bluk was not paused; those that are: bulk\n")
    assert await redis.hexists("chat:control", "pause:bulk")


async def test_an_unknown_queue_is_paused_with_a_warning(redis: Redis, redis_url: str) -> None:
    await redis.sadd("chat:queues", "bulk", "default")
    paused = await worker(redis_url, "pause", "bluk")
    assert paused.exit_code == 0
    assert "no queue of this name is in use; those are: bulk, default" in paused.stderr
    await redis.sadd("chat:queues", "bluk")
    assert "no worker serves it now" in (await worker(redis_url, "pause", "bluk")).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pause", "a b"), "no queue's name"),
        (("pause", "bulk", "--for", "soon"), "write it as 90s, 10m, 2h, 1d or 1h30m"),
        (("pause", "bulk", "--for", "10"), "write it as"),
        (("pause", "bulk", "--for", "0s"), "from 1s to 366d"),
        (("pause", "bulk", "--for", "9" * 30 + "d"), "from 1s to 366d"),
        (("pause", "bulk", "--why", "w" * 501), "may have 500"),
        (("drain", "none", "--why", "w" * 501), "may have 500"),
    ],
)
async def test_bad_words_are_refused_before_anything_happens(
    arguments: tuple[str, ...], message: str, redis: Redis, redis_url: str
) -> None:
    result = await worker(redis_url, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not await redis.exists("chat:control")


async def test_times_may_be_composed(redis: Redis, redis_url: str) -> None:
    await worker(redis_url, "pause", "bulk", "--for", "1h30m")
    pause = cast("dict[str, Any]", json.loads(await redis.hget("chat:control", "pause:bulk") or b""))
    assert pause["until"] - pause["since"] == 5_400_000


async def test_a_drained_worker_is_followed_until_others_have_its_jobs(
    redis: Redis, redis_url: str, client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock()
    simulator = await start_simulator(clock=clock)
    await start_worker(simulator, drain_timeout=0.1)
    (name,) = await names(redis, 1)
    running = await client.enqueue(REQUEST | {"simulate": {"rate": 2, "tokens": 100}})
    async with asyncio.timeout(60):
        async for entry in client.follow(running):
            if isinstance(entry, Delta):
                break
    await start_worker(simulator)
    await names(redis, 2)
    drained = await worker(redis_url, "drain", name[:-2], "--wait", "--json", "--why", "test")
    assert drained.exit_code == 0, drained.output
    states = [json.loads(line) for line in drained.stdout.splitlines()]
    assert {state["worker"] for state in states} == {name}
    assert states[0]["state"] == "asked"
    assert states[-1] == {"worker": name, "state": "gone", "running": 0, "ended": 0, "handed_over": 1}
    clock.hurry()
    assert (await client.result(running)).text == answer_to(MESSAGES, tokens=100)
    assert not await redis.exists("chat:control")


async def test_a_name_that_is_unknown_or_ambiguous_is_refused_with_the_candidates(redis: Redis, redis_url: str) -> None:
    none = await worker(redis_url, "drain", "w1")
    assert (none.exit_code, none.stderr) == (1, "Error: no worker is named 'w1': no worker runs\n")
    await add_record(redis, "w1-a")
    await add_record(redis, "w1-b")
    unknown = await worker(redis_url, "drain", "w2", "--json")
    assert json.loads(unknown.stderr)["error"] == "no worker is named 'w2'. The workers are: w1-a, w1-b"
    await redis.hdel("chat:workers", "w1-b")
    empty = await worker(redis_url, "drain", "")
    assert (empty.exit_code, empty.stderr) == (1, "Error: no worker is named ''. The workers are: w1-a\n")
    await add_record(redis, "w1-b")
    ambiguous = await worker(redis_url, "drain", "w1")
    assert "begins the names of 2 workers: w1-a, w1-b" in ambiguous.stderr
    await add_record(redis, "\x1b[2Jw")
    assert "The workers are: �[2Jw, w1-a" in (await worker(redis_url, "drain", "w2")).stderr
    assert not await redis.exists("chat:control")


async def test_what_an_operator_must_know_before_a_drain_is_said(redis: Redis, redis_url: str) -> None:
    await add_record(redis, "w1", "default", "bulk", silent=200)
    await add_record(redis, "w2", "default")
    drained = await worker(redis_url, "drain", "w1")
    assert drained.exit_code == 0
    assert "asked to drain; jobs that run there: 3" in drained.stdout
    assert "it has been silent for 20" in drained.stderr
    assert "no other worker serves the queue bulk" in drained.stderr
    assert "queue default" not in drained.stderr

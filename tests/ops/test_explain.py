"""The story of a request in each of its states, and that no story has content."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import cast

import msgspec
import pytest
from click.testing import CliRunner
from conftest import StartSimulator, StartWorker, stream
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.broker.consumers import HANDED_OVER, WAITING
from worker.cli.main import main
from worker.contract.entries import to_json
from worker.contract.keys import Keys
from worker.contract.records import WorkerRecord
from worker.ops.explain import Story, explain
from worker.sandbox.simulator.server import Options, Scenario

SECRET = "what-nobody-may-see"
REQUEST = {"model": "reciter", "messages": [{"role": "user", "content": SECRET}]}


@pytest.fixture(autouse=True)
async def _no_story_has_content(redis: Redis) -> AsyncIterator[None]:
    yield
    for key in cast("list[bytes]", await redis.keys("chat:tokens:*")):
        story = await explain(redis, Keys(), key.decode().partition("{")[2].rstrip("}"))
        assert SECRET not in to_json(msgspec.to_builtins(story))
    await redis.delete("chat:jobs", "chat:queues")


async def story_of(redis: Redis, request_id: str) -> Story:
    return await explain(redis, Keys(), request_id)


async def enqueue_in_a_millisecond_of_its_own(redis: Redis, client: Client) -> str:
    """The place in a queue is estimated by the milliseconds in which jobs were added."""
    request_id = await client.enqueue(REQUEST)
    newest, _ = (await stream(redis, "chat:jobs"))[-1]

    async def has_passed() -> bool:
        seconds, microseconds = await redis.time()
        return seconds * 1000 + microseconds // 1000 > int(newest.partition(b"-")[0])

    await eventually(has_passed)
    return request_id


async def test_a_waiting_request_has_its_place_and_what_it_waits_for(redis: Redis, client: Client) -> None:
    ids = [await enqueue_in_a_millisecond_of_its_own(redis, client) for _ in range(3)]
    first, *_, last = [await story_of(redis, request_id) for request_id in ids]
    assert (first.state, first.before, last.before) == ("waiting", 0, 2)
    assert last.waits == "a worker that serves the queue: none does"
    beat = (await redis.time())[0] * 1000
    record = WorkerRecord(name="w", beat=beat, started=beat, slots=8, running=0, finished=0, queues=("default",))
    await redis.hset("chat:workers", "w", to_json(record))
    assert (await story_of(redis, ids[-1])).waits == "a worker that takes the job"
    await redis.hset("chat:control", "pause:default", to_json({"by": "ann", "since": beat}))
    assert (await story_of(redis, ids[-1])).waits == "the end of the queue's pause (worker resume default)"
    await redis.delete("chat:workers", "chat:control")
    assert [first.job, last.job] == [(await stream(redis, "chat:jobs"))[at][0].decode() for at in (0, -1)]
    for consumer, waits in (
        (f"{WAITING}-:big", "room at a vLLM server for big: the job is parked"),
        (HANDED_OVER, "another worker, which continues the job in a moment"),
        ("one", "its first entry by worker one, which has taken the job"),
    ):
        await redis.xreadgroup("workers", consumer, {"chat:jobs": ">"}, count=1)
        story = await story_of(redis, ids.pop(0))
        assert (story.waits, story.before) == (waits, None)


async def test_a_job_of_a_plain_xadd_is_found_in_its_queue_before_a_worker_starts_it(redis: Redis) -> None:
    for number in range(250):
        await redis.xadd("chat:jobs:other", {"request": SECRET, "id": f"plain-{number}"})
    job = (await stream(redis, "chat:jobs:other"))[-1][0].decode()
    story = await story_of(redis, "plain-249")
    assert (story.state, story.queue, story.job) == ("waiting", "other", job)
    assert (story.waits, story.queued) == ("a worker that serves the queue: none does", int(job.partition("-")[0]))
    assert (await story_of(redis, "plain-250")).state == "unknown"
    await redis.delete("chat:jobs:other")


async def test_the_id_of_a_job_tells_the_story_of_its_request(redis: Redis, client: Client) -> None:
    """`worker top` shows a job by its id if the lifecycle no longer has its start."""
    await redis.sadd("chat:queues", "a-text")
    await redis.set("chat:jobs:a-text", "of another program", ex=60)
    request_id = await client.enqueue(REQUEST, queue="other")
    job = (await stream(redis, "chat:jobs:other"))[-1][0].decode()
    story = await story_of(redis, job)
    assert (story.id, story.state, story.queue, story.job) == (request_id, "waiting", "other", job)
    assert (await story_of(redis, "1-1")).state == "unknown"
    await redis.delete("chat:jobs:other", "chat:jobs:a-text")


async def test_a_job_id_of_two_queues_names_both_requests(redis: Redis, redis_url: str) -> None:
    await redis.sadd("chat:queues", "one", "two", "three")
    for queue, request_id in (("one", "first"), ("two", "second"), ("three", "first")):
        await redis.xadd(f"chat:jobs:{queue}", {"request": SECRET, "id": request_id}, id="7-0")
    runner = CliRunner(env={"REDIS_URL": redis_url})
    told = await asyncio.to_thread(runner.invoke, main, ["explain", "7-0"])
    assert told.exit_code == 1
    for found in ("request first in queue one", "request first in queue three", "request second in queue two"):
        assert found in told.output
    await redis.delete("chat:jobs:two")
    assert (await story_of(redis, "7-0")).id == "first", "both jobs are of one request"
    await redis.delete("chat:queues", "chat:jobs:one", "chat:jobs:three")


async def test_in_a_queue_in_use_a_job_of_a_plain_xadd_is_found_without_the_right_to_search_all_keys(
    redis: Redis, redis_url: str
) -> None:
    await redis.sadd("chat:queues", "other", "text")
    await redis.set("chat:jobs:text", "of another program", ex=60)
    await redis.xadd("chat:jobs:other", {"request": SECRET, "id": "plain"})
    await redis.acl_setuser(
        "modest", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"], commands=["-scan"]
    )
    async with Redis.from_url(redis_url.replace("//", "//modest:x@"), protocol=2) as modest:
        story = await story_of(modest, "plain")
        assert (story.state, story.queue) == ("waiting", "other")
        assert (await story_of(modest, "nobody")).state == "unknown"
    await redis.acl_deluser("modest")
    await redis.delete("chat:queues", "chat:jobs:other", "chat:jobs:text")


async def test_a_request_that_went_on_elsewhere_has_its_attempts(
    redis: Redis, client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    breaking = await start_simulator(Options(scenario=Scenario(rate=50, fault="reset", after=5, times=1)))
    whole = await start_simulator(Options(scenario=Scenario(rate=50)))
    await start_worker(breaking, whole)
    request_id = await client.enqueue(REQUEST)
    await client.result(request_id)

    async def has_ended() -> bool:
        return bool((await story_of(redis, request_id)).server)

    await eventually(has_ended)  # the log, the tombstone and the lifecycle, which may come last
    story = await story_of(redis, request_id)
    assert (story.state, story.outcome, story.finish_reason) == ("ended", "done", "stop")
    first, second = story.attempts
    assert (first.reason, bool(second.reason), first.model) == ("", True, "reciter")
    assert first.worker == second.worker
    assert second.kept.startswith("1-")
    assert first.deltas + second.deltas >= (story.usage.get("completion_tokens") or 0) > first.deltas > 0
    assert story.started >= story.queued
    assert story.log_for
    assert story.tombstone_for
    assert story.server == whole.url
    assert cast("int", story.timings["interrupted_ms"]) > 0
    await redis.delete(Keys().tokens(request_id))
    expired = await story_of(redis, request_id)
    assert (expired.state, expired.outcome, expired.queue, expired.job) == ("expired", "done", "default", story.job)
    assert (expired.usage, expired.timings, expired.server) == (story.usage, story.timings, whole.url)
    (attempt,) = expired.attempts
    assert (attempt.number, attempt.worker, attempt.model) == (second.number, second.worker, "reciter")
    await redis.delete(Keys().lifecycle)
    assert (await story_of(redis, request_id)).attempts == ()


async def test_a_running_request_and_one_that_was_buried(
    redis: Redis, client: Client, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=1, tokens=100))))
    request_id = await client.enqueue(REQUEST)

    async def streams() -> bool:
        story = await story_of(redis, request_id)
        return story.state == "running" and story.attempts[0].deltas > 0

    await eventually(streams)
    await client.cancel(request_id)
    await redis.xadd("chat:jobs", {"id": "bad", "request": "{"})

    async def has_letter() -> bool:
        return bool((await story_of(redis, "bad")).letter)

    await eventually(has_letter)
    story = await story_of(redis, "bad")
    assert (story.outcome, story.code) == ("error", "invalid_job")
    assert story.buried.startswith("the request is not JSON")


async def test_the_command_prints_it_and_knows_nothing_of_an_unknown_request(redis_url: str, client: Client) -> None:
    request_id = await client.enqueue(REQUEST)
    runner = CliRunner(env={"REDIS_URL": redis_url})
    told = await asyncio.to_thread(runner.invoke, main, ["explain", request_id])
    assert told.exit_code == 0
    assert told.output.startswith(f"request {request_id} · waiting\n  queue      default, job ")
    assert max(map(len, told.output.splitlines())) <= 80
    as_json = await asyncio.to_thread(runner.invoke, main, ["explain", request_id, "--json"])
    assert json.loads(as_json.output)["state"] == "waiting"
    unknown = await asyncio.to_thread(runner.invoke, main, ["explain", "nobody"])
    assert (unknown.exit_code, "no log, no tombstone and no waiting job" in unknown.output) == (1, True)


async def test_a_log_that_tells_no_state_is_not_called_missing(redis: Redis, redis_url: str) -> None:
    await redis.xadd("chat:tokens:{foreign}", {"type": "of another program"})
    await redis.expire("chat:tokens:{foreign}", 600)
    runner = CliRunner(env={"REDIS_URL": redis_url})
    told = await asyncio.to_thread(runner.invoke, main, ["explain", "foreign"])
    assert told.exit_code == 1
    assert "its log has no entry that tells a state" in told.output
    assert "it has no log" not in told.output


async def test_a_key_of_another_type_is_no_fault_of_the_url(redis: Redis, redis_url: str) -> None:
    await redis.set("chat:tokens:{foreign}", "a text", ex=600)
    runner = CliRunner(env={"REDIS_URL": redis_url})
    told = await asyncio.to_thread(runner.invoke, main, ["explain", "foreign"])
    await redis.delete("chat:tokens:{foreign}")
    assert told.exit_code == 1
    assert "another program wrote to a key of this prefix" in told.output
    assert "see REDIS_URL" not in told.output

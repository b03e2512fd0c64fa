"""The running requests as an operator sees them: which there are, how far they are, and what is not known."""

from typing import cast

from conftest import StartSimulator, StartWorker, stream
from pending_jobs import append, pend
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.broker.consumers import HANDED_OVER, WAITING
from worker.contract.keys import GROUP, Keys
from worker.ops.running import RunningPicture, RunningRequest, RunningRequests, shares
from worker.sandbox.simulator.server import Options, Scenario

STORY = {"model": "reciter", "messages": [{"role": "user", "content": "Tell me a story"}]}


async def _picture(redis: Redis, *queues: str) -> RunningPicture:
    running = RunningRequests(redis, Keys())
    try:
        return await running.read(queues or ("default",))
    finally:
        await running.aclose()


async def test_a_running_request_is_listed_with_its_worker_and_its_progress(
    redis: Redis, client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=50, tokens=4000))))
    request_id = await client.enqueue(STORY)
    running, seen = RunningRequests(redis, Keys()), list[RunningRequest]()

    async def has_grown() -> bool:
        picture = await running.read(("default",))
        seen.extend(picture.requests)
        return bool(picture.requests) and picture.requests[0].has_grown

    await eventually(has_grown)
    last = seen[-1]
    (name,) = cast("list[bytes]", await redis.hkeys("chat:workers"))
    assert (last.request_id, last.queue, last.worker, last.attempt) == (request_id, "default", name.decode(), 1)
    assert last.has_started
    assert last.tokens
    assert last.rate
    assert last.silence == 0
    assert last.age < 60
    await client.cancel(request_id)
    await client.result(request_id)

    async def is_gone() -> bool:
        return not (await running.read(("default",))).requests

    await eventually(is_gone)
    await running.aclose()


async def test_a_log_that_does_not_grow_is_silent_for_as_long_as_it_was_watched(redis: Redis) -> None:
    await redis.xgroup_create("chat:jobs", GROUP, mkstream=True)
    request_id = await pend(redis, "one")
    await append(redis, request_id, "1-0", "1-1", "2-0", "2-1", "2-2")
    running = RunningRequests(redis, Keys())
    (first,) = (await running.read(["default"])).requests
    assert (first.tokens, first.rate, first.silence, first.attempt) == (2, None, 0, 2)
    (second,) = (await running.read(["default"])).requests
    assert (second.tokens, second.rate, second.has_grown) == (2, 0, False)
    assert second.silence is not None
    assert second.silence > 0
    await append(redis, request_id, "2-3")
    (third,) = (await running.read(["default"])).requests
    assert (third.tokens, third.silence, third.has_grown) == (3, 0, True)
    await append(redis, request_id, "18446744073709551615-18446744073709551615")
    (fourth,) = (await running.read(["default"])).requests
    assert (fourth.has_ended, fourth.attempt) == (True, 0)
    await running.aclose()


async def test_jobs_that_wait_for_a_worker_do_not_run(redis: Redis) -> None:
    await redis.xgroup_create("chat:jobs", GROUP, mkstream=True)
    handed_over = await pend(redis, HANDED_OVER)
    await pend(redis, f"{WAITING}0:reciter")
    await redis.xadd("chat:jobs", {"id": "unread", "request": "{}"})
    picture = await _picture(redis, "default", "nobody-used-this-queue")
    assert [(one.request_id, one.worker) for one in picture.requests] == [(handed_over, HANDED_OVER)]
    assert picture.total == 1


async def test_a_job_whose_start_is_not_in_the_lifecycle_is_listed_without_a_request(redis: Redis) -> None:
    await redis.xgroup_create("chat:jobs", GROUP, mkstream=True)
    await pend(redis, "one", started=False)
    ((entry_id, _),) = await stream(redis, "chat:jobs")
    (request,) = (await _picture(redis)).requests
    assert (request.job, request.request_id, request.has_started) == (entry_id.decode(), "", False)
    assert request.tokens is None


async def test_the_start_of_an_old_request_is_found_behind_many_later_records(redis: Redis) -> None:
    await redis.xgroup_create("chat:jobs", GROUP, mkstream=True)
    old = await pend(redis, "one")
    pipe = redis.pipeline(transaction=False)
    for number in range(60):
        kind = ("started", "finished")[number % 2]
        pipe.xadd("chat:lifecycle", {"type": kind, "id": f"r{number}", "job": f"{number}-1", "queue": "default"})
    await pipe.execute()
    young = await pend(redis, "one")
    running = RunningRequests(redis, Keys(), page=5)
    first = await running.read(["default"])
    assert [request.request_id for request in first.requests] == ["", young], "a picture reads a bounded part"

    async def both_are_known() -> bool:
        picture = await running.read(["default"])
        return [request.request_id for request in picture.requests] == [old, young]

    await eventually(both_are_known)
    later = await pend(redis, "two")
    assert [one.request_id for one in (await running.read(["default"])).requests] == [old, young, later]
    await running.aclose()


async def test_of_more_requests_than_the_limit_the_oldest_of_each_worker_are_listed(redis: Redis) -> None:
    await redis.xgroup_create("chat:jobs", GROUP, mkstream=True)
    many = [await pend(redis, "busy") for _ in range(10)]
    few = [await pend(redis, "idle") for _ in range(2)]
    running = RunningRequests(redis, Keys(), limit=6)
    picture = await running.read(["default"])
    await running.aclose()
    assert [request.request_id for request in picture.requests] == [*many[:4], *few]
    assert picture.total == 12


def test_a_limit_is_divided_so_that_small_parts_get_all() -> None:
    assert shares([10, 2], 6) == [4, 2]
    assert shares([5, 5, 5], 100) == [5, 5, 5]
    assert shares([50, 50], 9) == [4, 5]
    assert shares([], 9) == []

"""An id that a bare XADD uses again: nothing happens for the same request; a job of another request is buried."""

import json

import pytest
from checks import chat_request, expected, has_begun, log_of, pending
from conftest import StartSimulator, StartWorker, stream
from redis.asyncio import Redis
from waits import eventually

from worker.sandbox.simulator.server import Options, Scenario, Simulator

KEY = "chat:tokens:{r}"
FIRST, SECOND = ({"id": "r", "request": json.dumps(chat_request(text))} for text in ("first", "second"))


async def add(redis: Redis, job: dict[str, str]) -> object:
    return await redis.xadd("chat:jobs", job)  # type: ignore[arg-type]  # dict is invariant


async def all_done(redis: Redis) -> None:
    async def nothing_left() -> bool:
        return bool(await redis.xinfo_groups("chat:jobs")) and not await pending(redis)

    await eventually(nothing_left)


async def test_a_job_that_uses_the_id_of_another_request_is_buried_and_leaves_the_log_alone(
    redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """It is so while the first job runs, after its end, and when only its tombstone is left."""
    simulator = await start_simulator(Options(scenario=Scenario(rate=100)))
    await start_worker(simulator)
    await add(redis, FIRST)
    await has_begun(redis, "r", 1)
    others = []
    for step in ("running", "ended", "expired"):
        if step == "expired":
            await redis.delete(KEY)
        others.append(await add(redis, SECOND))
        await add(redis, FIRST)
        await all_done(redis)
        if step != "expired":
            log = await log_of(redis, "r")
            assert "".join(line.fields.get("content", "") for line in log) == expected("first")
    letters = [fields for _, fields in await stream(redis, "chat:dead")]
    assert [letter[b"job"] for letter in letters] == others
    assert all(b"was used before, for another request" in letter[b"reason"] for letter in letters)
    assert len(simulator.served) == 1
    assert json.loads(await redis.get("chat:ended:{r}") or b"")["outcome"] == "done"


@pytest.mark.parametrize("stone", [{"outcome": "done", "time": 1}, {"outcome": "done", "time": 1, "digest": ""}, "?"])
async def test_without_a_digest_a_second_job_counts_as_the_same_request(
    stone: object, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await redis.set("chat:ended:{r}", json.dumps(stone), ex=60)
    await add(redis, SECOND)
    await start_worker(simulator)
    await eventually(lambda: redis.exists("chat:jobs"))
    await all_done(redis)
    assert not await redis.exists("chat:dead")
    assert not simulator.served


async def test_a_job_does_not_continue_the_log_of_another_request_whose_job_is_gone(
    redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    begun = {"type": "started", "queue": "default", "job": "1-1", "owner": "gone", "digest": "of the first"}
    await redis.xadd(KEY, begun, id="1-0")  # type: ignore[arg-type]  # dict is invariant
    await redis.xadd(KEY, {"type": "delta", "content": "first"}, id="1-1")
    await redis.expire(KEY, 60)
    await add(redis, SECOND)
    await start_worker(simulator)
    await all_done(redis)
    assert [line.type for line in await log_of(redis, "r")] == ["started", "delta"]
    assert len(await stream(redis, "chat:dead")) == 1
    assert not simulator.served

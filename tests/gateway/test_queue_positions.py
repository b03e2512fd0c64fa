"""Estimates of how many jobs are before a waiting one."""

import asyncio

import pytest
from conftest import StartSimulator, StartWorker
from readers import calls
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.broker.queue_depth import Backlog, jobs_before
from worker.contract.keys import Keys
from worker.gateway.queue_positions import QueuePositions
from worker.sandbox.simulator.server import Options, Scenario

ASK: dict[str, object] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.mark.parametrize(
    ("added", "backlog", "before"),
    [
        (1000, Backlog(unread=5, first=1000, last=2000), 0),
        (2000, Backlog(unread=5, first=1000, last=2000), 4),
        (1500, Backlog(unread=5, first=1000, last=2000), 2),
        (2500, Backlog(unread=5, first=1000, last=2000), 4),  # added after the queue was measured
        (1000, Backlog(unread=5, first=1000, last=1000), 4),
        (1000, Backlog(unread=1, first=1000, last=1000), 0),
        (1500, Backlog(unread=5, parked=3, first=1000, last=2000), 5),
        (900, Backlog(unread=5, parked=3, first=1000, last=2000), 2),
        (900, Backlog(unread=5, first=1000, last=2000), 0),  # a worker has read it and starts it now
        (900, Backlog(), 0),
    ],
)
def test_a_place_is_interpolated_by_the_time_at_which_the_job_was_added(
    added: int, backlog: Backlog, before: int
) -> None:
    assert jobs_before(added, backlog) == before


@pytest.fixture
def positions(redis: Redis) -> QueuePositions:
    return QueuePositions(redis, Keys())


async def spaced(client: Client, redis: Redis, count: int, queue: str = "default") -> list[str]:
    """Enqueue jobs that are at least a millisecond apart."""
    ids: list[str] = []
    for _ in range(count):
        ids.append(await client.enqueue(ASK, queue=queue))
        began = _microseconds(await redis.time())

        async def has_passed(began: int = began) -> bool:
            return _microseconds(await redis.time()) > began + 1000

        await eventually(has_passed)
    return ids


def _microseconds(time: tuple[int, int]) -> int:
    return time[0] * 1_000_000 + time[1]


async def test_the_first_and_the_last_job_of_a_queue_that_nobody_serves_have_exact_places(
    client: Client, redis: Redis, positions: QueuePositions
) -> None:
    ids = await spaced(client, redis, 20)
    places = [await positions.position(request_id) for request_id in ids]
    assert (places[0], places[-1]) == (0, 19)
    assert places == sorted(place for place in places if place is not None)
    (other,) = await spaced(client, redis, 1, queue="batch")
    assert await positions.position(other) == 0


async def test_jobs_that_a_worker_has_read_do_not_count(
    client: Client, redis: Redis, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(rate=1, tokens=500)))
    await start_worker(simulator, slots=2, drain_timeout=0.1)
    ids = await spaced(client, redis, 7)

    async def both_run() -> bool:
        return len(simulator.served) == 2

    await eventually(both_run)

    async def are_known() -> bool:
        positions = QueuePositions(redis, Keys())
        places = [await positions.position(request_id) for request_id in ids]
        return places[:2] == [None, None] and places[2] == 0 and places[-1] == 4

    await eventually(are_known)
    for request_id in ids:
        await client.cancel(request_id)


async def test_many_questions_measure_a_queue_once(client: Client, redis: Redis, positions: QueuePositions) -> None:
    ids = await spaced(client, redis, 10)
    await redis.config_resetstat()
    for _ in range(3):
        await asyncio.gather(*(positions.position(request_id) for request_id in ids))
    assert await calls(redis, "xlen") <= 2


async def test_nothing_is_known_of_unknown_jobs_and_of_those_without_a_queued_entry(
    redis: Redis, positions: QueuePositions
) -> None:
    assert await positions.position("unknown") is None
    await redis.xadd("chat:tokens:{old}", {"type": "queued", "v": 1}, id="0-1")
    await redis.expire("chat:tokens:{old}", 60)
    assert await positions.position("old") is None


async def test_nothing_is_known_while_redis_refuses(redis: Redis, client: Client, positions: QueuePositions) -> None:
    (request_id,) = await spaced(client, redis, 1)
    await redis.delete("chat:jobs")
    await redis.set("chat:jobs", "of another program", ex=60)
    assert await positions.position(request_id) is None

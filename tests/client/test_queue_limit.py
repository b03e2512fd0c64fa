"""A limit on waiting jobs: a clear error, and nothing is written."""

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest
from command import run
from redis.asyncio import Redis

from worker import Client, Conflict, QueueFull, SyncClient
from worker.broker.queue_depth import depth_of, waiting_in
from worker.ops.checks import check

ASK: dict[str, object] = {"messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.fixture
async def limited(redis_url: str) -> AsyncIterator[Client]:
    async with Client(redis_url, queue_limit=3) as client:
        yield client


async def full(client: Client, queue: str = "default") -> None:
    for number in range(3):
        await client.enqueue(ASK, id=f"{queue}-{number}", queue=queue)


async def test_at_the_limit_nothing_is_written_and_the_error_says_what_to_do(limited: Client, redis: Redis) -> None:
    await full(limited)
    with pytest.raises(
        QueueFull, match=r"default is full: 3 jobs wait in it, and the limit is 3\. Try again"
    ) as caught:
        await limited.enqueue(ASK, id="one-too-many")
    assert (caught.value.waiting, caught.value.limit) == (3, 3)
    assert await redis.xlen("chat:jobs") == 3
    assert not await redis.exists("chat:tokens:{one-too-many}")
    await limited.enqueue(ASK, queue="other")  # each queue has its own limit


async def test_a_request_that_was_enqueued_before_is_not_refused_for_the_limit(limited: Client) -> None:
    await full(limited)
    assert await limited.enqueue(ASK, id="default-1") == "default-1"
    with pytest.raises(Conflict):
        await limited.enqueue(ASK | {"temperature": 1}, id="default-1")


async def test_only_jobs_that_no_worker_has_taken_count(limited: Client, redis: Redis) -> None:
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    await full(limited)
    await redis.xreadgroup("workers", "one", {"chat:jobs": ">"}, count=2)
    assert await waiting_in(redis, "chat:jobs") == 1
    for _ in range(2):
        await limited.enqueue(ASK)
    with pytest.raises(QueueFull):
        await limited.enqueue(ASK)


async def test_jobs_that_are_not_pending_count_where_redis_does_not_know_the_lag(redis: Redis) -> None:
    """So it is on Redis 6.2, and on 7 after entries in the middle were deleted."""
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    jobs = [cast("bytes", await redis.xadd("chat:jobs", {"n": n})) for n in range(5)]
    await redis.xreadgroup("workers", "one", {"chat:jobs": ">"}, count=2)
    await redis.xdel("chat:jobs", jobs[3])
    (group,) = await redis.xinfo_groups("chat:jobs")
    assert group.get("lag") is None
    assert await waiting_in(redis, "chat:jobs") == 2


@pytest.mark.parametrize("way", ["trimmed", "deleted"])
async def test_jobs_that_were_removed_unread_do_not_count(way: str, redis: Redis) -> None:
    """Redis 7.0 counts entries that were trimmed unread in the group's lag for ever."""
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    jobs = [cast("bytes", await redis.xadd("chat:jobs", {"n": n})) for n in range(20)]
    if way == "trimmed":
        await redis.xtrim("chat:jobs", maxlen=2, approximate=False)
    else:
        await redis.xdel("chat:jobs", *jobs[:18])
    assert await waiting_in(redis, "chat:jobs") == 2, "never above the stream's length"
    await redis.xreadgroup("workers", "one", {"chat:jobs": ">"}, count=20)
    await redis.xack("chat:jobs", "workers", *jobs)
    assert await waiting_in(redis, "chat:jobs") == 0
    assert (await depth_of(redis, "chat:jobs")).waiting == 0


async def test_concurrent_callers_overshoot_the_limit_by_their_number_at_most(limited: Client, redis: Redis) -> None:
    added = await asyncio.gather(*(limited.enqueue(ASK) for _ in range(10)), return_exceptions=True)
    assert all(isinstance(one, str | QueueFull) for one in added)
    assert 3 <= await redis.xlen("chat:jobs") <= 10
    with pytest.raises(QueueFull):
        await limited.enqueue(ASK)


async def test_the_command_and_the_blocking_client_have_the_limit_too(redis_url: str, limited: Client) -> None:
    await full(limited)
    refused = await run("enqueue", "Hi", REDIS_URL=redis_url, WORKER_QUEUE_LIMIT="3")
    assert (refused.status, refused.out) == (1, "")
    assert "Error: the queue default is full: 3 jobs wait in it" in refused.err

    def refuse() -> None:
        with SyncClient(redis_url, queue_limit=3) as client, pytest.raises(QueueFull):
            client.enqueue(ASK)

    await asyncio.to_thread(refuse)


async def test_a_check_warns_of_a_full_queue(redis_url: str, limited: Client) -> None:
    await full(limited)
    options: dict[str, object] = {"redis_url": redis_url, "vllm_urls": "http://127.0.0.1:1", "queue_limit": "3"}
    (finding,) = [finding async for finding in check(options) if finding.subject == "queue default"]
    assert (finding.level, finding.message) == ("warning", "it is full: 3 jobs wait, and the limit is 3")
    assert "WORKER_QUEUE_LIMIT" in finding.fix

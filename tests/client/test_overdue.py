"""A deadline that passes before a worker takes the job: a client that looks ends it, unless a worker has started."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import pytest
from conftest import StartWorker, stream
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually
from written_log import connect, let_deadline_pass, user_without_channels

from worker import Client, Entry, Failed, Idle, Queued, Refused, State, Status
from worker.broker.client_seals import end_overdue, may_be_overdue
from worker.client.following.followers import Followers
from worker.client.timings import Timings
from worker.contract.ids import BEFORE_ALL, SEAL
from worker.contract.keys import Keys
from worker.sandbox.simulator.server import Simulator

ASK: dict[str, object] = {"messages": [{"role": "user", "content": "Who are you?"}]}
LOG, ENDED = "chat:tokens:{r}", "chat:ended:{r}"
WAITS = Status(State.QUEUED)
OVER = Status(State.ENDED, "error")


async def follow(client: Client) -> list[Entry]:
    return [entry async for entry in client.follow("r")]


async def pour(followers: Followers) -> list[Entry]:
    seen: list[Entry] = []
    follower = followers.follow("r", BEFORE_ALL)
    await follower.pour(seen.append)
    await follower.leave()
    return seen


async def has_sealed(redis: Redis) -> bool:
    return await redis.xlen(LOG) == 2


@pytest.mark.parametrize("passes_in", [-0.1, 0.1])
@pytest.mark.parametrize("has_feed", [True, False])
async def test_a_follower_ends_what_nobody_took_before_its_deadline(
    *, passes_in: float, has_feed: bool, client: Client, redis_url: str, redis: Redis
) -> None:
    await client.enqueue(ASK, id="r", timeout=0.1, queue="lonely", retention=60)
    await let_deadline_pass(redis, "r", passes_in)
    soon = Timings(tick=0.01, block=0.05)
    async with (
        user_without_channels(redis, redis_url) as deaf_url,
        aclosing(connect(redis_url if has_feed else deaf_url, soon)) as followers,
    ):
        for seen in await asyncio.gather(*(pour(followers) for _ in range(5))):
            assert [type(entry) for entry in seen] == [Queued, Failed]
            assert isinstance(end := seen[-1], Failed)
            assert (end.id, end.code) == (SEAL, "deadline")
        assert await client.status("r") == OVER
    assert 0 < await redis.ttl(LOG) <= 61
    assert b'"outcome":"error"' in (await redis.get(ENDED) or b"")
    assert await redis.ttl(ENDED) > 3600


async def test_a_request_with_a_tombstone_is_not_ended_again(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r", timeout=0.01)
    await let_deadline_pass(redis, "r")
    await redis.set(ENDED, '{"outcome":"done","time":1}', ex=60)
    assert not await end_overdue(redis, Keys(), "r")
    assert not await has_sealed(redis)


async def test_the_tombstone_outlives_a_log_that_is_kept_for_days(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r", timeout=0.01, retention=3 * 24 * 3600)
    await let_deadline_pass(redis, "r")
    assert await end_overdue(redis, Keys(), "r")
    assert await redis.ttl(ENDED) >= await redis.ttl(LOG) - 1 > 2 * 24 * 3600


async def test_one_tick_after_the_deadline_is_enough(client: Client, redis_url: str, redis: Redis) -> None:
    """No silence of the feed is too long before: a reader learns soon that nobody takes the job."""
    await client.enqueue(ASK, id="r", timeout=0.1)
    await let_deadline_pass(redis, "r")
    async with aclosing(connect(redis_url, Timings(tick=1000.0))) as followers:
        follower, seen = followers.follow("r", BEFORE_ALL), list[Entry]()

        async def listens() -> bool:
            return follower.is_waiting and followers.requests["r"].feed.is_noticed

        with pytest.MonkeyPatch.context() as clock:
            clock.setattr(time, "time", lambda: 0.0)  # the deadline passes once the reader listens
            pouring = asyncio.create_task(follower.pour(seen.append))
            await eventually(listens)
        assert may_be_overdue(follower.machine.queued)
        follower.on_tick()
        await pouring
        assert [type(entry) for entry in seen] == [Queued, Failed]
        await follower.leave()


async def test_status_ends_an_overdue_request(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r", timeout=60)
    assert await client.status("r") == WAITS
    await let_deadline_pass(redis, "r", 0.1)
    await eventually(lambda: is_over(client))
    assert await has_sealed(redis)


async def is_over(client: Client) -> bool:
    return await client.status("r") == OVER


async def test_a_worker_that_starts_in_the_same_moment_keeps_the_job(redis: Redis, redis_proxy: Proxy) -> None:
    async with Client(redis_proxy.redis_url) as client:
        await client.enqueue(ASK, id="r", timeout=0.01)
        await let_deadline_pass(redis, "r")
        sealing = redis_proxy.hold(rb"^EVALSHA .* type error ")
        looks = asyncio.create_task(until_it_is_sealed(client))
        await sealing.met.wait()
        await redis.xadd(LOG, {"type": "started"}, id="1-0")
        sealing.release()
        assert await looks == Status(State.RUNNING)
    assert not await redis.exists(ENDED)


async def test_idle_comes_after_the_entries_that_were_read_while_the_end_is_being_written(
    redis: Redis, redis_proxy: Proxy
) -> None:
    """A reader that goes on after the id of an `Idle` misses nothing."""
    async with Client(redis_proxy.redis_url) as client:
        await client.enqueue(ASK, id="r", timeout=0.01)
        await let_deadline_pass(redis, "r")
        sealing = redis_proxy.hold(rb"^EVALSHA .* type error ")
        async with aclosing(client.follow("r", idle=0.02)) as entries:
            await wait_idle_after_queued(entries, times=2)
            sealing.release()
            assert [entry.type async for entry in entries if entry.type != "idle"] == ["error"]


async def wait_idle_after_queued(entries: AsyncIterator[Entry], times: int) -> None:
    """Take `queued` and then so many `Idle`, each with the id of `queued`.

    On a busy machine the first read takes longer than the follower's `idle`: then there are some before `queued` too.
    """
    while isinstance(entry := await anext(entries), Idle):
        assert entry.id == BEFORE_ALL
    assert isinstance(entry, Queued)
    for _ in range(times):
        assert await anext(entries) == Idle(id=entry.id)


async def until_it_is_sealed(client: Client) -> Status:
    """Return the status as soon as it is not `queued`."""
    while (status := await client.status("r")) == WAITS:  # noqa: ASYNC110 - what is waited for is in Redis
        await asyncio.sleep(0.01)
    return status


@pytest.fixture
def fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the clock of this machine ahead of Redis's by more than a thousand years."""
    monkeypatch.setattr(time, "time", lambda: time.monotonic() + 1e11)


@pytest.mark.usefixtures("fast_clock")
async def test_the_clock_of_redis_decides(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r", timeout=60)
    assert await client.status("r") == WAITS
    assert await redis.xlen(LOG) == 1


async def test_without_a_readable_deadline_a_request_is_not_ended(client: Client, redis: Redis) -> None:
    await redis.xadd(LOG, {"type": "queued", "v": 1, "deadline": "soon"}, id="0-1")
    await redis.expire(LOG, 60)
    assert await client.status("r") == WAITS
    await redis.delete(LOG)
    await redis.xadd(LOG, {"type": "queued", "v": 1, "deadline": 1}, id="0-1")
    assert await client.status("r") == OVER
    assert 0 < await redis.ttl(LOG) <= 3600, "a log without an expiry gets one"


READING = ["+@read", "+@connection", "+@pubsub"]
"""Rights of a user who may not write."""


async def add_reader(redis: Redis, rights: list[str], channels: Sequence[str] = ("chat:*",)) -> None:
    await redis.acl_setuser(
        "reader", enabled=True, passwords="+pw", keys=["chat:*"], categories=rights, commands=["+time"],
        reset_channels=True, channels=channels,
    )  # fmt: skip


async def types_of(entries: AsyncIterator[Entry], seen: list[str]) -> None:
    async for entry in entries:
        seen.append(entry.type)  # noqa: PERF401 - what was seen before an error counts


@pytest.mark.parametrize("has_feed", [True, False])
@pytest.mark.parametrize("rights", [READING, [*READING, "+@transaction"], ["+@all", "-@write"]])
async def test_a_user_who_may_only_read_gets_refused_after_the_deadline(
    rights: list[str], *, has_feed: bool, client: Client, redis: Redis, redis_url: str
) -> None:
    await client.enqueue(ASK, id="r", timeout=0.1, queue="lonely")
    await let_deadline_pass(redis, "r")
    await add_reader(redis, rights, channels=["chat:*"] if has_feed else [])
    try:
        async with Client(redis_url.replace("//", "//reader:pw@")) as reader:
            seen: list[str] = []
            with pytest.raises(Refused, match=r"deadline of request r passed before a worker took it.*may not write"):
                await types_of(reader.follow("r", idle=0.02), seen)
            assert [kind for kind in seen if kind != "idle"] == ["queued"]
            assert await reader.status("r") == WAITS
            await eventually(lambda: is_over(client))
            assert [entry.type for entry in await follow(reader)] == ["queued", "error"]
    finally:
        await redis.acl_deluser("reader")


@pytest.mark.usefixtures("fast_clock")
@pytest.mark.parametrize("rights", [READING, ["+@all", "-@write"]])
async def test_the_clock_of_redis_decides_for_a_user_who_may_only_read(
    rights: list[str], client: Client, redis: Redis, redis_url: str
) -> None:
    await client.enqueue(ASK, id="r", timeout=60)
    await add_reader(redis, rights)
    try:
        async with (
            Client(redis_url.replace("//", "//reader:pw@")) as reader,
            aclosing(reader.follow("r", idle=0.02)) as entries,
        ):
            await wait_idle_after_queued(entries, times=3)
    finally:
        await redis.acl_deluser("reader")


async def test_an_overdue_request_is_ended_when_redis_has_memory_again(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r", timeout=0.01)
    await let_deadline_pass(redis, "r")
    await redis.config_set("maxmemory", "1")
    try:
        async with aclosing(client.follow("r", idle=0.02)) as entries:
            await wait_idle_after_queued(entries, times=3)
            assert await client.status("r") == WAITS
            await redis.config_set("maxmemory", "0")
            assert [entry.type async for entry in entries if entry.type != "idle"] == ["error"]
    finally:
        await redis.config_set("maxmemory", "0")


async def test_a_worker_that_comes_later_settles_an_overdue_request(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await client.enqueue(ASK, id="r", timeout=0.1)
    await let_deadline_pass(redis, "r")
    before = await follow(client)
    await start_worker(simulator)

    async def is_done_with() -> bool:
        groups = await redis.xinfo_groups("chat:jobs")
        return bool(groups) and not groups[0]["pending"] and bool(await redis.xlen("chat:lifecycle"))

    await eventually(is_done_with)
    ((_, line),) = await stream(redis, "chat:lifecycle")
    assert (line[b"type"], line[b"id"], line[b"outcome"]) == (b"finished", b"r", b"error")
    assert await follow(client) == before
    assert not simulator.served

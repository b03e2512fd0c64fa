"""Following with time limits: until a log appears, and while nothing comes; and what `open` checks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from inspect import signature

import pytest
from command import run
from proxy import Proxy
from readers import calls
from redis.asyncio import Redis
from waits import eventually
from written_log import END, START, WrittenLog, delta, user_without_channels

from worker import Client, Delta, Entry, Expired, Idle, IncompleteLog, SyncClient, Unavailable, UnknownRequest
from worker.client.async_client import RequestHandle
from worker.client.sync_client import SyncRequestHandle
from worker.contract.entries import Done, Failed, parse
from worker.contract.ids import BEFORE_ALL, SEAL


async def idle(entries: AsyncIterator[Entry]) -> Idle:
    """Return the next entry, which must be an `Idle`."""
    entry = await anext(entries)
    assert isinstance(entry, Idle)
    return entry


async def until(entries: AsyncIterator[Entry], last: Entry) -> list[Entry]:
    """Return the entries up to one, without `Idle`."""
    seen: list[Entry] = []
    while last not in seen:
        if not isinstance(entry := await anext(entries), Idle):
            seen.append(entry)
    return seen


async def test_idle_is_yielded_whenever_nothing_has_come_and_following_goes_on(client: Client, log: WrittenLog) -> None:
    """With `wait_for(anext(…))` in place of `idle`, the first timeout ends the generator."""
    await log.write(START)
    async with aclosing(client.follow("r", idle=0.05)) as entries:
        assert await until(entries, START) == [START]
        for _ in range(3):
            assert (await idle(entries)).id == START.id
        await log.append(delta(1, 1), delta(1, 2))
        assert await until(entries, delta(1, 2)) == [delta(1, 1), delta(1, 2)]
        assert (await idle(entries)).id == (1, 2)
        await log.append(delta(1, 3), END)
        assert await until(entries, END) == [delta(1, 3), END]


async def test_idle_is_yielded_while_redis_does_not_answer_until_patience_ends(
    redis_proxy: Proxy, log: WrittenLog
) -> None:
    await log.write(START)
    async with Client(redis_proxy.redis_url, patience=0.3) as client:
        redis_proxy.refuse()
        await redis_proxy.cut()
        async with aclosing(client.follow("r", idle=0.05)) as entries:
            assert (await idle(entries)).id == BEFORE_ALL
            with pytest.raises(Unavailable):
                [entry async for entry in entries]


async def test_idle_is_yielded_to_a_follower_that_polls(redis: Redis, redis_url: str, log: WrittenLog) -> None:
    await log.write(START)
    async with (
        user_without_channels(redis, redis_url) as deaf_url,
        Client(deaf_url) as client,
        aclosing(client.follow("r", idle=0.05)) as entries,
    ):
        assert await until(entries, START) == [START]
        for _ in range(3):
            assert (await idle(entries)).id == START.id
        await log.write(delta(1, 1), END)
        assert await until(entries, END) == [delta(1, 1), END]


@pytest.mark.parametrize("reads", [True, False])
async def test_a_follower_with_idle_may_stop_at_any_time(
    *, reads: bool, redis_url: str, redis_proxy: Proxy, log: WrittenLog
) -> None:
    before = asyncio.all_tasks()
    await log.write(START)
    async with Client(redis_proxy.redis_url if reads else redis_url) as client:
        async with aclosing(client.follow("r", idle=0.05)) as entries:
            if reads:
                redis_proxy.half_open()
                await idle(entries)
            else:
                await until(entries, START)

        async def nobody_listens() -> bool:
            return not await log.subscribers()

        await eventually(nobody_listens)
        await redis_proxy.cut()

    async def nothing_left() -> bool:
        return asyncio.all_tasks() <= before

    await eventually(nothing_left)


async def test_handles_follow_with_the_arguments_of_their_client() -> None:
    pairs = (RequestHandle.entries, Client.follow), (SyncRequestHandle.entries, SyncClient.follow)
    for entries, follow in pairs:
        expected = [parameter for name, parameter in signature(follow).parameters.items() if name != "request_id"]
        assert list(signature(entries).parameters.values()) == expected


async def test_a_handle_waits_for_its_log(client: Client, log: WrittenLog, redis_url: str) -> None:
    async with aclosing(RequestHandle("r", client).entries(wait=30, idle=0.05)) as entries:
        assert (await idle(entries)).id == BEFORE_ALL
        await log.write(START, END)
        assert await until(entries, END) == [START, END]

    def synchronously() -> list[Entry]:
        with SyncClient(redis_url) as blocking:
            return list(SyncRequestHandle("r", blocking).entries(wait=30))

    assert await asyncio.to_thread(synchronously) == [START, END]


async def test_idle_is_not_an_entry_of_a_log(client: Client) -> None:
    assert Idle(id=START.id).as_dict() == {"id": "1-0", "type": "idle"}
    assert not isinstance(parse("1-1", {"type": "idle"}), Idle)
    with pytest.raises(ValueError, match="idle"):
        await anext(client.follow("r", idle=0))


async def test_open_raises_before_the_first_entry(
    client: Client, redis: Redis, log: WrittenLog, redis_url: str
) -> None:
    """A server can then answer 404 or 410."""
    with pytest.raises(UnknownRequest):
        await client.open("r")
    await redis.set("chat:ended:{r}", '{"outcome":"done","time":5}', ex=60)
    with pytest.raises(Expired):
        await client.open("r")
    await log.write(START, delta(1, 1))
    with pytest.raises(IncompleteLog):
        await client.open("r", after=str(SEAL))
    await log.write(END)
    with pytest.raises(IncompleteLog):
        await client.open("r", after="1-2")
    for after, is_seen in ((None, log.written), ("0", log.written), ("1-0", log.written[1:]), (str(SEAL), [])):
        assert [entry async for entry in await client.open("r", after=after)] == is_seen

    def synchronously() -> list[Entry]:
        with SyncClient(redis_url) as blocking:
            with pytest.raises(UnknownRequest):
                blocking.open("unknown")
            assert list(blocking.open("r", after="1-1")) == [END]
            return list(blocking.follow("r", wait=1, idle=1))

    assert await asyncio.to_thread(synchronously) == log.written
    await redis.xtrim(log.key, maxlen=1, approximate=False)
    with pytest.raises(IncompleteLog):
        await client.open("r")


async def read_all(client: Client, how: str, wait: float) -> list[Entry]:
    seen: list[Entry] = []
    if how == "pour":
        await client.pour("r", seen.append, wait=wait)
        return seen
    entries = await client.open("r", wait=wait) if how == "open" else client.follow("r", wait=wait)
    return [entry async for entry in entries]


@pytest.mark.parametrize("how", ["follow", "open", "pour"])
async def test_a_log_that_is_not_there_yet_is_waited_for(
    how: str, client: Client, redis: Redis, log: WrittenLog
) -> None:
    """A job that a bare XADD added has no log until a worker takes it."""
    reading = asyncio.create_task(read_all(client, how, wait=30))

    async def has_tried() -> bool:
        return await calls(redis, "xrange") > 0

    await eventually(has_tried)
    await log.write(START, delta(1, 1), END)
    assert await reading == log.written


@pytest.mark.parametrize("how", ["follow", "open", "pour"])
async def test_a_log_that_does_not_appear_in_time_is_unknown(how: str, client: Client) -> None:
    with pytest.raises(UnknownRequest):
        await read_all(client, how, wait=0.05)


async def test_idle_is_yielded_while_a_log_is_waited_for(client: Client, log: WrittenLog) -> None:
    async with aclosing(client.follow("r", wait=30, idle=0.05)) as entries:
        assert (await idle(entries)).id == BEFORE_ALL
        await log.write(START, END)
        assert await until(entries, END) == [START, END]


async def test_following_a_complete_answer_from_its_seal_yields_nothing_and_exits_with_0(
    redis_url: str, log: WrittenLog, redis: Redis
) -> None:
    """It is so for `worker follow --after` too."""
    await log.write(START, Delta(id=delta(1, 1).id, content="whole"))
    unended = await run("follow", "r", "--after", str(SEAL), REDIS_URL=redis_url)
    assert (unended.status, unended.out) == (1, "")
    await log.write(Done(id=SEAL, attempt=1))
    ended = await run("follow", "r", "--after", str(SEAL), REDIS_URL=redis_url)
    assert (ended.status, ended.out) == (0, "")
    await redis.delete(log.key)
    await log.write(START, Failed(id=SEAL, attempt=1, code="deadline"))
    failed = await run("follow", "r", "--after", str(SEAL), REDIS_URL=redis_url)
    assert (failed.status, failed.out) == (1, "")
    assert "error" in failed.err

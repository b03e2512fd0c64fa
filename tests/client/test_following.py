"""Following by the feed: whatever it delivers, loses, doubles or makes up, a follower sees the log in order."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from readers import IMPATIENT, NOBODY_POLLS, POURS, Reader, StartListener, StartReader, calls
from redis.asyncio import Redis
from waits import eventually
from written_log import END, START, WrittenLog, connect, delta, user_without_channels

from worker import Client, Delta, Entry, Expired, Unavailable, UnknownRequest
from worker.client.following.follower import Follower
from worker.client.following.followers import Followers
from worker.client.following.machine import KEPT_BYTES
from worker.client.timings import Timings
from worker.contract.entries import (
    Cancelled,
    Claimed,
    Restarted,
    to_fields,
    to_json,
)
from worker.contract.ids import BEFORE_ALL, SEAL, EntryId
from worker.sandbox.embedded_redis import start_redis


@NOBODY_POLLS
async def test_entries_that_the_feed_delivers_are_not_read(
    start_reader: StartReader, redis: Redis, log: WrittenLog
) -> None:
    await log.write(START)
    reader = start_reader()
    await reader.has(START)
    await reader.listens()
    read = await calls(redis, "xrange")
    for n in range(1, 20):
        await log.append(delta(1, n))
        await reader.has(delta(1, n))
    assert await calls(redis, "xrange") == read
    await log.append(END)
    await reader.task
    assert reader.seen == log.written
    assert await calls(redis, "xread") == 0


@NOBODY_POLLS
@POURS
async def test_pour_hands_over_entries_in_the_step_in_which_they_are_received(
    start_listener: StartListener, followers: Followers, log: WrittenLog
) -> None:
    reader = await start_listener()
    published = delta(1, 1)
    followers.requests["r"].on_message(to_json([[str(published.id), to_fields(published)]]).encode())
    assert reader.seen == [START, published]
    await log.write(published)
    await log.append(END)
    await reader.task
    assert reader.seen == log.written


@NOBODY_POLLS
@POURS
@pytest.mark.parametrize("is_published", [True, False])
async def test_an_error_of_the_callback_ends_pour_and_is_raised_by_it(
    *, is_published: bool, start_reader: StartReader, followers: Followers, log: WrittenLog
) -> None:
    def handle(entry: Entry) -> None:
        if isinstance(entry, Delta):
            raise ZeroDivisionError

    await log.write(START, *([] if is_published else [delta(1, 1)]))
    reader = start_reader(into=handle)
    if is_published:
        await reader.listens()
        await log.append(delta(1, 1))
    with pytest.raises(ZeroDivisionError):
        await reader.task
    assert not followers.requests


@NOBODY_POLLS
@POURS
@pytest.mark.parametrize(("raised", "out"), [(StopIteration, RuntimeError), (asyncio.CancelledError,) * 2])
async def test_an_error_of_one_callback_does_not_disturb_other_followers(
    raised: type[BaseException], out: type[BaseException], start_reader: StartReader, redis: Redis, log: WrittenLog
) -> None:
    def handle(entry: Entry) -> None:
        if isinstance(entry, Delta):
            raise raised

    await log.write(START)
    readers = [start_reader(into=handle), start_reader()]
    await readers[1].listens()
    read = await calls(redis, "xrange")
    await log.append(delta(1, 1), delta(1, 2))
    with pytest.raises(out):
        await readers[0].task
    await readers[1].has(delta(1, 1), delta(1, 2))
    assert await calls(redis, "xrange") == read
    readers[1].task.cancel()


@NOBODY_POLLS
@POURS
async def test_a_callback_that_cancels_its_task_gets_no_further_entry(
    start_reader: StartReader, log: WrittenLog
) -> None:
    taken: list[Entry] = []

    def handle(entry: Entry) -> None:
        taken.append(entry)
        if isinstance(entry, Delta):
            reader.task.cancel()

    await log.write(START)
    reader = start_reader(into=handle)
    await reader.listens()
    await log.write(delta(1, 1), delta(1, 2))
    await log.publish(delta(1, 1), delta(1, 2))
    with pytest.raises(asyncio.CancelledError):
        await reader.task
    assert taken == [START, delta(1, 1)]


@NOBODY_POLLS
@pytest.mark.parametrize("seed", range(8))
async def test_lost_doubled_late_and_shuffled_messages_change_nothing(
    seed: int, start_reader: StartReader, log: WrittenLog
) -> None:
    dice = random.Random(seed)  # noqa: S311 - no secret
    entries: list[Entry] = [START, *(delta(1, n) for n in range(1, 40))]
    entries += [Claimed(id=EntryId(2, 0)), Restarted(id=EntryId(2, 1)), *(delta(2, n) for n in range(2, 40))]
    await log.write(START)
    readers = [start_reader() for _ in range(2)]
    unpublished: list[Entry] = []
    await readers[0].has(START)
    if seed % 2:
        await readers[0].listens()
    for entry in entries[1:]:
        await log.write(entry)
        unpublished.append(entry)
        if dice.random() < 0.5:
            dice.shuffle(unpublished)
        while unpublished and dice.random() < 0.6:
            published = [unpublished.pop() for _ in range(min(len(unpublished), dice.randint(1, 3)))]
            if dice.random() < 0.8:
                await log.publish(*published)
            if dice.random() < 0.3:
                unpublished += published[:1]
        if dice.random() < 0.2:
            readers.append(start_reader(after=dice.choice(log.written).id))
    await log.append(END)
    for reader in readers:
        await reader.task
        assert reader.seen == log.written[-len(reader.seen) :]
    assert readers[0].seen == readers[1].seen == log.written


@pytest.mark.parametrize("timings", [Timings(tick=1000.0, noticed_after=60.0)], ids=["never noticed"])
async def test_entries_that_were_not_published_as_the_subscription_began_are_found(
    start_reader: StartReader, log: WrittenLog
) -> None:
    await log.write(START)
    reader = start_reader()
    await eventually(log.subscribers)
    for n in (1, 2, 3):
        await log.write(delta(1, n))
        await reader.has(delta(1, n))
    await log.append(delta(1, 4))
    await reader.listens()
    reader.task.cancel()


@NOBODY_POLLS
async def test_another_attempt_comes_after_the_rest_of_the_one_before(
    start_listener: StartListener, log: WrittenLog
) -> None:
    reader = await start_listener()
    await log.append(delta(1, 1))
    await log.write(delta(1, 2), delta(1, 3))
    await log.append(Claimed(id=EntryId(2, 0)), Restarted(id=EntryId(2, 1)), delta(2, 2))
    await reader.has(delta(2, 2))
    await log.publish(delta(1, 3))  # by an owner who is late
    await log.write(delta(2, 3))
    await log.append(END)
    await reader.task
    assert reader.seen == log.written


@NOBODY_POLLS
async def test_a_cancel_comes_after_every_entry_before_it(
    start_listener: StartListener, client: Client, log: WrittenLog
) -> None:
    reader = await start_listener()
    await log.append(delta(1, 1))
    await log.write(delta(1, 2))
    await client.cancel("r")
    await reader.task
    assert [entry.id for entry in reader.seen] == [(1, 0), (1, 1), (1, 2), SEAL]
    assert isinstance(reader.seen[-1], Cancelled)


@NOBODY_POLLS
async def test_published_entries_that_the_log_does_not_have_are_not_shown(
    start_listener: StartListener, redis: Redis, log: WrittenLog
) -> None:
    reader = await start_listener()
    await log.publish(delta(1, 7))
    await log.publish(END)
    await log.publish(delta(3, 0))
    await redis.publish(log.channel, "no message")
    await log.append(delta(1, 1), delta(1, 2), END)
    await reader.task
    assert reader.seen == log.written


def in_database(url: str, number: int) -> str:
    return url.removesuffix("/0") + f"/{number}"


@NOBODY_POLLS
async def test_equal_ids_in_two_databases_are_two_requests(
    redis_url: str, redis: Redis, timings: Timings, *, pours: bool
) -> None:
    """Pub/sub has no databases, so the channel names its own."""
    url = in_database(redis_url, 1)
    async with (
        Redis.from_url(url, protocol=2) as other,
        aclosing(connect(redis_url, timings)) as ours,
        aclosing(connect(url, timings)) as theirs,
        Client(url) as client,
    ):
        logs = [WrittenLog(redis), WrittenLog(other, channel="chat:feed:1:{r}")]
        readers: list[Reader] = []
        for log, followers in zip(logs, (ours, theirs), strict=True):
            await log.write(START)
            readers.append(Reader(followers, pours=pours))
            await readers[-1].listens()
        for n in range(1, 5):
            await logs[0].append(delta(1, n))
            await logs[1].append(Delta(id=EntryId(1, n), content="theirs"))
        await logs[0].append(END)
        await client.cancel("r")
        for reader in readers:
            await reader.task
        assert readers[0].seen == logs[0].written
        assert readers[1].seen[:-1] == logs[1].written
        assert isinstance(readers[1].seen[-1], Cancelled)


@IMPATIENT
async def test_a_publisher_from_before_the_channel_had_its_database_is_read(
    redis_url: str, timings: Timings, *, pours: bool
) -> None:
    """During a rolling upgrade the two may use different channels: a follower reads after silence."""
    url = in_database(redis_url, 1)
    async with Redis.from_url(url, protocol=2) as other, aclosing(connect(url, timings)) as followers:
        log = WrittenLog(other)
        await log.write(START)
        reader = Reader(followers, pours=pours)
        await reader.listens()
        for n in range(1, 5):
            await log.append(delta(1, n))
            await reader.has(delta(1, n))
        await log.append(END)
        await reader.task
        assert reader.seen == log.written


@IMPATIENT
async def test_silence_has_the_log_read(start_listener: StartListener, log: WrittenLog) -> None:
    reader = await start_listener()
    await log.write(delta(1, 1), END)
    await reader.task
    assert reader.seen == log.written


@IMPATIENT
async def test_a_log_that_disappears_is_noticed(
    start_listener: StartListener, start_reader: StartReader, redis: Redis, log: WrittenLog
) -> None:
    await log.write(START)
    readers = [start_reader(), start_reader()]
    await readers[0].listens()
    await redis.delete(log.key)
    for reader in readers:
        with pytest.raises(UnknownRequest):
            await reader.task
    reader = await start_listener()
    await redis.set("chat:ended:{r}", '{"outcome":"done","time":5}', ex=60)
    await redis.delete(log.key)
    with pytest.raises(Expired):
        await reader.task


@IMPATIENT
async def test_a_feed_that_delivers_nothing_is_given_up_for_blocking_reads(
    start_listener: StartListener, redis: Redis, log: WrittenLog
) -> None:
    """Such as the feed of a publisher that may not publish, or takes the cluster for an older one."""
    reader = await start_listener()
    n = 0
    while not await calls(redis, "xread"):
        n += 1
        await log.write(delta(1, n))
        await reader.has(delta(1, n))
    await eventually(lambda: nobody_listens(log))
    await log.write(END)
    await reader.task
    assert reader.seen == log.written


async def nobody_listens(*logs: WrittenLog) -> bool:
    return not any([await log.subscribers() for log in logs])


@NOBODY_POLLS
async def test_a_user_without_a_right_to_the_channel_follows_by_reading(
    redis: Redis, redis_url: str, timings: Timings, *, pours: bool
) -> None:
    await redis.config_resetstat()
    async with user_without_channels(redis, redis_url) as deaf_url, aclosing(connect(deaf_url, timings)) as followers:
        for request_id in ("r", "s"):
            log = WrittenLog(redis, request_id)
            await log.write(START)
            reader = Reader(followers, request_id, pours=pours)
            await reader.has(START)
            await log.append(delta(1, 1))
            await reader.has(delta(1, 1))
            await log.append(END)
            await reader.task
            assert reader.seen == log.written
    assert await calls(redis, "xread")


@NOBODY_POLLS
async def test_followers_return_to_the_feed_once_the_right_to_the_channel_is_granted(
    redis: Redis, redis_url: str, timings: Timings, *, pours: bool
) -> None:
    impatient = dataclasses.replace(timings, retry_refused_after=0.02, block=0.2)
    async with (
        user_without_channels(redis, redis_url) as deaf_url,
        aclosing(connect(deaf_url, impatient)) as followers,
    ):
        log = WrittenLog(redis)
        await log.write(START)
        readers = [Reader(followers, pours=pours) for _ in range(3)]

        async def polls() -> bool:
            return await calls(redis, "xread") > 0

        await eventually(polls)
        await log.append(delta(1, 1))
        for reader in readers:
            await reader.has(delta(1, 1))
        await redis.acl_setuser("deaf", enabled=True, channels=["*"])
        for reader in readers:
            await reader.listens()
        polled = await calls(redis, "xread")
        for n in range(2, 20):
            await log.append(delta(1, n))
            for reader in readers:
                await reader.has(delta(1, n))
        await log.append(END)
        for reader in readers:
            await reader.task
            assert reader.seen == log.written
        assert await calls(redis, "xread") == polled
        assert not followers.requests


@NOBODY_POLLS
async def test_a_follower_that_does_not_read_keeps_little_and_misses_nothing(
    followers: Followers, log: WrittenLog
) -> None:
    await log.write(START)
    follower = followers.follow("r", BEFORE_ALL)
    seen = await next_entries(follower)
    reading = asyncio.ensure_future(next_entries(follower))
    await eventually(lambda: is_noticed(followers, follower))
    kept = 0
    for n in range(1, 2000):
        await log.append(delta(1, n))
        kept = max(kept, follower.machine.kept_bytes)
    seen += await reading
    assert 0 < kept <= KEPT_BYTES
    assert len(follower.machine.ready) < 1000
    await log.append(END)
    while not follower.is_over:
        await follower.wait_ready()
        seen += follower.drain()
    await follower.leave()
    assert seen == log.written


async def next_entries(follower: Follower) -> list[Entry]:
    while True:
        await follower.wait_ready()
        if entries := list[Entry](follower.drain()):
            return entries


async def is_noticed(followers: Followers, follower: Follower) -> bool:
    return followers.requests["r"].feed.is_noticed and follower.is_waiting


@NOBODY_POLLS
async def test_entries_that_come_while_a_follower_does_not_wait_are_ready_at_once(
    followers: Followers, log: WrittenLog
) -> None:
    await log.write(START)
    follower = followers.follow("r", BEFORE_ALL)
    assert await next_entries(follower) == [START]
    reading = asyncio.ensure_future(next_entries(follower))
    await eventually(lambda: is_noticed(followers, follower))
    await log.append(delta(1, 1))
    assert await reading == [delta(1, 1)]
    await log.append(delta(1, 2))

    async def is_ready() -> bool:
        return bool(follower.machine.ready)

    await eventually(is_ready)
    assert await asyncio.wait_for(next_entries(follower), 60) == [delta(1, 2)]
    await follower.leave()
    await log.append(END)


@NOBODY_POLLS
async def test_a_follower_is_idle_after_an_entry_that_came_while_it_waited(
    followers: Followers, log: WrittenLog
) -> None:
    """The timer of the first wait fires before the second wait has lasted as long.

    The entry comes by a timer as well: on a busy machine both are late, and fire in their order.
    """
    await log.write(START)
    follower = followers.follow("r", BEFORE_ALL)
    assert await next_entries(follower) == [START]
    reading = asyncio.ensure_future(next_entries(follower))
    await eventually(lambda: is_noticed(followers, follower))
    await log.append(delta(1, 1))
    assert await reading == [delta(1, 1)]
    await log.write(delta(1, 2))
    waiting = asyncio.ensure_future(follower.wait_ready_within(0.5))
    asyncio.get_running_loop().call_later(0.1, follower.on_message, [delta(1, 2)], 10)
    assert await waiting
    assert list(follower.drain()) == [delta(1, 2)]
    assert not await asyncio.wait_for(follower.wait_ready_within(0.5), 60)
    await follower.leave()
    await log.append(END)


async def test_a_follower_goes_on_after_a_reading_that_failed(followers: Followers, log: WrittenLog) -> None:
    follower = followers.follow("r", BEFORE_ALL)
    with pytest.raises(UnknownRequest):
        await follower.wait_ready()
    await log.append(START)
    await follower.wait_ready()
    assert list(follower.drain()) == [START]
    await follower.leave()
    await log.append(END)


async def test_a_follower_that_leaves_while_it_is_idle_stops_reading(followers: Followers, log: WrittenLog) -> None:
    await log.write(START)
    follower = followers.follow("r", BEFORE_ALL)
    assert await next_entries(follower) == [START]

    async def is_noticed() -> bool:
        return followers.requests["r"].feed.is_noticed

    await eventually(is_noticed)
    follower.fall_back()
    before = asyncio.all_tasks()
    assert not await follower.wait_ready_within(0.01)
    reading = asyncio.all_tasks() - before
    assert reading
    await follower.leave()
    assert all(task.done() for task in reading)
    await log.append(END)


async def test_nothing_is_missed_while_subscriptions_are_lost_and_made_again(
    start_listener: StartListener, redis: Redis, log: WrittenLog
) -> None:
    reader = await start_listener()
    for n in range(1, 60):
        await log.append(delta(1, n))
        if n % 10 == 0:
            await redis.client_kill_filter(_type="pubsub")
        if n % 20 == 0:
            await reader.listens()
    await log.append(END)
    await reader.task
    assert reader.seen == log.written


async def test_followers_of_one_request_share_a_subscription(
    start_reader: StartReader, followers: Followers, redis: Redis, log: WrittenLog
) -> None:
    await log.write(START)
    readers = [start_reader() for _ in range(20)]
    for reader in readers:
        await reader.has(START)
    await readers[0].listens()
    assert await log.subscribers() == 1
    await log.append(delta(1, 1))
    for reader in readers:
        await reader.has(delta(1, 1))
    for reader in readers[1:]:
        reader.task.cancel()
    await asyncio.wait([reader.task for reader in readers[1:]])
    await log.append(delta(1, 2))
    await readers[0].has(delta(1, 2))
    assert await log.subscribers() == 1
    await log.append(END)
    await readers[0].task
    await eventually(lambda: nobody_listens(log))
    assert not followers.requests
    assert await redis.ping()


async def test_many_requests_are_followed_on_two_connections(start_reader: StartReader, redis: Redis) -> None:
    logs = [WrittenLog(redis, f"r{number}") for number in range(300)]
    for log in logs:
        await log.write(START)
    before = len(await redis.client_list())
    readers = [start_reader(log.id) for log in logs]
    for reader in readers:
        await reader.listens()
    assert len(await redis.client_list()) - before == 2
    for log in logs:
        await log.append(delta(1, 1), END)
    for reader, log in zip(readers, logs, strict=True):
        await reader.task
        assert reader.seen == log.written
    await eventually(lambda: nobody_listens(*logs[::50]))


def others() -> set["asyncio.Task[object]"]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


@pytest.fixture
async def nothing_left(redis: Redis) -> AsyncIterator[None]:
    """Fails a test that leaves a task or a connection."""
    tasks, connections = others(), len(await redis.client_list())
    yield
    assert others() <= tasks

    async def closed() -> bool:
        return len(await redis.client_list()) <= connections

    await eventually(closed)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("when", ["at once", "while it reads", "while it waits", "without the feed"])
async def test_closing_ends_every_follower_with_unavailable(
    when: str, redis_url: str, redis: Redis, log: WrittenLog, *, pours: bool
) -> None:
    await log.write(START)
    async with user_without_channels(redis, redis_url) as deaf_url:
        followers = connect(deaf_url if when == "without the feed" else redis_url)
        reader = Reader(followers, pours=pours)
        if when == "while it reads":
            await asyncio.sleep(0)
        elif when == "while it waits":
            await reader.listens()
        elif when == "without the feed":
            await reader.has(START)
            await eventually(lambda: calls(redis, "xread"))
        await followers.aclose()
    with pytest.raises(Unavailable, match="closed"):
        await reader.task


@pytest.mark.usefixtures("nothing_left")
async def test_a_follower_may_stop_at_any_time(redis_url: str, log: WrittenLog, *, pours: bool) -> None:
    await log.write(START)
    async with aclosing(connect(redis_url)) as followers:
        for steps in range(30):
            reader = Reader(followers, pours=pours)
            for _ in range(steps):
                await asyncio.sleep(0)
            reader.task.cancel()
            await asyncio.wait([reader.task])
            assert reader.task.cancelled()
        assert not followers.requests
        await eventually(lambda: nobody_listens(log))
        reader = Reader(followers, pours=pours)
        await reader.has(START)
        await log.append(delta(1, 1), END)
        await reader.task
    assert reader.seen == log.written


async def test_a_redis_that_goes_is_reported_when_patience_ends(*, pours: bool) -> None:
    with start_redis() as server:
        async with (
            aclosing(connect(server.url, patience=0.2)) as followers,
            Redis.from_url(server.url, protocol=2) as redis,
        ):
            await WrittenLog(redis).write(START)
            reader = Reader(followers, pours=pours)
            await reader.listens()
            assert server.process
            server.process.kill()
            with pytest.raises(Unavailable, match="does not answer"):
                await reader.task

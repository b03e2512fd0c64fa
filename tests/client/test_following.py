"""Following by the feed: whatever it delivers, loses, doubles or makes up, a follower sees the log in order."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

import pytest
from conftest import eventually
from proxy import Proxy
from redis.asyncio import Redis
from written_log import END, START, WrittenLog, connect, delta, user_without_channels

from worker import Answer, Client, Delta, Entry, Expired, Idle, IncompleteLog, Unavailable, UnknownRequest
from worker.broker.log_pages import PageSize
from worker.client.following.follower import Follower
from worker.client.following.followers import Followers
from worker.client.following.machine import KEPT_BYTES, FollowState
from worker.client.timings import Timings
from worker.contract.entries import (
    Cancelled,
    Claimed,
    Done,
    Failed,
    Queued,
    Restarted,
    Resumed,
    Started,
    to_fields,
    to_json,
)
from worker.contract.ids import BEFORE_ALL, SEAL, EntryId
from worker.sandbox.embedded_redis import start_redis


@pytest.fixture
async def log(redis: Redis) -> WrittenLog:
    await redis.config_resetstat()
    return WrittenLog(redis)


NOBODY_POLLS = pytest.mark.parametrize("timings", [Timings(tick=1000.0)], ids=["nobody polls"])
"""No silence is too long."""

IMPATIENT = pytest.mark.parametrize("timings", [Timings(tick=0.01)], ids=["impatient"])
"""Silence is too long very soon."""


@pytest.fixture
def timings() -> Timings:
    return Timings()


@pytest.fixture
async def followers(redis_url: str, timings: Timings) -> AsyncIterator[Followers]:
    async with aclosing(connect(redis_url, timings)) as followers:
        yield followers


@pytest.fixture(params=["follow", "pour"])
def pours(request: pytest.FixtureRequest) -> bool:
    """Followers pour, or wait and drain: tests do both."""
    return bool(request.param == "pour")


POURS = pytest.mark.parametrize("pours", [True])


class Reader:
    """Follows a request in a task, and notes what it sees."""

    def __init__(
        self,
        followers: Followers,
        request_id: str = "r",
        after: EntryId | None = None,
        into: Callable[[Entry], None] | None = None,
        *,
        pours: bool,
    ) -> None:
        self.seen: list[Entry] = []
        self._into = into or self.seen.append
        self._followers = followers
        self._id = request_id
        self._pours = pours
        self.task = asyncio.create_task(self._read(after))

    async def _read(self, after: EntryId | None) -> None:
        follower = self._followers.follow(self._id, after or BEFORE_ALL)
        try:
            if self._pours:
                await follower.pour(self._into)
            while not follower.is_over:
                await follower.wait_ready()
                for entry in follower.drain():
                    self._into(entry)
        finally:
            await follower.leave()

    async def has(self, *entries: Entry) -> None:
        """Wait until these are the last entries that it has seen."""

        async def seen() -> bool:
            if self.task.done():
                self.task.result()
            return self.seen[-len(entries) :] == list(entries)

        await eventually(seen)

    async def listens(self) -> None:
        """Wait until it reads nothing but what the feed leaves out."""

        async def settled() -> bool:
            request = self._followers.requests.get(self._id)
            return (
                request is not None
                and request.feed.is_settled
                and all(follower.is_waiting for follower in request.followers)
            )

        await eventually(settled)


StartReader = Callable[..., Reader]


@pytest.fixture
def start_reader(followers: Followers, *, pours: bool) -> StartReader:
    return partial(Reader, followers, pours=pours)


StartListener = Callable[[], Awaitable[Reader]]


@pytest.fixture
def start_listener(start_reader: StartReader, log: WrittenLog) -> StartListener:
    """Starts a reader of a request that has begun, and waits until it listens."""

    async def start() -> Reader:
        await log.write(START)
        reader = start_reader()
        await reader.listens()
        return reader

    return start


async def calls(redis: Redis, command: str) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


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


@pytest.mark.parametrize("timings", [Timings(tick=1000.0, settles_after=60.0)], ids=["never settled"])
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
async def test_a_follower_that_does_not_read_keeps_little_and_misses_nothing(
    followers: Followers, log: WrittenLog
) -> None:
    await log.write(START)
    follower = followers.follow("r", BEFORE_ALL)
    seen = await next_entries(follower)
    reading = asyncio.ensure_future(next_entries(follower))
    await eventually(lambda: is_settled(followers, follower))
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


async def is_settled(followers: Followers, follower: Follower) -> bool:
    return followers.requests["r"].feed.is_settled and follower.is_waiting


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


def log_of(*ids: str, seal: Entry | None = None) -> list[Entry]:
    """Entries with these ids: those that begin an attempt, deltas, and how the log ends."""
    made: list[Entry] = []
    for attempt, n in map(EntryId.parse, ids):
        first = {True: Queued, False: Started if attempt == 1 else Claimed}[attempt == 0]
        made.append(first(id=EntryId(attempt, n)) if n == (attempt == 0) else delta(attempt, n))
    return [*made, seal] if seal else made


WHOLE = log_of("0-1", "1-0", "1-1", "1-2", "1-3", "1-4", seal=END)
BEGAN_AGAIN = [Claimed(id=EntryId(2, 0)), Restarted(id=EntryId(2, 1)), delta(2, 2), Done(id=SEAL, attempt=2)]
WENT_ON = [Claimed(id=EntryId(2, 0)), Resumed(id=EntryId(2, 1), after="1-2"), delta(2, 2), Done(id=SEAL, attempt=2)]
HOLE = log_of("1-0", "1-1", "1-2", "1-5")
TOP = log_of(f"{SEAL.attempt}-0", f"{SEAL.attempt}-1", seal=Failed(id=SEAL, code="buried"))


@pytest.mark.parametrize(
    ("given", "after", "lacks"),
    [
        pytest.param(WHOLE[-3:], None, "0-0", id="trimmed"),
        pytest.param(WHOLE[-1:], None, "0-0", id="trimmed to its seal"),
        pytest.param([*WHOLE[:1], *WHOLE[-1:]], None, "0-1", id="its attempt deleted"),
        pytest.param([*WHOLE[:3], *WHOLE[5:]], None, "1-1", id="a hole"),
        pytest.param([*WHOLE[:4], BEGAN_AGAIN[-1]], None, "1-2", id="another attempt deleted"),
        pytest.param(log_of("2-0", "2-1", seal=Done(id=SEAL, attempt=2)), None, "0-0", id="an attempt trimmed"),
        pytest.param(WHOLE[-2:], "1-1", "1-1", id="a cursor before what is there"),
        pytest.param(WHOLE, "1-9", "1-9", id="a cursor beyond the end"),
        pytest.param(WHOLE[:4], str(SEAL), str(SEAL), id="the seal of a log that goes on"),
    ],
)
async def test_reading_a_log_that_lacks_entries_raises_incomplete_log(
    given: list[Entry], after: str | None, lacks: str, start_reader: StartReader, client: Client, log: WrittenLog
) -> None:
    """After an XTRIM, the answer must not be `done` with only its last tokens."""
    await log.write(*given)
    reader = start_reader(after=EntryId.parse(after) if after else None)
    with pytest.raises(IncompleteLog) as raised:
        await reader.task
    assert str(raised.value.after) == lacks
    assert not reader.seen or reader.seen[-1].id == raised.value.after, "what comes before is given"
    if after is None:
        with pytest.raises(IncompleteLog):
            await client.result("r")


RUNNING = [
    pytest.param(HOLE, None, 3, id="deleted entries"),
    pytest.param([*HOLE, *WENT_ON[:1]], None, 3, id="deleted entries, and another attempt begins"),
    pytest.param([*WHOLE[:4], delta(2, 9)], None, 4, id="renamed away and back"),
    pytest.param(HOLE[2:3], None, 0, id="a trimmed start"),
    pytest.param(log_of("2-0", "2-1"), None, 0, id="an attempt trimmed"),
    pytest.param(HOLE[:3], "1-3", 0, id="a cursor that a failover lost"),
    pytest.param([*HOLE[:3], *WENT_ON[:1]], "1-3", 0, id="a lost cursor, and another attempt begins"),
]
"""Logs that are still written: what they hold, after which entry a reader begins, and how many come before a hole."""

REPAIRS = [
    [Claimed(id=EntryId(3, 0)), Restarted(id=EntryId(3, 1)), delta(3, 2), Done(id=SEAL, attempt=3)],
    [Claimed(id=EntryId(3, 0)), Resumed(id=EntryId(3, 1), after="0-0"), delta(3, 2), Done(id=SEAL, attempt=3)],
]


async def at_hole(followers: Followers, reader: Reader, redis: Redis, given: list[Entry], seen: int) -> Reader:
    """Wait until a reader has all that comes before the hole, and has read several times what comes behind it."""

    async def waits_there() -> bool:
        if reader.task.done():
            reader.task.result()
        request = followers.requests.get("r")
        return request is not None and all(
            follower.machine.state is FollowState.AT_HOLE for follower in request.followers
        )

    await eventually(waits_there)
    looks = await calls(redis, "xrange")

    async def has_looked_again() -> bool:
        return await calls(redis, "xrange") > looks + 4

    await eventually(has_looked_again)
    assert not reader.task.done()
    assert reader.seen == given[:seen]
    return reader


@pytest.mark.parametrize("repair", REPAIRS, ids=["restarted", "resumed"])
@pytest.mark.parametrize(("given", "after", "seen"), RUNNING)
async def test_entries_behind_a_hole_are_held_back_until_the_log_calls_the_missing_ones_void(
    given: list[Entry],
    after: str | None,
    seen: int,
    repair: list[Entry],
    start_reader: StartReader,
    followers: Followers,
    redis: Redis,
    log: WrittenLog,
) -> None:
    """A worker may mend a hole seconds later, so a reader must not give up."""
    await log.write(*given)
    reader = start_reader(after=EntryId.parse(after) if after else None)
    await at_hole(followers, reader, redis, given, seen)
    await log.append(delta(2, 10), *repair)
    await reader.task
    assert reader.seen == log.written[-len(reader.seen) :]
    assert reader.seen[-len(repair) :] == repair
    assert after or reader.seen == log.written


async def test_a_follower_without_the_feed_goes_on_after_a_hole(
    redis: Redis, redis_url: str, log: WrittenLog, *, pours: bool
) -> None:
    await log.write(START, delta(1, 1))
    async with user_without_channels(redis, redis_url) as deaf_url, aclosing(connect(deaf_url)) as followers:
        reader = Reader(followers, pours=pours)
        await eventually(lambda: calls(redis, "xread"))
        await log.write(delta(1, 3))
        await log.write(Claimed(id=EntryId(2, 0)), Restarted(id=EntryId(2, 1)), delta(2, 2))
        await reader.has(delta(2, 2))
        await log.write(delta(2, 3))
        await reader.has(delta(2, 3))
        await log.write(END)
        await reader.task
    assert reader.seen == log.written


@pytest.mark.parametrize("end", ["its seal", "its log is gone", "its seal is deleted"])
@pytest.mark.parametrize(("given", "after", "seen"), RUNNING)
async def test_a_hole_that_is_never_void_raises_incomplete_log_at_the_end(
    given: list[Entry],
    after: str | None,
    seen: int,
    end: str,
    start_reader: StartReader,
    followers: Followers,
    redis: Redis,
    log: WrittenLog,
) -> None:
    await log.write(*given)
    reader = start_reader(after=EntryId.parse(after) if after else None)
    await at_hole(followers, reader, redis, given, seen)
    match end:
        case "its seal":
            await log.append(END)
        case "its log is gone":
            await redis.delete(log.key)
        case _:
            await redis.set("chat:ended:{r}", '{"outcome":"done","time":5}', ex=60)
    with pytest.raises(IncompleteLog) as raised:
        await reader.task
    assert str(raised.value.after) == (after or str(given[seen - 1].id if seen else BEFORE_ALL))
    assert reader.seen == given[:seen]


async def first_entries(entries: AsyncIterator[Entry], count: int) -> list[Entry]:
    """Return so many entries. On a busy machine the first read takes longer than `idle`, so any `Idle` is left out."""
    found: list[Entry] = []
    while len(found) < count:
        if not isinstance(entry := await anext(entries), Idle):
            found.append(entry)
    return found


@pytest.mark.parametrize(("given", "after", "seen"), RUNNING)
async def test_idle_is_yielded_at_a_hole_and_open_accepts_one(
    given: list[Entry], after: str | None, seen: int, client: Client, log: WrittenLog
) -> None:
    await log.write(*given)
    entries = await client.open("r", after=after, idle=0.02)
    async with aclosing(entries):
        assert await first_entries(entries, seen) == given[:seen]
        for _ in range(3):
            assert isinstance(idle := await anext(entries), Idle)
            assert str(idle.id) == (after or str(given[seen - 1].id if seen else BEFORE_ALL))
        await log.write(END)
        with pytest.raises(IncompleteLog):
            [entry async for entry in entries]
    with pytest.raises(IncompleteLog):
        [entry async for entry in await client.open("r", after=after)]


async def test_a_log_that_was_emptied_while_it_is_written_is_waited_for(
    start_reader: StartReader, followers: Followers, redis: Redis, log: WrittenLog
) -> None:
    await log.write(START)
    await redis.xdel(log.key, str(START.id))
    reader = start_reader()
    await at_hole(followers, reader, redis, [], 0)
    log.written.clear()
    await log.append(delta(1, 1), *REPAIRS[0])
    await reader.task
    assert reader.seen == log.written


async def test_a_log_that_comes_back_whole_is_read_on(
    start_reader: StartReader, followers: Followers, redis: Redis, log: WrittenLog
) -> None:
    await log.write(*WHOLE[:6])
    await redis.rename(log.key, "chat:away:{r}")
    log.written.clear()
    await log.write(*WHOLE[4:6])
    reader = start_reader()
    await at_hole(followers, reader, redis, [], 0)
    await redis.rename("chat:away:{r}", log.key)
    await log.write(END)
    await reader.task
    assert reader.seen == [*WHOLE[:6], END]


@pytest.mark.parametrize(
    ("given", "after", "is_seen"),
    [
        pytest.param(WHOLE, None, WHOLE, id="whole"),
        pytest.param([*HOLE, *BEGAN_AGAIN], None, [*HOLE, *BEGAN_AGAIN], id="a hole, and it began again"),
        pytest.param([*HOLE, *WENT_ON], None, [*HOLE, *WENT_ON], id="a hole, and it went on from before"),
        pytest.param(BEGAN_AGAIN, None, BEGAN_AGAIN, id="trimmed to where it began again"),
        pytest.param(WHOLE[4:], "1-2", WHOLE[4:], id="trimmed to the cursor"),
        pytest.param([*HOLE[:3], *WENT_ON], "1-9", WENT_ON, id="a cursor lost in a failover, and it went on"),
        pytest.param([*WHOLE[:2], *log_of("5-0", "5-1", seal=Done(id=SEAL, attempt=5))], "0-1", None, id="made anew"),
        pytest.param(WHOLE, "0-1", WHOLE[1:], id="a cursor"),
        pytest.param(WHOLE[1:], "0-0", WHOLE[1:], id="no queued"),
        pytest.param(WHOLE, str(SEAL), [], id="the seal of what has ended"),
        pytest.param([*WHOLE[:2], *TOP], None, [*WHOLE[:2], *TOP], id="an attempt with the seal's number"),
        pytest.param([Cancelled(id=SEAL)], None, [Cancelled(id=SEAL)], id="cancelled before it was enqueued"),
        pytest.param([Failed(id=SEAL, code="deadline")], None, [Failed(id=SEAL, code="deadline")], id="never begun"),
    ],
)
async def test_a_log_that_lacks_only_void_entries_is_read(
    given: list[Entry], after: str | None, is_seen: list[Entry] | None, start_reader: StartReader, log: WrittenLog
) -> None:
    await log.write(*given)
    reader = start_reader(after=EntryId.parse(after) if after else None)
    await reader.task
    assert reader.seen == (given[1:] if is_seen is None else is_seen)


@NOBODY_POLLS
async def test_the_seal_ends_a_log_also_where_its_id_is_the_next_one(
    start_reader: StartReader, redis: Redis, log: WrittenLog
) -> None:
    before = delta(SEAL.attempt, SEAL.n - 1)
    await log.write(START, before)
    reader = start_reader(after=before.id)

    async def waits() -> bool:
        return bool((await redis.info("clients"))["blocked_clients"] or await log.subscribers())

    await eventually(waits)
    await log.append(END)
    async with asyncio.timeout(5):
        await reader.task
    assert reader.seen == [END]


@IMPATIENT
async def test_trimming_a_log_while_it_is_read_raises_incomplete_log(
    start_listener: StartListener, redis: Redis, log: WrittenLog
) -> None:
    reader = await start_listener()
    await log.write(*(delta(1, n) for n in range(1, 9)))
    await reader.has(delta(1, 8))
    pipe = redis.pipeline()
    for n in range(9, 20):
        pipe.xadd(log.key, to_fields(delta(1, n)), id=f"1-{n}")  # type: ignore[arg-type]  # dict is invariant
    pipe.xtrim(log.key, maxlen=3, approximate=False)
    await pipe.execute()
    await log.write(END)
    with pytest.raises(IncompleteLog, match="after 1-8"):
        await reader.task
    assert reader.seen[-1] == delta(1, 8)


@pytest.mark.parametrize("length", [1, 199, 200, 201, 1500])
async def test_a_hole_is_found_wherever_a_page_ends(length: int, client: Client, redis: Redis, log: WrittenLog) -> None:
    await log.write(*log_of("0-1", "1-0"), *(delta(1, n) for n in range(1, length + 4)), END)
    assert len((await client.result("r")).deltas) == length + 3
    await redis.xdel(log.key, f"1-{length}")
    with pytest.raises(IncompleteLog) as raised:
        await client.result("r")
    assert raised.value.after == (1, length - 1)


@pytest.mark.parametrize(("count", "entries", "size"), [(40, 100, 1000), (1, 600, 6500)])
async def test_large_logs_are_read_on_a_slow_connection(
    count: int, entries: int, size: int, redis: Redis, redis_proxy: Proxy
) -> None:
    """A limit on the whole reply made 70 of 100 logs of 100 kB unavailable at 1 MB/s, and pages of 6.5 MB for ever.

    Here are 3 MB a second, and a silence of 0.3 s fails: a twentieth of the real scale.
    """
    redis_proxy.down = 0.02  # for each piece of 64 KiB
    logs = [WrittenLog(redis, f"r{number}") for number in range(count)]
    text = "x" * size
    for log in logs:
        deltas = (Delta(id=EntryId(1, n), content=text) for n in range(1, entries + 1))
        await log.write(START, *deltas, END)
    answers = [Answer() for _ in logs]
    async with aclosing(connect(redis_proxy.redis_url, Timings(command_timeout=0.3))) as followers:
        pairs = zip(logs, answers, strict=True)
        await asyncio.gather(*(followers.follow(log.id, BEFORE_ALL).pour(answer.add) for log, answer in pairs))
    assert all(len(answer.text) == entries * size for answer in answers)


async def test_a_page_that_does_not_come_in_time_is_read_in_smaller_ones(
    redis: Redis, redis_proxy: Proxy, *, pours: bool
) -> None:
    log = WrittenLog(redis)
    await log.write(START, *(delta(1, n) for n in range(1, 300)), END)
    for count in (b"200", b"50"):
        redis_proxy.hold(b"XRANGE .* COUNT " + count)
    async with aclosing(connect(redis_proxy.redis_url, Timings(command_timeout=0.1))) as followers:
        reader = Reader(followers, pours=pours)
        await reader.task
    assert reader.seen == log.written


async def test_a_timeout_does_not_hide_that_missing_entries_are_void(
    redis: Redis, redis_proxy: Proxy, *, pours: bool
) -> None:
    """Two entries of each attempt are read for that, also where the first read of them gets no reply."""
    log = WrittenLog(redis)
    await log.write(*HOLE, *BEGAN_AGAIN)
    held = redis_proxy.hold(b"XRANGE .* COUNT 2$")
    async with aclosing(connect(redis_proxy.redis_url, Timings(command_timeout=0.1))) as followers:
        reader = Reader(followers, pours=pours)
        await reader.task
    assert held.done.is_set()
    assert reader.seen == log.written


async def test_a_page_has_a_limited_number_of_bytes(followers: Followers, log: WrittenLog) -> None:
    """1,000 entries of 6.5 kB would otherwise be one reply."""
    await log.write(START, *(Delta(id=EntryId(1, n), content="x" * 6500) for n in range(1, 500)), END)
    logs, place, size, pages = followers.logs, BEFORE_ALL, PageSize(), []
    while (page := await logs.read("r", place, size)) is not None:
        pages.append(len(list(page.entries)))
        place = page.last
        if place == SEAL:
            break
    assert sum(pages) == 501
    assert max(pages[1:]) < 50

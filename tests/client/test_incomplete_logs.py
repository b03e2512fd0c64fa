"""Logs that lack entries: what a follower returns, waits for and raises."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from proxy import Proxy
from readers import IMPATIENT, NOBODY_POLLS, Reader, StartListener, StartReader, calls
from redis.asyncio import Redis
from waits import eventually
from written_log import END, START, WrittenLog, connect, delta, user_without_channels

from worker import Client, Entry, Idle, IncompleteLog
from worker.client.following.followers import Followers
from worker.client.following.machine import FollowState
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
)
from worker.contract.ids import BEFORE_ALL, SEAL, EntryId


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
    async with asyncio.timeout(60):
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

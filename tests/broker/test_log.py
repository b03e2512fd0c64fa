"""Writing token logs on a real Redis: consecutive ids, idempotent appends, fences, no holes."""

import asyncio
import json
from typing import Any

import pytest
from conftest import stream
from processes import FAR, KEY, Process, deliver, delta, process, stolen, texts
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, ResponseError
from waits import eventually

from worker.broker.acquisition import Acquired
from worker.broker.flush_pace import FlushPace
from worker.broker.job_queue import Delivery
from worker.broker.log_writer import LogDiverged, LogFenced, LogGone, LogRefused, LogSealed, LogWriter
from worker.contract.entries import Delta, parse
from worker.contract.ids import SEAL, EntryId
from worker.redisio.pipelined import PipelinedConnection
from worker.telemetry.events import EntriesAccepted, Event
from worker.telemetry.logging import configure_logging


async def test_entries_get_consecutive_ids(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    for text in "abc":
        log.append(delta(text))
    await log.wait_drained()
    assert await texts(redis) == ["1-0:started", "1-1:a", "1-2:b", "1-3:c"]
    assert log.accepted == EntryId(1, 3)


async def test_entries_appended_during_a_flush_go_out_with_the_next(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    for number in range(2000):
        log.append(delta(str(number)))
        if number % 100 == 0:
            await asyncio.sleep(0)
    await log.wait_drained()
    assert (await texts(redis))[1:] == [f"1-{n + 1}:{n}" for n in range(2000)]


async def test_entries_that_exceed_one_flush_go_out_with_the_next(redis_url: str, redis: Redis) -> None:
    async with process(redis_url, "one", pace=FlushPace(max_entries=3)) as one:
        log = await one.acquire(await deliver(one, redis))
        before = (await redis.info("commandstats"))["cmdstat_exec"]["calls"]
        for number in range(0, 20, 2):
            log.extend([delta(str(number)), delta(str(number + 1))])
        await log.wait_drained()
        assert (await texts(redis))[1:] == [f"1-{n + 1}:{n}" for n in range(20)]
        assert (await redis.info("commandstats"))["cmdstat_exec"]["calls"] >= before + 5  # of two batches each
        assert one.publisher.pending_bytes == log.pending_bytes == 0


async def test_a_cancelled_log_refuses_deltas(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    await redis.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
    log.append(delta("late"))
    with pytest.raises(LogSealed):
        await log.wait_drained()
    await redis.expire(KEY, 60)


async def test_a_verification_finds_a_cancel_even_if_nothing_is_appended(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    await redis.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
    one.publisher.verify_all()
    assert isinstance(await asyncio.wait_for(log.lost, 60), LogSealed)
    await redis.expire(KEY, 60)


@pytest.mark.parametrize("n", [3, SEAL.n - 1, SEAL.n])
async def test_an_id_that_somebody_else_writes_into_an_attempt_is_not_taken_for_its_owners(
    n: int, one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    log.append(delta("ours"))
    await log.wait_drained()
    await redis.xadd(KEY, {"type": "delta", "content": "not ours"}, id=f"1-{n}")
    log.append(delta("never accepted"))
    with pytest.raises(LogDiverged, match="its owner has not written"):
        await log.wait_drained()
    await one.owner.next_attempt(log, delivery, "diverged")
    log.append(delta("written"))
    await log.wait_drained()
    assert await texts(redis) == ["1-0:started", "1-1:ours", f"1-{n}:not ours", "2-0:claimed", "2-1:written"]


async def test_a_deleted_log_is_not_recreated_by_an_append(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    await redis.delete(KEY)
    log.append(delta("into nothing"))
    with pytest.raises(LogGone):
        await log.wait_drained()
    assert not await redis.exists(KEY)


async def test_a_log_that_is_missing_for_a_moment_continues(redis_proxy: Proxy, redis: Redis) -> None:
    """Valkey 9.1 was seen to find no log while its slot moved to another master."""
    async with process(redis_proxy.redis_url, "one") as one:
        log = await one.acquire(await deliver(one, redis))
        log.append(delta("before"))
        await log.wait_drained()
        verification = redis_proxy.hold(rb"^XREVRANGE")
        await redis.rename(KEY, "chat:away:{r}")
        log.append(delta("missed"))
        await asyncio.wait_for(verification.met.wait(), 60)
        await redis.rename("chat:away:{r}", KEY)
        verification.release()
        log.append(delta("after"))
        await log.wait_drained()
        assert await texts(redis) == ["1-0:started", "1-1:before", "1-2:missed", "1-3:after"]


async def test_a_key_of_another_type_is_reported_and_does_not_stop_other_logs(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    async with redis.pipeline() as pipe:
        pipe.delete(KEY)
        pipe.set(KEY, "x", ex=60)
        await pipe.execute()
    log.append(delta("refused"))
    with pytest.raises(LogRefused):
        await log.wait_drained()


async def test_a_refused_entry_has_only_its_own_log_verified(one: Process, delivery: Delivery, redis: Redis) -> None:
    logs = []
    for number in range(50):
        acquired = await one.owner.acquire(f"r{number}", delivery, FAR)
        assert isinstance(acquired, Acquired)
        one.publisher.attach(acquired.log)
        logs.append(acquired.log)
    cancelled, *others = logs
    for log in logs:
        log.extend([delta("first"), delta("entries")])
        await log.wait_drained()
    await redis.xadd(cancelled.key, {"type": "cancelled"}, id=str(SEAL))
    await redis.config_resetstat()
    for log in logs:
        log.extend([delta("a"), delta("b")])
    with pytest.raises(LogSealed):
        await cancelled.wait_drained()
    for log in others:
        await log.wait_drained()
    stats = await redis.info("commandstats")
    assert stats["cmdstat_xrevrange"]["calls"] == 1


async def test_an_entry_that_is_refused_though_the_log_lacks_it_is_not_resent_for_ever(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    """Somebody sealed the log and deleted the seal: Redis refuses everything, and the log's end does not show why."""
    log = await one.acquire(delivery)
    async with redis.pipeline() as pipe:  # in one step, so that no verification sees the seal
        pipe.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
        pipe.xdel(KEY, str(SEAL))
        await pipe.execute()
    log.append(delta("refused"))
    with pytest.raises(LogDiverged):
        await log.wait_drained()
    with pytest.raises(LogRefused):
        await one.owner.next_attempt(log, delivery, "diverged")
    with pytest.raises(LogRefused):
        await one.owner.acquire("r", delivery, FAR)


async def test_a_job_stream_of_another_type_is_not_blamed_on_the_log(
    one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    await one.acquire(delivery)
    await redis.set("chat:jobs", "in the way")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await two.owner.acquire("r", delivery, FAR)


async def test_a_cut_connection_loses_and_doubles_nothing(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    for number in range(300):
        log.append(delta(str(number)))
        if number % 50 == 49:
            await redis.client_kill_filter(_type="normal", skipme=True)
        await asyncio.sleep(0)
    await log.wait_drained()
    assert (await texts(redis))[1:] == [f"1-{n + 1}:{n}" for n in range(300)]


async def test_resent_entries_that_redis_has_count_as_accepted(one: Process, delivery: Delivery, redis: Redis) -> None:
    """As after a lost reply: Redis has the entries, and answers `equal or smaller`."""
    log = await one.acquire(delivery)
    log.append(delta("a"))
    await log.wait_drained()  # after this nothing verifies the log by itself
    for number, text in enumerate("bc", 2):
        await redis.xadd(KEY, delta(text), id=f"1-{number}")  # type: ignore[arg-type]  # dict is invariant
    for text in "bcd":
        log.append(delta(text))
    await log.wait_drained()
    assert await texts(redis) == ["1-0:started", "1-1:a", "1-2:b", "1-3:c", "1-4:d"]


async def test_only_the_entries_of_a_batch_that_redis_lacks_are_written_again(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    log.append(delta("0"))
    await log.wait_drained()  # after this nothing verifies the log by itself
    for number, text in enumerate("ab", 2):
        await redis.xadd(KEY, delta(text), id=f"1-{number}")  # type: ignore[arg-type]  # dict is invariant
    log.extend([delta(text) for text in "abcd"])
    one.publisher.verify_all()
    held = log.reconcile(EntryId(1, 3))
    assert [(first, entries) for _, first, entries, _ in held] == [(2, [delta("a"), delta("b")])]
    assert [(first, entries) for _, first, entries, _ in log.pending] == [(4, [delta("c"), delta("d")])]
    assert log.pending_bytes == sum(len(packed) for _, _, _, packed in log.pending)
    await log.wait_drained()
    assert log.accepted == EntryId(1, 5)
    assert await texts(redis) == ["1-0:started", "1-1:0", "1-2:a", "1-3:b", "1-4:c", "1-5:d"]


@pytest.mark.parametrize("size", [0, 1, 255, 256, 70_000])
@pytest.mark.parametrize("letter", ["a", "é", "文", "🦊", "\r\n$5\r\n"])
async def test_text_of_any_length_and_alphabet_arrives_unchanged(
    one: Process, delivery: Delivery, redis: Redis, letter: str, size: int
) -> None:
    log = await one.acquire(delivery)
    log.extend([delta(letter * size), delta("next")])
    await log.wait_drained()
    assert await texts(redis) == ["1-0:started", f"1-1:{letter * size}", "1-2:next"]


async def test_a_redis_that_loads_its_data_is_waited_for(redis_url: str, redis: Redis) -> None:
    """As after a restart: Redis accepts connections, and answers commands with an error."""
    refusals = 0

    class Loading(PipelinedConnection):
        def execute(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
            nonlocal refusals
            if not refusals:
                return super().execute(packed, count)
            refusals -= 1
            answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
            answer.set_result([BusyLoadingError("Redis is loading")] * count)
            return answer

    async with process(redis_url, "one", connections=Loading) as one:
        log = await one.acquire(await deliver(one, redis))
        log.append(delta("before"))
        await log.wait_drained()
        refusals = 2
        one.publisher.verify_all()
        log.append(delta("after"))
        await log.wait_drained()
        assert not refusals
        assert await texts(redis) == ["1-0:started", "1-1:before", "1-2:after"]


async def test_full_memory_makes_the_log_wait_and_leaves_no_hole(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    log.append(delta("before"))
    await log.wait_drained()
    await redis.config_set("maxmemory", "1")
    try:
        for number in range(10):
            log.append(delta(str(number)))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(log.wait_drained())
        one.publisher.verify_all()
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done
        assert len(await stream(redis, KEY)) == 2
    finally:
        await redis.config_set("maxmemory", "0")
    await waiting
    assert [text.split(":")[1] for text in await texts(redis)] == ["started", "before", *map(str, range(10))]


async def refused_commands(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return sum(int(each.get("rejected_calls", 0)) for each in stats.values())


async def test_while_memory_is_full_the_pauses_grow_and_no_text_is_logged(
    one: Process, delivery: Delivery, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json", "info")
    log = await one.acquire(delivery)
    before = await refused_commands(redis)
    await redis.config_set("maxmemory", "1")
    try:
        log.append(delta("my diary"))
        waiting = asyncio.create_task(log.wait_drained())

        async def was_refused_several_times() -> bool:
            return await refused_commands(redis) >= before + 4

        await eventually(was_refused_several_times)
    finally:
        await redis.config_set("maxmemory", "0")
    await waiting
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in logged] == ["log_write_failed", "recovered"]
    assert "my diary" not in str(logged)
    assert "OOM" in str(logged) or "memory" in str(logged)


async def test_the_feed_never_carries_a_refused_entry(
    one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    async with redis.pubsub() as feed:
        await feed.subscribe("chat:feed:{r}")
        old = await one.acquire(delivery)
        new = await two.acquire(await stolen(redis, two, delivery))
        old.append(delta("refused"))
        with pytest.raises(LogFenced):
            await old.wait_drained()
        new.append(delta("last"))
        received = b""
        async for message in feed.listen():
            received += message["data"] if message["type"] == "message" else b""
            if b"last" in received:
                break
    assert b"refused" not in received


async def test_verifying_idle_logs_finds_a_seal_and_reads_no_active_log(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    log.append(delta("x"))
    await log.wait_drained()
    before = await reads_of_ends(redis)
    one.publisher.verify_idle()
    log.append(delta("y"))
    await log.wait_drained()
    assert await reads_of_ends(redis) == before, "the accepted entry shows that the log is ours"
    one.publisher.verify_idle()
    await redis.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
    one.publisher.verify_idle()
    assert isinstance(await asyncio.wait_for(log.lost, 60), LogSealed)


async def reads_of_ends(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_xrevrange", {"calls": 0})["calls"])


async def test_a_full_log_makes_the_reader_wait(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    await redis.config_set("maxmemory", "1")
    try:
        while not log.is_full:
            log.append(delta("x" * 10_000))
        room = asyncio.create_task(log.wait_for_room())
        done, _ = await asyncio.wait({room}, timeout=0.05)
        assert not done
    finally:
        await redis.config_set("maxmemory", "0")
    await asyncio.wait_for(room, 60)
    await log.wait_drained()


class Flushes:
    """Counts flushes by the events of a publisher that reports each flush of which Redis accepted something."""

    count = 0

    def emit(self, event: Event) -> None:
        self.count += isinstance(event, EntriesAccepted)


class Events:
    """Keeps the events of a publisher."""

    def __init__(self) -> None:
        self.kept: list[Event] = []

    def emit(self, event: Event) -> None:
        self.kept.append(event)


async def test_entries_are_reported_in_one_event_for_many_flushes(redis_url: str, redis: Redis) -> None:
    events = Events()
    async with process(redis_url, "one", telemetry=events, pace=FlushPace(report_every=60)) as one:
        log = await one.acquire(await deliver(one, redis))
        for number in range(20):
            log.append(delta(str(number)))
            await log.wait_drained()
        assert not events.kept
    assert events.kept == [EntriesAccepted(20)]


async def test_entries_are_reported_while_their_log_grows(redis_url: str, redis: Redis) -> None:
    events = Events()
    async with process(redis_url, "one", telemetry=events, pace=FlushPace(report_every=0.01)) as one:
        log = await one.acquire(await deliver(one, redis))
        for number in range(1, 3):
            log.append(delta("x"))

            async def is_reported(number: int = number) -> bool:
                return events.kept == [EntriesAccepted(1)] * number

            await eventually(is_reported)


async def test_a_flooded_log_does_not_hold_up_the_others(redis_url: str, redis: Redis) -> None:
    """As one fast stream among slow ones: its waiting entries fill less than two flushes."""
    flushes, is_over = Flushes(), False
    async with process(redis_url, "one", telemetry=flushes, pace=FlushPace(report_every=0)) as one:
        flooded = await one.acquire(await deliver(one, redis))
        await redis.xadd("chat:tokens:{s}", {"type": "started"}, id="1-0")
        await redis.expire("chat:tokens:{s}", 60)
        other = LogWriter("s", "chat:tokens:{s}", "chat:feed:{s}", 1, one.publisher)
        one.publisher.attach(other)

        async def flood() -> None:
            while not is_over:
                while not flooded.is_full:
                    flooded.append(delta("x"))
                await flooded.wait_for_room()

        flooding = asyncio.create_task(flood())
        waited = []
        for number in range(50):
            before = flushes.count
            other.append(delta(str(number)))
            await other.wait_drained()
            waited.append(flushes.count - before)
        is_over = True
        await flooding
        await flooded.wait_drained()
        assert await redis.xlen(KEY) > await redis.xlen("chat:tokens:{s}") == 51
        assert max(waited) <= 3


async def test_entries_are_read_as_they_were_written(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    log.append({"type": "delta", "content": "\u2028 ½ 👩‍👩‍👧‍👦\r\n\0", "stop_reason": '"x"'})
    await log.wait_drained()

    async def there() -> bool:
        return len(await stream(redis, KEY)) == 2

    await eventually(there)
    entry = parse(*(await stream(redis, KEY))[1])
    assert isinstance(entry, Delta)
    assert (entry.content, entry.stop_reason) == ("\u2028 ½ 👩‍👩‍👧‍👦\r\n\0", "x")


async def test_a_verification_in_flight_does_not_take_the_next_attempt_for_lost(redis_url: str, redis: Redis) -> None:
    read, continued = asyncio.Event(), asyncio.Event()
    is_slow = False

    class Slow(PipelinedConnection):
        def execute(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
            replies = super().execute(packed, count)
            return asyncio.ensure_future(self.hold_back(replies)) if is_slow and not read.is_set() else replies

        async def hold_back(self, replies: asyncio.Future[list[Any]]) -> list[Any]:
            early = await replies
            read.set()
            await continued.wait()
            return early

    async with process(redis_url, "one", connections=Slow) as one:
        delivery = await deliver(one, redis)
        log = await one.acquire(delivery)
        log.append(delta("first"))
        await log.wait_drained()
        is_slow = True
        one.publisher.verify_all()
        await read.wait()
        await one.owner.next_attempt(log, delivery, "upstream")
        log.append(delta("second"))
        continued.set()
        await log.wait_drained()
        assert await texts(redis) == ["1-0:started", "1-1:first", "2-0:claimed", "2-1:second"]


async def test_a_hint_that_came_before_its_log_was_attached_still_has_it_verified(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    other = await one.acquire(delivery)  # so that there is a connection, whose first use verifies every log
    other.append(delta("x"))
    await other.wait_drained()
    acquired = LogWriter("r2", "chat:tokens:{r2}", "feed", 1, one.publisher)
    await redis.xadd(acquired.key, {"type": "started"}, id="1-0")
    await redis.xadd(acquired.key, {"type": "cancelled"}, id=str(SEAL))
    await redis.expire(acquired.key, 60)
    one.publisher.verify("r2")  # as a hint does
    one.publisher.attach(acquired)
    assert isinstance(await asyncio.wait_for(acquired.lost, 60), LogSealed)

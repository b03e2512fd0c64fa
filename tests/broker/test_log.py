"""The rules that keep a token log true, on a real Redis: fencing, idempotent appends, one seal, no holes."""

import asyncio
import json
from typing import Any

import pytest
from conftest import stream
from processes import FAR, KEY, STONE, Process, delta, process, stolen, texts
from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, ResponseError
from waits import eventually

from worker.broker.acquisition import Acquired, AlreadyEnded, DuplicateJob, LeaseLost
from worker.broker.flush_pace import FlushPace
from worker.broker.job_queue import Delivery
from worker.broker.log_writer import LogDiverged, LogFenced, LogGone, LogRefused, LogSealed, LogWriter
from worker.broker.ownership import LogOwnership
from worker.broker.replicas import Replicas
from worker.contract.entries import Cancelled, Delta, Failed, parse
from worker.contract.ids import SEAL, EntryId
from worker.contract.keys import Keys
from worker.redisio.pipelined import PipelinedConnection
from worker.redisio.retry import RetryUntilAvailable
from worker.telemetry.events import EntriesAccepted, Event
from worker.telemetry.logging import configure_logging


async def deliver(process: Process, redis: Redis) -> Delivery:
    await process.jobs.ensure_group("default")
    await redis.xadd("chat:jobs", {"id": "r"})
    return await process.claim()


@pytest.fixture
async def delivery(one: Process, redis: Redis) -> Delivery:
    return await deliver(one, redis)


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


async def test_a_former_owner_cannot_write_after_a_take_over(
    one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    old = await one.acquire(delivery)
    old.append(delta("kept"))
    await old.wait_drained()
    new = await two.acquire(await stolen(redis, two, delivery))
    old.append(delta("too late"))
    with pytest.raises(LogFenced):
        await old.wait_drained()
    new.append(delta("new"))
    await new.wait_drained()
    assert await texts(redis) == ["1-0:started", "1-1:kept", "2-0:claimed", "2-1:new"]


async def test_a_former_owner_cannot_seal_the_log_of_the_new_owner(
    one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    """The seal's id is greater than that of any attempt: only a fence of its own stops a former owner."""
    old = await one.acquire(delivery)
    await two.acquire(await stolen(redis, two, delivery))
    with pytest.raises(LogFenced):
        await one.seal(old)
    assert (await texts(redis))[-1] == "2-0:claimed"


async def test_the_first_of_two_seals_stands(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    await redis.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
    assert await one.seal(log) == Cancelled.type, "the seal that stands is returned"
    assert (await texts(redis))[-1] == f"{SEAL}:cancelled"
    await redis.expire(KEY, 60)


async def test_sealing_again_after_a_lost_reply_finds_the_seal(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    log.append(delta("x"))
    await (
        log.wait_drained()
    )  # after this only a periodic verification reads the log, and would find the seal before the second one
    assert await one.seal(log) == "done"
    assert await one.seal(log, "late") == "done"
    assert 0 < await redis.ttl(KEY) <= 60
    assert 60 < await redis.ttl("chat:ended:{r}") <= 120


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
    assert isinstance(await asyncio.wait_for(log.lost, 5), LogSealed)
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


async def test_a_log_above_redis_output_limit_is_read_in_pages_and_claimed_once(
    one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    for number in range(300):
        log.append(delta(f"{number:04000d}"))
    await log.wait_drained()
    again = await stolen(redis, two, delivery)
    limits = (await redis.config_get("client-output-buffer-limit"))["client-output-buffer-limit"] or ""
    await redis.config_set("client-output-buffer-limit", "normal 100000 0 0")
    try:
        acquired = await RetryUntilAvailable()(two.owner.acquire, "r", again, FAR)
    finally:
        await redis.config_set("client-output-buffer-limit", limits)
    assert isinstance(acquired, Acquired)
    assert [str(entry.id) for entry in acquired.history] == [f"1-{n}" for n in range(301)]
    assert (await texts(redis))[301:] == ["2-0:claimed"]


async def test_a_claim_is_not_repeated_because_the_log_could_not_be_read(
    one: Process, two: Process, delivery: Delivery, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await one.acquire(delivery)
    again, left, xrange = await stolen(redis, two, delivery), 3, two.commands.xrange

    async def cut_off(*_: object, **__: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ResponseError("MASTERDOWN Link with MASTER is down")
        return await xrange(KEY)

    monkeypatch.setattr(two.commands, "xrange", cut_off)
    assert isinstance(await RetryUntilAvailable()(two.owner.acquire, "r", again, FAR), Acquired)
    assert left < 0
    assert await texts(redis) == ["1-0:started", "2-0:claimed"]


async def test_the_owner_of_an_emptied_log_continues_under_a_next_attempt(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    """XTRIM leaves the key and its greatest id, so that Redis refuses `1-0` for ever."""
    log = await one.acquire(delivery)
    log.extend([delta("a"), delta("b")])
    await log.wait_drained()
    await redis.xtrim(KEY, maxlen=0, approximate=False)
    one.publisher.verify_all()
    assert isinstance(await log.lost, LogGone)
    await one.owner.recreate(log, delivery, FAR)
    await one.owner.next_attempt(log, delivery, "diverged")
    log.append(delta("again"))
    await log.wait_drained()
    assert await one.seal(log) == "done"
    assert await texts(redis) == ["2-0:claimed", "2-1:again", f"{SEAL}:done"]


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


async def test_a_log_whose_seal_was_deleted_is_reported_as_refused(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    async with redis.pipeline() as pipe:  # in one step, so that no verification sees the seal
        pipe.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
        pipe.xdel(KEY, str(SEAL))
        await pipe.execute()
    with pytest.raises(LogRefused):
        await one.seal(log)


async def test_an_owner_stops_when_another_began_its_next_attempt_and_the_entry_was_deleted(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    async with redis.pipeline() as pipe:  # in one step, so that no verification sees the entry
        pipe.xadd(KEY, {"type": "claimed"}, id="2-0")
        pipe.xdel(KEY, "2-0")
        await pipe.execute()
    with pytest.raises(LogFenced):
        await one.owner.next_attempt(log, delivery, "diverged")


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


async def test_while_memory_is_full_the_pauses_grow_and_no_text_is_logged(
    one: Process, delivery: Delivery, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json", "info")
    log = await one.acquire(delivery)
    await redis.config_set("maxmemory", "1")
    try:
        log.append(delta("my diary"))
        waiting = asyncio.create_task(log.wait_drained())
        await asyncio.wait({waiting}, timeout=1.0)
    finally:
        await redis.config_set("maxmemory", "0")
    await waiting
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in logged] == ["log_write_failed", "recovered"]
    assert "my diary" not in str(logged)
    assert "OOM" in str(logged) or "memory" in str(logged)


async def test_a_failover_that_lost_entries_makes_a_new_attempt_necessary(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    for text in "ab":
        log.append(delta(text))
    await log.wait_drained()
    (_, started), *_ = await stream(redis, KEY)
    async with redis.pipeline() as pipe:  # as on a replica that was behind
        pipe.delete(KEY)
        pipe.xadd(KEY, started, id="1-0")  # type: ignore[arg-type]  # dict is invariant
        pipe.pexpireat(KEY, FAR)
        await pipe.execute()
    one.publisher.verify_all()
    assert isinstance(await asyncio.wait_for(log.lost, 5), LogDiverged)
    await one.owner.next_attempt(log, delivery, "diverged")
    log.append(delta("again"))
    await log.wait_drained()
    assert await texts(redis) == ["1-0:started", "2-0:claimed", "2-1:again"]


async def test_one_of_two_simultaneous_take_overs_wins(
    redis_url: str, one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    await one.acquire(delivery)
    acquired = await stolen(redis, two, delivery)
    async with process(redis_url, "three") as three:
        outcomes = await asyncio.gather(two.owner.acquire("r", acquired, FAR), three.owner.acquire("r", acquired, FAR))
    assert [type(outcome) for outcome in outcomes] == [Acquired, LeaseLost]
    assert await texts(redis) == ["1-0:started", "2-0:claimed"]


async def test_a_take_over_reads_the_history(one: Process, two: Process, delivery: Delivery, redis: Redis) -> None:
    old = await one.acquire(delivery)
    old.append(delta("half"))
    await old.wait_drained()
    acquired = await two.owner.acquire("r", await stolen(redis, two, delivery), FAR)
    assert isinstance(acquired, Acquired)
    assert [entry.type for entry in acquired.history] == ["started", "delta"]


async def test_acquiring_again_after_a_lost_reply_finds_the_own_entry(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    first, second = [await one.owner.acquire("r", delivery, FAR) for _ in range(2)]
    assert isinstance(first, Acquired)
    assert isinstance(second, Acquired)
    assert second.log.attempt == 1
    assert await texts(redis) == ["1-0:started"]


async def test_a_duplicate_does_not_run_while_the_first_job_is_outstanding_and_takes_over_when_it_is_gone(
    one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    await one.acquire(delivery)
    await redis.xadd("chat:jobs", {"id": "r"})
    duplicate = await two.claim()
    assert isinstance(await two.owner.acquire("r", duplicate, FAR), DuplicateJob)
    await one.jobs.acknowledge(delivery)  # the job is gone without a seal
    assert isinstance(await two.owner.acquire("r", duplicate, FAR), Acquired)


async def test_a_tombstone_keeps_a_late_job_from_running(one: Process, delivery: Delivery, redis: Redis) -> None:
    await redis.set("chat:ended:{r}", '{"outcome":"done","time":1}', ex=60)
    assert isinstance(await one.owner.acquire("r", delivery, FAR), AlreadyEnded)
    assert not await redis.exists(KEY)


END = Failed(id=SEAL, code="buried")


@pytest.mark.parametrize("begun", [False, True])
async def test_a_job_that_cannot_run_is_sealed_whatever_its_log_holds(
    *, begun: bool, one: Process, delivery: Delivery, redis: Redis
) -> None:
    if begun:
        await one.acquire(delivery)
        await redis.xadd(KEY, {"type": "delta", "token_ids": "?"}, id="1-1")
    for _ in range(2):  # as after a lost reply
        assert await one.owner.seal_unowned("r", delivery, END, FAR)
    assert (await texts(redis))[-1] == f"{SEAL}:error"


async def test_a_job_that_ended_or_is_with_another_worker_is_not_sealed_as_buried(
    one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    await redis.set("chat:ended:{r}", '{"outcome":"done","time":1}', ex=60)
    assert await one.owner.seal_unowned("r", delivery, END, FAR)
    assert not await redis.exists(KEY)
    await redis.delete("chat:ended:{r}")
    await one.acquire(delivery)
    await two.acquire(await stolen(redis, two, delivery))
    assert not await one.owner.seal_unowned("r", delivery, END, FAR)
    assert await texts(redis) == ["1-0:started", "2-0:claimed"]


async def test_finalizing_adds_the_expiry_and_tombstone_that_a_foreign_cancel_lacks(one: Process, redis: Redis) -> None:
    await redis.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
    assert await one.owner.finalize("r", STONE, retention=60, remember=120)
    assert 0 < await redis.ttl(KEY) <= 60
    assert 0 < await redis.ttl("chat:ended:{r}") <= 120


async def test_finalizing_finds_that_a_failover_lost_the_seal(one: Process, delivery: Delivery) -> None:
    await one.acquire(delivery)
    assert not await one.owner.finalize("r", STONE, retention=60, remember=120)


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
    assert isinstance(await asyncio.wait_for(log.lost, 10), LogSealed)


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
    await asyncio.wait_for(room, 10)
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


async def test_a_log_whose_seal_is_lost_gets_no_tombstone(one: Process, delivery: Delivery, redis: Redis) -> None:
    """With a tombstone, nobody would write the seal again: the next owner would take the request for ended."""
    await one.acquire(delivery)
    assert not await one.owner.finalize("r", STONE, retention=60, remember=120)
    assert not await redis.exists("chat:ended:{r}")
    assert await redis.ttl(KEY) > 60


async def test_a_lost_log_is_recreated_by_its_owner_only(
    one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    await redis.delete(KEY)  # as on a replica that was behind
    await one.owner.recreate(log, delivery, FAR)
    await one.owner.recreate(log, delivery, FAR)  # as after a lost reply
    await one.owner.next_attempt(log, delivery, "diverged")
    assert await texts(redis) == ["1-0:started", "2-0:claimed"]

    await redis.delete(KEY)
    await stolen(redis, two, delivery)
    with pytest.raises(LogFenced):
        await one.owner.recreate(log, delivery, FAR)
    assert not await redis.exists(KEY)


async def test_a_log_that_is_gone_after_its_end_is_not_recreated(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    await one.seal(log)
    await redis.delete(KEY)
    assert await one.owner.finalize("r", STONE, retention=60, remember=120), "the tombstone shows the end"
    with pytest.raises(LogGone):
        await one.owner.recreate(log, delivery, FAR)
    await redis.delete("chat:ended:{r}")
    assert not await one.owner.finalize("r", STONE, retention=60, remember=120), "its end is lost"


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


async def test_entries_of_an_earlier_run_in_the_same_process_are_fenced_too(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    """As after a partition: the process gave up a flush that reaches Redis when the same job runs there again."""
    await one.acquire(delivery)
    await redis.xclaim("chat:jobs", "workers", "one", 0, [delivery.id], idle=11_000, justid=True)
    (again,) = await one.jobs.claim_expired("default", 1)
    log = await one.acquire(again)
    with pytest.raises(ResponseError, match="equal or smaller"):
        await redis.xadd(KEY, delta("of the former run"), id="1-1")  # type: ignore[arg-type]  # dict is invariant
    log.append(delta("new"))
    await log.wait_drained()
    assert await texts(redis) == ["1-0:started", "2-0:claimed", "2-1:new"]


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
    assert isinstance(await asyncio.wait_for(acquired.lost, 5), LogSealed)


async def test_waiting_for_replicas_leaves_connections_to_the_leases(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    for_ever = Replicas(1, wait=60)
    owner = LogOwnership(
        one.transactions, Keys(), one.jobs, one.publisher, worker="one", nonce="n", now=lambda: 1, replicas=for_ever
    )
    logs = [f"r{number}" for number in range(100)]
    for request_id in logs:
        await redis.xadd(f"chat:tokens:{{{request_id}}}", {"type": "done"}, id=str(SEAL))
    waiting = [asyncio.create_task(owner.finalize(r, STONE, retention=60, remember=120)) for r in logs]

    async def all_wait() -> bool:
        return await redis.exists(*(f"chat:ended:{{{request_id}}}" for request_id in logs)) == len(logs)

    async def blocked() -> int:
        return int((await redis.info("clients"))["blocked_clients"])

    await eventually(all_wait)
    await eventually(blocked)
    assert await one.jobs.renew_leases([(delivery, 60)]) == [False], "the lease is too new to be renewed"
    assert not any(task.done() for task in waiting)
    assert await blocked() < 10
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)

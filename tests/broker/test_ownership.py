"""Who may write a log: acquiring it, losing it to another worker, sealing and finalizing it."""

import asyncio

import pytest
from conftest import stream
from faults import Fate, finish, gate_before, let_through
from processes import FAR, KEY, STONE, Process, claim_expired, delta, process, stolen, texts
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, ResponseError
from waits import eventually

from worker.broker.acquisition import Acquired, AlreadyEnded, DuplicateJob, LeaseLost
from worker.broker.job_queue import Delivery
from worker.broker.log_writer import LogDiverged, LogFenced, LogGone, LogRefused
from worker.broker.ownership import LogOwnership
from worker.broker.replicas import Replicas
from worker.contract.entries import Cancelled, Failed
from worker.contract.ids import SEAL
from worker.contract.keys import Keys
from worker.redisio.errors import TooFewReplicas
from worker.redisio.retry import RetryUntilAvailable


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


@pytest.mark.parametrize("trimmed", [False, True])
async def test_a_former_owner_cannot_seal_the_log_of_the_new_owner(
    *, trimmed: bool, one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    """The seal's id is greater than that of any attempt: only a fence of its own stops a former owner."""
    old = await one.acquire(delivery)
    await two.acquire(await stolen(redis, two, delivery))
    if trimmed:  # the log has as many entries as the former owner wrote
        await redis.xtrim(KEY, maxlen=1, approximate=False)
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
    one: Process, delivery: Delivery, redis: Redis, redis_proxy: Proxy
) -> None:
    await one.acquire(delivery)
    async with process(redis_proxy.redis_url, "two") as two:
        again = await stolen(redis, two, delivery)
        lost = redis_proxy.drop_reply(b"^XRANGE", times=6)  # a read is given up after five
        assert isinstance(await RetryUntilAvailable()(two.owner.acquire, "r", again, FAR), Acquired)
    assert lost.done.is_set()
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


async def test_a_log_that_has_as_many_entries_of_others_as_it_lacks_is_not_sealed(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    """A log that was renamed away is back in the place of the next attempt's, which the owner has begun meanwhile."""
    log = await one.acquire(delivery)
    log.append(delta("a"))
    await log.wait_drained()
    away = "chat:away:{r}"
    await redis.rename(KEY, away)
    await one.owner.recreate(log, delivery, FAR)
    await one.owner.next_attempt(log, delivery, "diverged")
    log.extend([delta("b"), delta("c")])
    await log.wait_drained()
    async with redis.pipeline() as pipe:  # in one step, so that no verification sees a part of it
        pipe.rename(away, KEY)
        pipe.xadd(KEY, {"type": "delta", "content": "b"}, id="2-1")
        pipe.xadd(KEY, {"type": "delta", "content": "c"}, id="2-2")
        await pipe.execute()
    assert await texts(redis) == ["1-0:started", "1-1:a", "2-1:b", "2-2:c"]
    with pytest.raises(LogDiverged, match="first entry"):
        await one.seal(log)


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


async def test_a_next_attempt_does_not_begin_a_log_that_is_gone(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = await one.acquire(delivery)
    await redis.delete(KEY)
    with pytest.raises(LogGone):
        await one.owner.next_attempt(log, delivery, "diverged")
    assert not await redis.exists(KEY)


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
    assert isinstance(await asyncio.wait_for(log.lost, 60), LogDiverged)
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


@pytest.mark.parametrize("meanwhile", ["another worker begins it", "it ends"])
async def test_a_log_that_changes_after_the_decision_to_bury_it_is_not_sealed_as_it_was(
    meanwhile: str, redis_url: str, one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    gate = await gate_before(one, redis_url)
    sealing = asyncio.ensure_future(one.owner.seal_unowned("r", delivery, END, FAR))
    await let_through(gate, *[Fate.FINE] * 4)  # two connections, a look at the log, and one at the lease
    if meanwhile == "it ends":
        await redis.set("chat:ended:{r}", '{"outcome":"done","time":1}', ex=60)
    else:
        await two.acquire(await stolen(redis, two, delivery))
    await finish(gate, sealing)
    assert sealing.result() == (meanwhile == "it ends")
    assert [text for text in await texts(redis) if "error" in text] == []


RECORD = ("chat:lifecycle", "*", "type", "started", "id", "r")


async def test_the_record_of_the_start_is_written_with_the_start(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    for is_first in (True, False):  # the second time as after a lost reply
        taken = await one.owner.acquire("r", delivery, FAR, started_record=RECORD)
        assert isinstance(taken, Acquired)
        assert taken.is_start_recorded == is_first
    assert [fields for _, fields in await stream(redis, "chat:lifecycle")] == [{b"type": b"started", b"id": b"r"}]


async def test_a_refused_record_of_the_start_does_not_keep_the_log_from_being_begun(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    await redis.set("chat:lifecycle", "in the way")
    taken = await one.owner.acquire("r", delivery, FAR, started_record=RECORD)
    assert isinstance(taken, Acquired)
    assert not taken.is_start_recorded
    assert await texts(redis) == ["1-0:started"]


async def test_a_request_that_has_ended_gets_no_record_of_a_start(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    await redis.set("chat:ended:{r}", '{"outcome":"done","time":1}', ex=60)
    assert isinstance(await one.owner.acquire("r", delivery, FAR, started_record=RECORD), AlreadyEnded)
    assert not await redis.exists("chat:lifecycle")


@pytest.mark.parametrize("before", [0, 1, 3])
async def test_the_entries_before_the_start_are_the_history(
    before: int, one: Process, delivery: Delivery, redis: Redis
) -> None:
    for n in range(1, before + 1):
        await redis.xadd(KEY, {"type": "queued", "digest": str(n)}, id=f"0-{n}")
    taken = await one.owner.acquire("r", delivery, FAR)
    assert isinstance(taken, Acquired)
    assert [str(entry.id) for entry in taken.history] == [f"0-{n}" for n in range(1, before + 1)]
    assert await one.seal(taken.log) == "done", "the number of entries agrees"


async def test_full_memory_begins_and_seals_nothing(one: Process, delivery: Delivery, redis: Redis) -> None:
    log = None
    for _ in range(2):
        await redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(OutOfMemoryError):
                await (one.seal(log) if log else one.owner.acquire("r", delivery, FAR, started_record=RECORD))
        finally:
            await redis.config_set("maxmemory", 0)
        assert await texts(redis) == (["1-0:started"] if log else [])
        assert not await redis.exists("chat:lifecycle", "chat:ended:{r}")
        log = log or await one.acquire(delivery)


async def test_finalizing_adds_the_expiry_and_tombstone_that_a_foreign_cancel_lacks(one: Process, redis: Redis) -> None:
    await redis.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
    assert await one.owner.finalize("r", STONE, retention=60, remember=120)
    assert 0 < await redis.ttl(KEY) <= 60
    assert 0 < await redis.ttl("chat:ended:{r}") <= 120


async def test_finalizing_finds_that_a_failover_lost_the_seal(one: Process, delivery: Delivery) -> None:
    await one.acquire(delivery)
    assert not await one.owner.finalize("r", STONE, retention=60, remember=120)


async def test_a_log_whose_seal_is_lost_gets_no_tombstone(one: Process, delivery: Delivery, redis: Redis) -> None:
    """With a tombstone, nobody would write the seal again: the next owner would take the request for ended."""
    await one.acquire(delivery)
    assert not await one.owner.finalize("r", STONE, retention=60, remember=120)
    assert not await redis.exists("chat:ended:{r}")
    assert await redis.ttl(KEY) > 60


async def test_an_end_that_is_lost_waits_for_no_replica(one: Process, delivery: Delivery) -> None:
    """The failover that lost the end may have left a master without replicas."""
    owner = LogOwnership(
        one.batcher, Keys(), one.jobs, one.publisher, worker="one", nonce="n", now=lambda: 1,
        replicas=Replicas(1, wait=0.01),
    )  # fmt: skip
    log = await one.acquire(delivery)
    assert not await owner.finalize("r", STONE, retention=60, remember=120)
    await one.seal(log)
    with pytest.raises(TooFewReplicas):
        await owner.finalize("r", STONE, retention=60, remember=120)


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


async def test_entries_of_an_earlier_run_in_the_same_process_are_fenced_too(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    """As after a partition: the process gave up a flush that reaches Redis when the same job runs there again."""
    await one.acquire(delivery)
    await redis.xclaim("chat:jobs", "workers", "one", 0, [delivery.id], idle=11_000, justid=True)
    (again,) = await claim_expired(one.abandoned)
    log = await one.acquire(again)
    with pytest.raises(ResponseError, match="equal or smaller"):
        await redis.xadd(KEY, delta("of the former run"), id="1-1")  # type: ignore[arg-type]  # dict is invariant
    log.append(delta("new"))
    await log.wait_drained()
    assert await texts(redis) == ["1-0:started", "2-0:claimed", "2-1:new"]


async def test_waiting_for_replicas_leaves_connections_to_the_leases(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    for_ever = Replicas(1, wait=60)
    owner = LogOwnership(
        one.batcher, Keys(), one.jobs, one.publisher, worker="one", nonce="n", now=lambda: 1, replicas=for_ever
    )
    logs = [f"r{number}" for number in range(100)]
    for request_id in logs:
        await redis.xadd(f"chat:tokens:{{{request_id}}}", {"type": "done"}, id=str(SEAL))
        await redis.expire(f"chat:tokens:{{{request_id}}}", 60)
    waiting = [asyncio.create_task(owner.finalize(r, STONE, retention=60, remember=120)) for r in logs]

    async def blocked() -> int:
        return int((await redis.info("clients"))["blocked_clients"])

    async def most_wait() -> bool:
        return await blocked() == 8

    await eventually(most_wait)
    assert await one.jobs.renew_leases([(delivery, 60)]) == [False], "the lease is too new to be renewed"
    assert not any(task.done() for task in waiting)
    assert await blocked() == 8, "the others wait for a slot"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)

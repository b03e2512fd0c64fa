"""The rules that keep a log true. Each has a test that was seen to fail with the rule taken out of the code.

What an id gives (the tests that name no file are in tests/broker/test_log.py):

| | rule | test | without the rule |
|---|---|---|---|
| a | fencing | a_former_owner_cannot_write_… | Redis assigns the ids, and accepts the former owner's entry |
| b | idempotent appends | resent_entries_that_redis_has_… | a refusal is final: `LogRefused` for written entries |
| c | one outcome | below | the seal ends its attempt only, and Redis accepts later entries |
| d | cancel is one command | the_first_of_two_seals_stands | `seal` does not search for one: `LogSealed`, no outcome |

The rules by their numbers:

| | rule | test | without the rule |
|---|---|---|---|
| 1 | the seal has a fence | a_former_owner_cannot_seal_… | the last entry is not compared: the former owner seals |
| 1 | … in one step with the seal | below | two scripts, one that looks and one that seals: the former owner seals |
| 1 | … and counts the entries | test_meddling: a_log_that_is_meddled_with_… | `done`, though text is missing |
| 1 | … when a script ends the job | test_one_step_end: a_take_over_… | no last id: the former owner seals it |
| 1 | … and counts the entries then too | test_one_step_end: a_log_that_lost_… | `done`, though text is missing |
| 1 | … which is found after a lost reply | below | no seal is searched for: `LogSealed`, though it is ours |
| 2 | after the last finish_reason only seal | below | the history is not consulted: the answer comes again |
| 3 | `resumed` names what is kept | below, for the reader | nothing is dropped: token ids 2 and 4 are there |
| 4 | no holes | full_memory_… | no MULTI: the log is lost as refused while memory is full |
| 4 | … and a hole is noticed | below | later verdicts are ignored: the error is waited for, though it passed |
| 4 | … also one made by others | test_meddling: a_log_with_a_hole_… | the answer is resumed as if the log were whole |
| 5 | the nonce identifies the owner | below | the name does: the second life continues attempt 1 |
| 6 | the loser reads the log again | below | it takes what it lost: both own attempt 2 |
| 6 | … unless this delivery has claimed | a_claim_is_not_repeated_… | it claims with each try to read |
| 6 | … or stops | one_of_two_simultaneous_take_overs_… | the lease is not checked: both own the log |
| 7 | NOMKSTREAM | a_deleted_log_… | the log is recreated, without a beginning |
| 7 | the tombstone | a_tombstone_keeps_a_late_job_… | it is not read: the job runs again |
| 7 | … in one step with `1-0` | below | two scripts, one that looks and one that begins: the job starts |
| 8 | verify before writing again | below | entries are resent at once: the log has a hole that nobody notices |
| 8 | the seal before the acknowledgement | finalizing_finds_that_… | it is not read: a lost seal counts as written |
| 9 | a duplicate waits | a_duplicate_does_not_run_… | the first job is not checked: the duplicate takes over |
| 9 | … and takes over | the same | it never does: the request has no end |
| 9 | … of the same request | test_reused_ids | the digest is not compared: another request's answer, as `done` |
| 9 | … before it is validated | test_worker: a_bad_duplicate_… | as above: it spoils the log of the first job |
| 10 | burial seals first | below | the letter comes first: while it cannot be written, the log has no end |
| 10 | … and acknowledges last | below | the acknowledgement comes before the letter: nobody writes the letter |
| 10 | … with one letter | test_poison: a_worker_that_finds_a_job_sealed_… | no letter is searched for: there are two |
| 10 | … also of two at once | test_dead: two_workers_that_bury_… | newer letters are not looked for: there are two |
| 10 | a deploy is not a failure | test_poison: deploys_bury_no_job | each claim counts: the job is buried |
| 11 | the feed after the reply | the_feed_never_carries_a_refused_entry | published with the XADD: it has `refused` |
"""

import asyncio
import json

import pytest
from conftest import StartWorker, stream
from faults import Fate, finish, gate_before, let_through
from processes import FAR, KEY, Process, delta, process, stolen, texts
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from waits import eventually

from worker.broker.acquisition import Acquired, AlreadyEnded, LeaseLost
from worker.broker.consumers import HANDED_OVER, HANDED_OVER_IDLE
from worker.broker.job_queue import Delivery
from worker.broker.log_writer import LogDiverged, LogFenced
from worker.broker.ownership import LogOwnership
from worker.contract.answer import Answer
from worker.contract.entries import parse
from worker.contract.ids import SEAL
from worker.contract.keys import Keys
from worker.redisio.pipelined import Callback, PipelinedConnection
from worker.redisio.retry import RetryUntilAvailable
from worker.sandbox.simulator.server import Simulator


@pytest.fixture
async def delivery(one: Process, redis: Redis) -> Delivery:
    await redis.xadd("chat:jobs", {"id": "r"})
    return await one.claim()


async def test_after_the_seal_redis_refuses_every_id(one: Process, delivery: Delivery, redis: Redis) -> None:
    """Without the rule `seal` writes `<attempt>-18446744073709551615`, and Redis accepts a cancel after `done`."""
    await one.seal(await one.acquire(delivery))
    for entry_id in ("1-1", "2-0", "*", str(SEAL)):
        with pytest.raises(ResponseError, match=r"equal or smaller|exhausted the last possible ID"):
            await redis.xadd(KEY, {"type": "cancelled"}, id=entry_id)
    assert await texts(redis) == ["1-0:started", f"{SEAL}:done"]


@pytest.mark.parametrize("exchanges", [1, 2])
async def test_rule_1_no_take_over_comes_between_reading_and_sealing(
    exchanges: int, redis_url: str, one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    old = await one.acquire(delivery)
    gate = await gate_before(one, redis_url)
    sealing = asyncio.create_task(one.seal(old))
    await let_through(gate, *[Fate.FINE] * exchanges)  # connected, and read
    taken = await two.owner.acquire("r", await stolen(redis, two, delivery), FAR)
    await finish(gate, sealing)
    if isinstance(taken, Acquired):
        with pytest.raises(LogFenced):
            sealing.result()
        assert await texts(redis) == ["1-0:started", "2-0:claimed"]
    else:
        assert isinstance(taken, AlreadyEnded)
        assert sealing.result() == "done"
    assert isinstance(taken, Acquired) == (exchanges == 1)


async def test_rule_1_a_seal_whose_reply_was_lost_is_found_and_not_written_again(
    redis_url: str, one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    gate = await gate_before(one, redis_url)
    sealing = asyncio.ensure_future(RetryUntilAvailable()(one.seal, log))
    await let_through(gate, Fate.FINE, Fate.LOST)
    await finish(gate, sealing)
    assert sealing.result() == "done"
    assert await texts(redis) == ["1-0:started", f"{SEAL}:done"]


async def test_rule_2_after_the_last_finish_reason_a_new_owner_only_seals(
    redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    request = json.dumps({"messages": [{"role": "user", "content": "Who are you?"}]})
    await redis.xadd("chat:jobs", {"id": "r", "request": request})
    job = (await stream(redis, "chat:jobs"))[0][0].decode()
    begun = {"type": "started", "queue": "default", "job": job, "worker": "w", "owner": "gone"}
    for number, fields in enumerate((begun, delta("whole") | {"finish_reason": "stop"})):
        await redis.xadd(KEY, fields, id=f"1-{number}")  # type: ignore[arg-type]  # dict is invariant
    await start_worker(simulator)

    async def sealed() -> bool:
        return (await texts(redis))[-1] == f"{SEAL}:done"

    await eventually(sealed)
    assert await texts(redis) == ["1-0:started", "1-1:whole", "2-0:claimed", f"{SEAL}:done"]
    assert not simulator.served


def test_rule_3_a_second_resume_does_not_restore_what_the_first_dropped() -> None:
    """The reader's side: what the first `resumed` dropped stays dropped, though the second one names a later entry."""
    answer = Answer()
    for entry_id, fields in (
        ("1-0", {"type": "started"}),
        ("1-1", {"type": "delta", "content": "a", "token_ids": "[1]"}),
        ("1-2", {"type": "delta", "token_ids": "[2]"}),
        ("2-0", {"type": "claimed"}),
        ("2-1", {"type": "resumed", "after": "1-1"}),
        ("2-2", {"type": "delta", "content": "b", "token_ids": "[3]"}),
        ("2-3", {"type": "delta", "token_ids": "[4]"}),
        ("3-0", {"type": "claimed"}),
        ("3-1", {"type": "resumed", "after": "2-2"}),
        ("3-2", {"type": "delta", "content": "c", "token_ids": "[5]"}),
    ):
        answer.add(parse(entry_id, {name.encode(): value.encode() for name, value in fields.items()}))
    assert answer.text == "abc"
    assert answer.choices[0].token_ids == [1, 3, 5]


@pytest.mark.parametrize("together", [False, True])
async def test_rule_4_a_hole_makes_a_new_attempt_necessary(redis_url: str, redis: Redis, *, together: bool) -> None:
    """A MULTI cannot leave a hole, but a server that only resembles Redis can, or a cluster in trouble."""

    class LeavesHole(PipelinedConnection):
        def send(self, packed: bytes, count: int, callback: Callback) -> None:
            if b"refused" not in packed:
                super().send(packed, count, callback)
                return
            executed = [ResponseError("NOREPLICAS"), b"1-2", *[0] * (count - 4)]  # the rest is the feed
            callback([b"OK", *[b"QUEUED"] * len(executed), executed])

    async with process(redis_url, "one", connections=LeavesHole) as one:
        await one.jobs.ensure_group("default")
        await redis.xadd("chat:jobs", {"id": "r"})
        log = await one.acquire(await one.claim())
        entries = [delta("refused"), delta("taken")]
        for batch in [entries] if together else [[entry] for entry in entries]:
            log.extend(batch)
        assert isinstance(await asyncio.wait_for(log.lost, 300), LogDiverged)


async def test_rule_5_a_process_of_the_same_name_does_not_take_the_log_for_its_own(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    """As after a restart in a container: the name is the same, the process has the lease, and the log was started."""
    await one.acquire(delivery)
    again = LogOwnership(
        one.batcher, Keys(), one.jobs, one.publisher, worker="one", nonce="another life", now=lambda: 1
    )
    assert isinstance(await again.acquire("r", delivery, FAR), Acquired)
    assert await texts(redis) == ["1-0:started", "2-0:claimed"]


async def test_rule_6_the_loser_of_a_race_takes_the_next_attempt_if_the_lease_is_its_own_and_else_stops(
    redis_url: str, one: Process, two: Process, delivery: Delivery, redis: Redis
) -> None:
    await one.acquire(delivery)
    gate = await gate_before(two, redis_url)
    await redis.xclaim("chat:jobs", "workers", "two", 0, [delivery.id])
    racing = asyncio.create_task(two.owner.acquire("r", delivery, FAR))
    await let_through(gate, *[Fate.FINE] * 2)  # connected, and read
    rival = {
        "type": "claimed",
        "queue": "default",
        "job": delivery.id,
        "worker": "one",
        "owner": "nonce-one",
        "time": 1,
    }
    await redis.xadd(KEY, rival, id="2-0")  # type: ignore[arg-type]  # dict is invariant
    await finish(gate, racing)
    assert isinstance(racing.result(), Acquired)
    assert await texts(redis) == ["1-0:started", "2-0:claimed", "3-0:claimed"]
    assert isinstance(await one.owner.acquire("r", delivery, FAR), LeaseLost)
    assert (await redis.xpending("chat:jobs", "workers"))["pending"] == 1, "the loser acknowledges nothing"


@pytest.mark.parametrize("exchanges", [1, 2])
async def test_rule_7_no_tombstone_comes_between_reading_and_starting(
    exchanges: int, redis_url: str, one: Process, delivery: Delivery, redis: Redis
) -> None:
    gate = await gate_before(one, redis_url)
    acquiring = asyncio.create_task(one.owner.acquire("r", delivery, FAR))
    await let_through(gate, *[Fate.FINE] * exchanges)  # connected, and read log and tombstone
    is_begun = await redis.exists(KEY)
    await redis.set("chat:ended:{r}", '{"outcome":"done","time":1}', ex=60)
    await finish(gate, acquiring)
    assert isinstance(acquiring.result(), Acquired if is_begun else AlreadyEnded)
    assert await redis.exists(KEY) == is_begun


async def test_rule_8_a_loss_in_a_failover_is_noticed_before_anything_is_written_again(
    one: Process, delivery: Delivery, redis: Redis
) -> None:
    log = await one.acquire(delivery)
    log.append(delta("kept"))
    log.append(delta("lost"))
    await log.wait_drained()
    kept = (await stream(redis, KEY))[:2]
    async with redis.pipeline() as pipe:
        pipe.delete(KEY)
        for entry_id, fields in kept:
            pipe.xadd(KEY, fields, id=entry_id)  # type: ignore[arg-type]  # dict is invariant
        pipe.pexpireat(KEY, FAR)
        await pipe.execute()
    await redis.client_kill_filter(_type="normal", skipme=True)
    log.append(delta("next"))
    with pytest.raises(LogDiverged):
        await log.wait_drained()
    assert await texts(redis) == ["1-0:started", "1-1:kept"], "no hole"


async def test_rule_10_a_burial_seals_first_and_acknowledges_only_once_the_dead_letter_is_there(
    redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    request = json.dumps({"messages": [{"role": "user", "content": "Who are you?"}]})
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    job = await redis.xadd("chat:jobs", {"id": "r", "request": request})
    await redis.xreadgroup("workers", "gone", {"chat:jobs": ">"})
    begun = {"type": "started", "queue": "default", "job": job, "worker": "w", "owner": "gone", "delivery": 1}
    await redis.xadd(KEY, begun, id="1-0")  # type: ignore[arg-type]  # dict is invariant
    await redis.xclaim("chat:jobs", "workers", HANDED_OVER, 0, [job], idle=HANDED_OVER_IDLE, justid=True)
    await redis.set("chat:dead", "in the way: no letter can be written")
    await start_worker(simulator, lease=0.5, max_deliveries=1)

    async def pending() -> int:
        return int((await redis.xpending("chat:jobs", "workers"))["pending"])

    async def has_come_again() -> bool:
        lines = await redis.xpending_range("chat:jobs", "workers", "-", "+", 1)
        return not lines or int(lines[0]["times_delivered"]) > 2

    async def is_done_with() -> bool:
        return not await pending()

    await eventually(has_come_again)
    assert await texts(redis) == ["1-0:started", "2-0:claimed", f"{SEAL}:error"]
    assert await pending() == 1, "not acknowledged without a letter"
    await redis.delete("chat:dead")
    await eventually(is_done_with)
    ((_, letter),) = await stream(redis, "chat:dead")
    assert letter[b"job"] == job

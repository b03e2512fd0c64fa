"""Somebody deletes or damages what a worker has written: the request ends once, and what a reader has shows it."""

import asyncio
import json
from collections.abc import Iterable

import pytest
from checks import LogEntry, chat_request, expected, has_begun, log_of, pending, promise_kept
from conftest import StartProcess, StartSimulator, StartWorker, stream
from proxy import Proxy
from redis.asyncio import Redis
from steered_clock import SteeredClock
from waits import eventually

from worker import Answer, Client, IncompleteLog
from worker.broker.consumers import HANDED_OVER, HANDED_OVER_IDLE
from worker.broker.log_writer import LogWriter
from worker.broker.ownership import LogOwnership
from worker.contract.entries import parse
from worker.contract.history import fault_in
from worker.contract.ids import SEAL
from worker.engine.settlement import Settlement
from worker.sandbox.simulator.answers import END, encode
from worker.sandbox.simulator.server import Options, Scenario, Simulator

PATIENT = {"gap_timeout": 60, "first_token_timeout": 60}
"""So that no answer that halts counts as silent."""
KEY = "chat:tokens:{r}"
BEGUN = {"type": "started", "queue": "default", "job": "", "worker": "w", "owner": "gone", "delivery": "1"}
CLAIMED = BEGUN | {"type": "claimed", "reason": "takeover"}


async def left_behind(redis: Redis, log: Iterable[tuple[str, dict[str, str]]], deliveries: int = 1) -> bytes:
    """Add a job whose worker died, with the entries that it wrote; returns the job's entry id."""
    await redis.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    job = await redis.xadd("chat:jobs", {"id": "r", "request": json.dumps(chat_request())})
    assert isinstance(job, bytes)
    await redis.xreadgroup("workers", "gone", {"chat:jobs": ">"})
    for where, fields in log:
        await redis.xadd(KEY, {name: job if name == "job" else value for name, value in fields.items()}, id=where)
    await redis.xclaim(
        "chat:jobs", "workers", HANDED_OVER, 0, [job], idle=HANDED_OVER_IDLE, retrycount=deliveries, justid=True
    )
    return job


def begun(tokens: int, *, finished: bool = False) -> list[tuple[str, dict[str, str]]]:
    """A log with the first tokens of the answer."""
    log = [("1-0", BEGUN), ("1-1", {"type": "opened", "model": "reciter", "role": "assistant"})]
    for number, token in enumerate(encode(expected())[:tokens], 2):
        text = expected().split()[number - 2] + " "
        log.append((f"1-{number}", {"type": "delta", "content": text, "token_ids": json.dumps([token])}))
    if finished:
        log[-1][1]["finish_reason"] = "stop"
    return log


async def ended(redis: Redis, request_id: str) -> list[LogEntry]:
    """Wait for the end of a request whose log was meddled with, and assert that a reader has the whole answer."""

    async def settled() -> bool:
        return await redis.exists(f"chat:ended:{{{request_id}}}") == 1 and not await pending(redis)

    await eventually(settled)
    entries = [parse(where, fields) for where, fields in await stream(redis, f"chat:tokens:{{{request_id}}}")]
    assert not fault_in(entries)
    answer = Answer(entries)
    assert (answer.outcome, answer.text) == ("done", expected())
    assert answer.choices[0].token_ids == [*encode(expected()), END]
    return await log_of(redis, request_id)


@pytest.mark.parametrize(
    ("claimed", "damaged"),
    [
        (CLAIMED, {"type": "resumed"}),
        (CLAIMED, {"type": "resumed", "after": ""}),
        (CLAIMED, {"type": "resumed", "after": "somewhere"}),
        (CLAIMED, {"type": "resumed", "after": "1-1-1"}),
        (CLAIMED, {"type": "delta", "token_ids": "[1,"}),
        ({"type": "claimed"}, {"type": "resumed"}),
        (CLAIMED | {"queue": "no queue", "job": "no id"}, {"type": "resumed"}),
        (CLAIMED | {"job": "\u0663-1"}, {"type": "resumed"}),
    ],
)
async def test_a_job_whose_log_cannot_be_read_is_buried_once(
    claimed: dict[str, str], damaged: dict[str, str], redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    job = await left_behind(redis, [*begun(2), ("2-0", claimed), ("2-1", damaged)])
    await start_worker(simulator)

    async def is_done_with() -> bool:
        return not await pending(redis)

    await eventually(is_done_with)
    log = await log_of(redis, "r")
    assert (log[-1].id, log[-1].fields["code"]) == (SEAL, "buried")
    ((_, letter),) = await stream(redis, "chat:dead")
    assert letter[b"job"] == job
    assert b"cannot be read" in letter[b"reason"]
    assert not simulator.served


TOP = SEAL.attempt
"""The number of the seal, which no attempt can have."""


@pytest.mark.parametrize(
    ("last", "what"),
    [
        (f"{TOP - 1}-{TOP}", "delta"),
        (f"{TOP}-0", "delta"),
        (f"{TOP}-5", "delta"),
        (f"{TOP}-{TOP - 1}", "delta"),
        (f"{TOP - 1}-0", "claimed"),
        (f"{TOP}-0", "deleted"),
    ],
)
async def test_a_job_whose_log_no_attempt_can_follow_is_buried_once(
    last: str, what: str, client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    """15 deliveries in 30 s, each of which tried the attempt of the number 2^64."""
    job = await left_behind(redis, [*begun(2), (last, {"type": "claimed" if what == "claimed" else "delta"})])
    if what == "deleted":
        await redis.xdel(KEY, last)
    await start_worker(simulator)

    async def is_done_with() -> bool:
        return not await pending(redis)

    await eventually(is_done_with)
    log = await log_of(redis, "r")
    assert (log[-1].id, log[-1].fields["code"]) == (SEAL, "buried")
    ((_, letter),) = await stream(redis, "chat:dead")
    assert letter[b"job"] == job
    assert b"no attempt can follow" in letter[b"reason"]
    assert (await client.status("r")).outcome == "error"
    assert [fields[b"type"] for _, fields in await stream(redis, "chat:lifecycle")] == [b"finished"]
    assert not simulator.served


async def test_a_buried_job_whose_lifecycle_line_is_delayed_is_left_to_the_next_worker(
    redis: Redis, redis_proxy: Proxy, start_worker: StartWorker, simulator: Simulator
) -> None:
    """Acknowledged by the worker that stops, it would never get its line."""
    await left_behind(redis, [*begun(2), (f"{TOP}-0", {"type": "delta"})])
    held = redis_proxy.hold(b"XADD chat:lifecycle")
    first = await start_worker(simulator, redis_url=redis_proxy.redis_url, lease=60)

    async def has_its_letter() -> bool:
        return held.met.is_set() and bool(await stream(redis, "chat:dead"))

    await eventually(has_its_letter)
    first.stop()
    first.stop()

    async def is_left() -> bool:
        return not await redis.hlen("chat:workers")

    await eventually(is_left)
    assert await pending(redis), "it is not acknowledged"
    await start_worker(simulator)

    async def is_done_with() -> bool:
        return not await pending(redis)

    await eventually(is_done_with)
    assert [fields[b"type"] for _, fields in await stream(redis, "chat:lifecycle")] == [b"started", b"finished"]
    assert len(await stream(redis, "chat:dead")) == 1


@pytest.mark.parametrize("last", [f"1-{TOP}", f"{TOP - 2}-0", f"{TOP - 2}-{TOP}"])
async def test_a_job_whose_log_one_more_attempt_can_follow_is_done_in_it(
    last: str, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await left_behind(redis, [*begun(2), (last, {"type": "delta"})])
    await start_worker(simulator)

    async def is_done_with() -> bool:
        return not await pending(redis)

    await eventually(is_done_with)
    answer = Answer(parse(where, fields) for where, fields in await stream(redis, KEY))
    assert (answer.outcome, answer.text) == ("done", expected())


async def test_an_answer_that_breaks_off_in_the_last_attempt_there_is_is_ended(
    redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    job = await left_behind(redis, [*begun(2), (f"{TOP - 2}-0", {"type": "claimed"})])
    server = await start_simulator(Options(scenario=Scenario(fault="cut", after=3)))
    await start_worker(server)

    async def is_done_with() -> bool:
        return not await pending(redis)

    await eventually(is_done_with)
    log = await log_of(redis, "r")
    assert (log[-1].id, log[-1].fields["code"]) == (SEAL, "buried")
    assert log[-2].type == "delta", "what was written stands"
    ((_, letter),) = await stream(redis, "chat:dead")
    assert letter[b"job"] == job
    assert len(server.served) == 1


@pytest.mark.parametrize("takes_no_end", [False, True])
async def test_a_job_that_always_meets_an_error_of_ours_is_buried_whatever_its_log_holds(
    redis: Redis,
    start_worker: StartWorker,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    takes_no_end: bool,
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("as a fault of ours")

    await left_behind(redis, begun(2), deliveries=9)
    if takes_no_end:
        await redis.xadd(KEY, {"type": "done"}, id=str(SEAL))
        await redis.xdel(KEY, str(SEAL))
        await redis.expire(KEY, 60)
    monkeypatch.setattr(LogOwnership, "acquire", broken)
    monkeypatch.setattr(Settlement, "settle_existing_end", broken)
    await start_worker(simulator, max_deliveries=5)

    async def is_done_with() -> bool:
        return not await pending(redis)

    await eventually(is_done_with)
    assert (await log_of(redis, "r"))[-1].fields.get("code") == (None if takes_no_end else "buried")
    assert len(await stream(redis, "chat:dead")) == 1


@pytest.mark.parametrize("step", ["next_attempt", "seal"])
async def test_a_log_that_is_deleted_again_and_again_has_its_end_before_the_job_is_acknowledged(
    step: str,
    client: Client,
    redis: Redis,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SteeredClock(halt_after=8)
    await start_worker(await start_simulator(clock=clock), **PATIENT)
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id)
    key, left = f"chat:tokens:{{{request_id}}}", 3
    take_step = getattr(LogOwnership, step)

    async def deleted_before(owner: LogOwnership, log: LogWriter, *args: object, **more: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            await redis.delete(key)
        return await take_step(owner, log, *args, **more)

    monkeypatch.setattr(LogOwnership, step, deleted_before)
    await redis.delete(key)
    clock.release()
    log = await ended(redis, request_id)
    assert left < 0
    assert [line.type for line in log].count("restarted") == 1


async def test_a_burial_whose_log_is_deleted_before_the_seal_still_writes_a_seal(
    redis: Redis, start_worker: StartWorker, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    await left_behind(redis, [*begun(2), ("2-0", CLAIMED), ("2-1", {"type": "resumed"})])
    left, seal = 2, LogOwnership.seal

    async def deleted_before(owner: LogOwnership, log: LogWriter, *args: object, **more: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            await redis.delete(KEY)
        return await seal(owner, log, *args, **more)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(LogOwnership, "seal", deleted_before)
    await start_worker(simulator)

    async def is_done_with() -> bool:
        return not await pending(redis)

    await eventually(is_done_with)
    assert (await log_of(redis, "r"))[-1].fields["code"] == "buried"
    assert len(await stream(redis, "chat:dead")) == 1


async def test_an_end_that_is_deleted_before_its_settlement_does_not_end_the_job(
    redis: Redis, start_worker: StartWorker, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare XADD cancels the request and leaves no tombstone; the log is deleted just before the worker settles it."""
    read = LogOwnership.read_entries

    async def deleted_before(owner: LogOwnership, request_id: str) -> object:
        monkeypatch.setattr(LogOwnership, "read_entries", read)
        await redis.delete(KEY)
        return await read(owner, request_id)

    monkeypatch.setattr(LogOwnership, "read_entries", deleted_before)
    await redis.xadd(KEY, {"type": "cancelled"}, id=str(SEAL))
    await redis.xadd("chat:jobs", {"id": "r", "request": json.dumps(chat_request())})
    await start_worker(simulator)
    await promise_kept(redis, "r")


async def test_a_job_whose_log_loses_entries_for_ever_is_buried(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = LogOwnership.seal

    async def deleted_before(owner: LogOwnership, log: LogWriter, *args: object, **more: object) -> object:
        if len(simulator.served) < 9:
            await redis.xdel(log.key, f"{log.attempt}-3")
        return await seal(owner, log, *args, **more)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(LogOwnership, "seal", deleted_before)
    await start_worker(simulator, max_deliveries=2)
    request_id = await client.enqueue(chat_request())

    async def is_done_with() -> bool:
        return bool(await redis.exists("chat:dead")) and not await pending(redis)

    await eventually(is_done_with)
    assert (await log_of(redis, request_id))[-1].fields["code"] == "buried"
    assert len(simulator.served) == 3


@pytest.mark.parametrize("how", ["XACK", "XGROUP DELCONSUMER"])
async def test_a_job_that_somebody_removes_from_the_group_is_ended_by_its_worker_or_by_a_cancel(
    how: str,
    client: Client,
    redis: Redis,
    start_worker: StartWorker,
    start_process: StartProcess,
    start_simulator: StartSimulator,
) -> None:
    """As the contract has it: no other process knows of the job any more."""
    clock = SteeredClock(halt_after=8)
    simulator = await start_simulator(clock=clock)

    async def take_out(job: str, consumer: str) -> None:
        if how == "XACK":
            await redis.xack("chat:jobs", "workers", job)
        else:
            await redis.xgroup_delconsumer("chat:jobs", "workers", consumer)

    worker = start_process(simulator)
    dies = await client.enqueue(chat_request())
    await has_begun(redis, dies)
    ((job, consumer),) = await pending(redis)
    worker.kill()
    worker.wait()
    await take_out(job, consumer)
    await start_worker(simulator, lease=0.5, **PATIENT)
    lives = await client.enqueue(chat_request())
    await has_begun(redis, lives)
    ((job, consumer),) = await pending(redis)
    await take_out(job, consumer)
    clock.release()
    await promise_kept(redis, lives)
    assert (await log_of(redis, dies))[-1].type == "delta"
    await client.cancel(dies)
    assert (await client.result(dies)).outcome == "cancelled"


@pytest.mark.parametrize("step", ["renamed away and back", "deleted from"])
async def test_a_log_that_is_meddled_with_while_it_is_written_is_not_sealed_as_whole(
    step: str, client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """After a renaming, the next entries have greater ids than the log that is back, so that Redis accepts them."""
    clock = SteeredClock(halt_after=8)
    await start_worker(await start_simulator(clock=clock), **PATIENT)
    request_id = await client.enqueue(chat_request())
    key = f"chat:tokens:{{{request_id}}}"
    await has_begun(redis, request_id, 6)
    match step:
        case "renamed away and back":
            await redis.rename(key, f"chat:away:{{{request_id}}}")
            clock.allow(16)
            await has_begun(redis, request_id, 3, attempt=2)
            await redis.rename(f"chat:away:{{{request_id}}}", key)
        case _:
            await redis.xdel(key, "1-4")
    clock.release()
    reading = asyncio.create_task(client.result(request_id))
    log = await ended(redis, request_id)
    assert "restarted" in [line.type for line in log]
    answer = await reading  # it was an `IncompleteLog` at once
    assert (answer.outcome, answer.text) == ("done", expected())


async def test_a_log_that_is_trimmed_while_it_is_written_stays_whole_for_its_followers(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=50))))
    request_id = await client.enqueue(chat_request())
    answer = Answer()
    async for entry in client.follow(request_id):
        answer.add(entry)
        if entry.id == (1, 6):  # what this follower has received is trimmed
            await redis.xtrim(f"chat:tokens:{{{request_id}}}", minid=str(entry.id), approximate=False)
    assert (answer.outcome, answer.text, answer.attempt) == ("done", expected(), 1)
    with pytest.raises(IncompleteLog):
        await client.result(request_id)


@pytest.mark.parametrize(
    ("tokens", "finished", "deleted"),
    [
        (9, False, ("1-4", "1-5", "1-6")),
        (9, False, ("1-0", "1-1", "1-2")),
        (9, False, ("1-9", "1-10")),
        (9, False, tuple(f"1-{n}" for n in range(11))),
        (9, True, ("1-4",)),
    ],
    ids=["in the middle", "at the front", "at the end", "all of it", "in a whole answer"],
)
async def test_a_log_with_a_hole_begins_again(
    tokens: int,
    deleted: tuple[str, ...],
    redis: Redis,
    start_worker: StartWorker,
    simulator: Simulator,
    *,
    finished: bool,
) -> None:
    await left_behind(redis, begun(tokens, finished=finished))
    await redis.xdel(KEY, *deleted)
    await start_worker(simulator)
    log = await ended(redis, "r")
    assert [line.type for line in log if line.id.attempt == 2][:2] == ["claimed", "restarted"]


async def test_a_claim_that_was_deleted_is_not_claimed_for_ever(
    redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await left_behind(redis, [*begun(4), ("2-0", CLAIMED), ("2-1", {"type": "resumed", "after": "1-5"})])
    await redis.xdel(KEY, "2-0", "2-1")
    await start_worker(simulator)
    log = await ended(redis, "r")
    assert [str(line.id) for line in log if line.type in {"claimed", "restarted"}] == ["3-0", "3-1"]


@pytest.mark.parametrize("has_tombstone", [False, True])
async def test_a_log_whose_end_was_deleted_does_not_bring_its_job_back_for_ever(
    redis: Redis, start_worker: StartWorker, simulator: Simulator, *, has_tombstone: bool
) -> None:
    await left_behind(redis, [*begun(4), (str(SEAL), {"type": "done"})])
    await redis.xdel(KEY, str(SEAL))
    if has_tombstone:
        await redis.set("chat:ended:{r}", '{"outcome":"done","time":1}', ex=60)
    await start_worker(simulator)

    async def is_done_with() -> bool:
        return not await pending(redis)

    await eventually(is_done_with)
    letters = [letter for _, letter in await stream(redis, "chat:dead")]
    assert len(letters) == (not has_tombstone)
    assert all(b"its end was deleted" in letter[b"reason"] for letter in letters)
    assert not simulator.served
    await redis.expire(KEY, 60)


async def test_a_hole_that_appears_during_a_stream_restarts_the_answer_when_it_breaks(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=12)
    simulator = await start_simulator(clock=clock)
    worker, other = [await start_worker(simulator, **PATIENT) for _ in range(2)]
    request_id = await client.enqueue(chat_request())
    await has_begun(redis, request_id, 8)
    await redis.xdel(f"chat:tokens:{{{request_id}}}", "1-4", "1-5", "1-6")
    holder = worker if len(worker._running_jobs) else other
    holder.stop()
    holder.stop()
    await has_begun(redis, request_id, attempt=2)
    clock.release()
    log = await ended(redis, request_id)
    assert "restarted" in [line.type for line in log]

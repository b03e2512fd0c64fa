"""What is kept beside the logs. Nothing that fakeredis does not have, but one line for a connection of its own."""

import json

import pytest
from conftest import stream
from fakeredis import FakeAsyncRedis
from redis.asyncio import Redis

from worker.broker.job_queue import Delivery
from worker.broker.ledger import Ledger
from worker.contract.keys import Keys
from worker.contract.records import Lifecycle, WorkerRecord

JOB = Delivery("default", "5-1", {b"id": b"\xff", b"request": b"x" * 3000})


@pytest.fixture
def fake() -> Redis:
    return FakeAsyncRedis(version=(6, 2))


@pytest.fixture
def ledger(fake: Redis) -> Ledger:
    return Ledger(fake, Keys())


def line(name: str, beat: int) -> WorkerRecord:
    return WorkerRecord(name=name, beat=beat, started=0, slots=1, running=0, finished=0)


async def test_a_job_is_buried_once_ready_to_be_put_back(ledger: Ledger, fake: Redis) -> None:
    for _ in range(2):
        await ledger.bury(JOB, "no id", 7, 5000)
    ((_, letter),) = await stream(fake, "chat:dead")
    fields = json.loads(letter.pop(b"fields"))
    assert letter == {b"reason": b"no id", b"queue": b"default", b"job": b"5-1", b"time": b"7"}
    assert fields == {"id": "\ufffd", "request": "x" * 3000}


async def test_a_field_above_the_limit_is_cut(ledger: Ledger, fake: Redis) -> None:
    await ledger.bury(JOB, "too large", 7, most=2999)
    ((_, letter),) = await stream(fake, "chat:dead")
    assert len(json.loads(letter[b"fields"])["request"]) == 1024
    assert json.loads(letter[b"cut"]) == ["request"]


async def test_of_a_job_above_the_limit_only_what_is_in_the_contract_is_kept(ledger: Ledger, fake: Redis) -> None:
    unknown = {b"unknown %d" % n: b"x" * 3000 for n in range(100)}
    await ledger.bury(Delivery("default", "5-1", unknown | {**JOB.fields}), "too large", 7, 5000)
    ((_, letter),) = await stream(fake, "chat:dead")
    assert json.loads(letter[b"fields"]) == {"id": "\ufffd", "request": "x" * 3000}
    assert b"cut" not in letter


async def test_what_takes_more_room_as_text_is_cut_by_that(ledger: Ledger, fake: Redis) -> None:
    for number, byte in enumerate((b"\0", b"\xff", b'"')):
        job = Delivery("default", f"{number}-1", {b"id": b"r", b"request": byte * 4000})
        await ledger.bury(job, "no JSON", 7, 5000)
    letters = [fields for _, fields in await stream(fake, "chat:dead")]
    assert [b"cut" in letter for letter in letters] == [True, True, False], "a quote takes two bytes"
    assert all(len(letter[b"fields"]) <= 10_000 for letter in letters)


async def test_the_newest_thousand_letters_are_kept(ledger: Ledger, fake: Redis) -> None:
    for number in range(1200):
        await fake.xadd("chat:dead", {"queue": "default", "job": f"{number}-1"})
    await ledger.bury(Delivery("default", "1200-1", JOB.fields), "why", 7, 5000)
    assert 1000 <= await fake.xlen("chat:dead") < 1200


async def test_the_same_entry_id_in_another_queue_is_another_job(ledger: Ledger, fake: Redis) -> None:
    await ledger.bury(JOB, "no id", 7, 5000)
    await ledger.bury(Delivery("high", JOB.id, JOB.fields), "no id", 7, 5000)
    assert len(await stream(fake, "chat:dead")) == 2


async def test_c7_the_lifecycle_keeps_as_many_lines_as_are_set(redis: Redis) -> None:
    ledger = Ledger(redis, Keys(), lifecycle_length=200)
    for number in range(1000):
        await ledger.lifecycle(Lifecycle(type="started", id=f"r{number}", job="5-1", queue="q", attempt=1, time=9))
    assert 200 <= await redis.xlen("chat:lifecycle") <= 300  # Redis drops whole nodes, of 100 entries by default


async def test_a_lifecycle_line_leaves_out_what_is_empty(redis: Redis) -> None:
    ledger = Ledger(redis, Keys())
    await ledger.lifecycle(Lifecycle(type="started", id="r", job="5-1", queue="default", attempt=1, time=9))
    ((_, fields),) = await stream(redis, "chat:lifecycle")
    assert fields == {
        b"type": b"started", b"id": b"r", b"job": b"5-1", b"queue": b"default", b"attempt": b"1", b"time": b"9",
    }  # fmt: skip


async def test_stale_workers_are_dropped_and_a_leaving_one_takes_its_line_along(ledger: Ledger, fake: Redis) -> None:
    await ledger.beat(line("old", 1_000), stale_after=10)
    await ledger.beat(line("ahead", 30_000), stale_after=10)  # D11: as after a step back of Redis's clock
    await ledger.beat(line("recent", 8_000), stale_after=10)
    assert await ledger.beat(line("me", 12_000), stale_after=10) == {"recent": 8_000, "me": 12_000}
    assert set(await fake.hgetall("chat:workers")) == {b"recent", b"me"}
    await ledger.leave("me")
    assert set(await fake.hgetall("chat:workers")) == {b"recent"}


@pytest.mark.parametrize(
    "odd", ["{}", "not JSON", '{"beat": "soon"}', b"\xff", '{"beat": 8000, "of": "a later version"}']
)
async def test_a_line_of_another_kind_does_not_end_the_worker(odd: str | bytes, ledger: Ledger, fake: Redis) -> None:
    await fake.hset("chat:workers", "odd", odd)
    await ledger.beat(line("me", 12_000), stale_after=10)
    left = set(await fake.hgetall("chat:workers"))
    assert left == ({b"me", b"odd"} if b"8000" in (odd if isinstance(odd, bytes) else odd.encode()) else {b"me"})

"""Burying jobs as dead letters. fakeredis has all that is needed here."""

import json

import pytest
from conftest import stream
from fakeredis import FakeAsyncRedis
from redis.asyncio import Redis

from worker.broker.dead_letters import DeadLetterWriter
from worker.broker.job_queue import Delivery
from worker.contract.keys import Keys

JOB = Delivery("default", "5-1", {b"id": b"\xff", b"request": b"x" * 3000})


@pytest.fixture
def fake() -> Redis:
    return FakeAsyncRedis(version=(6, 2))


@pytest.fixture
def dead_letters(fake: Redis) -> DeadLetterWriter:
    return DeadLetterWriter(fake, Keys())


async def test_a_job_is_buried_once_and_kept_ready_to_be_put_back(dead_letters: DeadLetterWriter, fake: Redis) -> None:
    for _ in range(2):
        await dead_letters.bury(JOB, "no id", 7, 5000)
    ((_, letter),) = await stream(fake, "chat:dead")
    fields = json.loads(letter.pop(b"fields"))
    assert letter == {b"reason": b"no id", b"queue": b"default", b"job": b"5-1", b"time": b"7"}
    assert fields == {"id": "\ufffd", "request": "x" * 3000}


async def test_a_field_above_the_limit_is_truncated(dead_letters: DeadLetterWriter, fake: Redis) -> None:
    await dead_letters.bury(JOB, "too large", 7, max_bytes=2999)
    ((_, letter),) = await stream(fake, "chat:dead")
    assert len(json.loads(letter[b"fields"])["request"]) == 1024
    assert json.loads(letter[b"cut"]) == ["request"]


async def test_a_job_above_the_limit_keeps_only_the_fields_of_the_contract(
    dead_letters: DeadLetterWriter, fake: Redis
) -> None:
    unknown = {b"unknown %d" % n: b"x" * 3000 for n in range(100)}
    await dead_letters.bury(Delivery("default", "5-1", unknown | {**JOB.fields}), "too large", 7, 5000)
    ((_, letter),) = await stream(fake, "chat:dead")
    assert json.loads(letter[b"fields"]) == {"id": "\ufffd", "request": "x" * 3000}
    assert b"cut" not in letter


async def test_a_field_is_truncated_by_its_size_as_json_text(dead_letters: DeadLetterWriter, fake: Redis) -> None:
    for number, byte in enumerate((b"\0", b"\xff", b'"')):
        job = Delivery("default", f"{number}-1", {b"id": b"r", b"request": byte * 4000})
        await dead_letters.bury(job, "no JSON", 7, 5000)
    letters = [fields for _, fields in await stream(fake, "chat:dead")]
    assert [b"cut" in letter for letter in letters] == [True, True, False], "a quote takes two bytes"
    assert all(len(letter[b"fields"]) <= 10_000 for letter in letters)


async def test_the_newest_thousand_letters_are_kept(dead_letters: DeadLetterWriter, fake: Redis) -> None:
    for number in range(1200):
        await fake.xadd("chat:dead", {"queue": "default", "job": f"{number}-1"})
    await dead_letters.bury(Delivery("default", "1200-1", JOB.fields), "why", 7, 5000)
    assert 1000 <= await fake.xlen("chat:dead") < 1200


async def test_the_same_entry_id_in_another_queue_is_another_job(dead_letters: DeadLetterWriter, fake: Redis) -> None:
    await dead_letters.bury(JOB, "no id", 7, 5000)
    await dead_letters.bury(Delivery("high", JOB.id, JOB.fields), "no id", 7, 5000)
    assert len(await stream(fake, "chat:dead")) == 2

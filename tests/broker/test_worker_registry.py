"""The records of workers: renewed, dropped when stale, removed. fakeredis has all that is needed here."""

import pytest
from fakeredis import FakeAsyncRedis
from redis.asyncio import Redis

from worker.broker.worker_registry import WorkerRegistry
from worker.contract.keys import Keys
from worker.contract.records import WorkerRecord


@pytest.fixture
def fake() -> Redis:
    return FakeAsyncRedis(version=(6, 2))


@pytest.fixture
def registry(fake: Redis) -> WorkerRegistry:
    return WorkerRegistry(fake, Keys())


def record(name: str, beat: int) -> WorkerRecord:
    return WorkerRecord(name=name, beat=beat, started=0, slots=1, running=0, finished=0)


async def test_stale_records_are_dropped_and_a_leaving_worker_removes_its_own(
    registry: WorkerRegistry, fake: Redis
) -> None:
    await registry.beat(record("old", 1_000), stale_after=10)
    await registry.beat(record("ahead", 30_000), stale_after=10)  # as after a step back of Redis's clock
    await registry.beat(record("recent", 8_000), stale_after=10)
    assert await registry.beat(record("me", 12_000), stale_after=10) == {"recent": 8_000, "me": 12_000}
    assert set(await fake.hgetall("chat:workers")) == {b"recent", b"me"}
    await registry.remove("me")
    assert set(await fake.hgetall("chat:workers")) == {b"recent"}


@pytest.mark.parametrize(
    "odd", ["{}", "not JSON", "[" * 5000, '{"beat": "soon"}', b"\xff", '{"beat": 8000, "of": "a later version"}']
)
async def test_a_record_that_cannot_be_read_does_not_end_the_worker(
    odd: str | bytes, registry: WorkerRegistry, fake: Redis
) -> None:
    await fake.hset("chat:workers", "odd", odd)
    await registry.beat(record("me", 12_000), stale_after=10)
    left = set(await fake.hgetall("chat:workers"))
    assert left == ({b"me", b"odd"} if b"8000" in (odd if isinstance(odd, bytes) else odd.encode()) else {b"me"})

"""While Redis is the trouble, and just after that, `worker status` names Redis and blames no worker."""

from pathlib import Path
from typing import Any

from installation import LEASE, Watch, start_installation, stopped, watching

_SHORT = LEASE / 2
"""A worker is silent after half of it, which is longer than a busy machine keeps a process from running."""


async def _until_healthy(watch: Watch) -> set[str]:
    """Which faults are named until all workers stream again."""
    named = set[str]()
    while True:
        picture = await watch.next()
        named |= {fault["fault"] for fault in picture["faults"]}
        if [one["state"] for one in picture["workers"] if one["tokens_per_s"]] == ["working"] * 2:
            return named


async def _until_records_are_old(watch: Watch) -> list[dict[str, Any]]:
    """The pictures until every record is so old that its worker would be called silent."""
    pictures = [await watch.next()]
    while not all(one["age"] > _SHORT for one in pictures[-1]["workers"]):
        pictures.append(await watch.next())
    return pictures


async def test_workers_whose_records_a_full_redis_refuses_are_connected_and_not_blamed(redis_binary: Path) -> None:
    async with start_installation(redis_binary, lease=_SHORT) as it, watching(it.url) as watch:
        await watch.healthy()
        await it.redis.config_set("maxmemory", "1")
        await watch.diagnose(["redis_full"])
        pictures = await _until_records_are_old(watch)
        await it.redis.config_set("maxmemory", "0")
        named = await _until_healthy(watch)
    assert {fault["fault"] for picture in pictures for fault in picture["faults"]} == {"redis_full"}
    assert [one["state"] for one in pictures[-1]["workers"]] == ["connected"] * 2
    assert [queue["workers"] for queue in pictures[-1]["queues"]] == [2]
    assert named <= {"redis_full"}


async def test_a_worker_that_dies_while_redis_is_full_is_named_after_redis(redis_binary: Path) -> None:
    async with start_installation(redis_binary, lease=_SHORT) as it, watching(it.url) as watch:
        await watch.healthy()
        await it.redis.config_set("maxmemory", "1")
        await watch.diagnose(["redis_full"])
        it.workers[0].kill()
        await watch.diagnose(["worker_dead"])
        picture = await watch.next()
        assert [fault["fault"] for fault in picture["faults"]] == ["redis_full", "worker_dead"]
        assert sorted(one["state"] for one in picture["workers"]) == ["connected", "silent"]


async def test_after_a_stall_of_redis_no_worker_is_blamed(redis_binary: Path) -> None:
    async with start_installation(redis_binary, lease=_SHORT) as it, watching(it.url) as watch:
        await watch.healthy()
        assert it.server.process is not None
        with stopped(it.server.process):
            for _ in range(3):  # 9 s, in which every record gets too old: each picture takes the 3 s of its timeout
                await watch.diagnose(["redis_silent"])
        named = await _until_healthy(watch)
    assert named <= {"redis_silent", "redis_away"}

"""Redis's clock steps back, or a failover goes to a host with a slower clock: a dead worker's jobs are still taken."""

import struct
from typing import cast

import pytest
from conftest import StartSimulator, StartWorker, stream
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.contract.keys import GROUP
from worker.sandbox.simulator.requests import Options, Scenario
from worker.sandbox.simulator.server import Simulator

HOUR_MS = 3_600_000
_POLYNOMIAL = 0x95AC9329AC4BC9B5  # of Redis's crc64 (Jones), reflected


def crc64(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc


async def deliver_in_an_hour(redis: Redis, key: str, consumer: str, job: bytes) -> None:
    """Make a pending job look as one does whose delivery Redis's clock has yet to reach.

    XCLAIM takes no time in the future, so the stream is dumped, changed and restored.
    """
    seconds, _ = await redis.time()
    await redis.xclaim(key, GROUP, consumer, 0, [job], time=seconds * 1000, justid=True)
    dump = cast("bytes", await redis.dump(key))
    then, now = struct.pack("<q", seconds * 1000 + HOUR_MS), struct.pack("<q", seconds * 1000)
    assert now in dump
    body = dump[:-8].replace(now, then)
    await redis.restore(key, 0, body + struct.pack("<Q", crc64(body)), replace=True)


@pytest.mark.parametrize("shown", [True, False], ids=["with a record", "without a record"])
async def test_a_dead_workers_job_is_taken_though_redis_shows_no_idle_time(
    redis: Redis, client: Client, start_worker: StartWorker, simulator: Simulator, *, shown: bool
) -> None:
    await client.enqueue({"messages": [{"role": "user", "content": "Who are you?"}]}, id="r")
    reply = await redis.xreadgroup(GROUP, "dead", {"chat:jobs": ">"})
    ((_, ((job, _),)),) = cast("list[tuple[bytes, list[tuple[bytes, object]]]]", reply)
    await deliver_in_an_hour(redis, "chat:jobs", "dead", job)
    if shown:
        seconds, _ = await redis.time()
        await redis.hset("chat:workers", "dead", f'{{"name": "dead", "beat": {seconds * 1000 + HOUR_MS}}}')

    await start_worker(simulator, lease=0.5)
    assert (await client.result("r")).outcome == "done"

    async def is_forgotten() -> bool:
        return not await redis.hexists("chat:workers", "dead")

    await eventually(is_forgotten)


async def test_a_running_job_keeps_its_lease(
    redis: Redis, client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """Its lease is renewed, so it shows some idle time at nearly every look, and its worker shows new beats."""
    silent = await start_simulator(Options(scenario=Scenario(fault="hang")))
    for _ in range(2):
        await start_worker(silent, lease=4, first_token_timeout=600)
    await client.enqueue({"messages": [{"role": "user", "content": "Who are you?"}]}, id="r")
    beats: set[bytes] = set()

    async def both_looked_often() -> bool:
        beats.update(cast("list[bytes]", await redis.hvals("chat:workers")))
        return len(beats) > 12

    await eventually(both_looked_often)
    entries = await stream(redis, "chat:tokens:{r}")
    assert [fields[b"type"] for _, fields in entries] == [b"queued", b"started"]
    await client.cancel("r")

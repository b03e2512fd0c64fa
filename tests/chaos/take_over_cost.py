"""What the search for jobs of other workers costs Redis while many jobs run and some workers are idle, and how soon
it finds a job that was handed over.

    python tests/chaos/take_over_cost.py --jobs 10000 --workers 4 --lines 0

The jobs belong to consumers that renew their leases. The idle workers are processes with a simulated vLLM, and with
another server that is away, for which the jobs in the lines wait.
"""
# ruff: noqa: E402, T201 - where the project is not installed, the imports below need the changed sys.path

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import click
from redis.asyncio import Redis
from waits import eventually

from worker.broker.consumers import HANDED_OVER, HANDED_OVER_IDLE
from worker.contract.keys import GROUP, Keys
from worker.sandbox.embedded_redis import start_redis
from worker.sandbox.simulator.server import Simulator

_KEY = Keys().jobs()
_AWAY = "http://127.0.0.1:1"
_OWNERS = 20
_OF_THE_SEARCH = ("xautoclaim", "xpending", "xinfo|consumers", "xinfo")


def _request(model: str) -> str:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}]})


class Owners:
    """The consumers that have all the jobs, and renew their leases as workers do."""

    def __init__(self, redis: Redis, lease: float) -> None:
        self._redis = redis
        self._lease = lease
        self._ids: dict[str, list[str]] = {}

    async def take(self, jobs: int) -> None:
        for first in range(0, jobs, 1000):
            pipe = self._redis.pipeline(transaction=False)
            for number in range(first, min(jobs, first + 1000)):
                pipe.xadd(_KEY, {"id": f"job-{number}", "request": _request("reciter")})
            await pipe.execute()
        for number in range(_OWNERS):
            name = f"owner-{number}"
            (read,) = cast("Any", await self._redis.xreadgroup(GROUP, name, {_KEY: ">"}, count=-(-jobs // _OWNERS)))
            self._ids[name] = [entry.decode() for entry, _ in read[1]]

    async def hand_over_one(self) -> float:
        """Hand one job over. Returns the seconds until another worker has begun it."""
        name = next(iter(self._ids))
        job = self._ids[name].pop()
        ((_, fields),) = cast("Any", await self._redis.xrange(_KEY, job, job))
        log = Keys().tokens(fields[b"id"].decode())
        began = time.monotonic()
        await self._redis.xclaim(_KEY, GROUP, HANDED_OVER, 0, [job], idle=HANDED_OVER_IDLE, justid=True)

        async def is_begun() -> bool:
            return await self._redis.xlen(log) > 0

        await eventually(is_begun)
        return time.monotonic() - began

    async def keep(self) -> None:
        while True:
            beat = int(time.time() * 1000)
            for name in self._ids:
                await self._redis.hset("chat:workers", name, json.dumps({"name": name, "beat": beat, "slots": 512}))
            for name, ids in self._ids.items():
                for first in range(0, len(ids), 500):
                    await self._redis.xclaim(_KEY, GROUP, name, 0, cast("Any", ids[first : first + 500]), justid=True)
            await asyncio.sleep(self._lease / 3)


async def _make_lines(redis: Redis, lines: int) -> None:
    for number in range(lines):
        model = f"another-model-{number // 64}"
        job = cast("bytes", await redis.xadd(_KEY, {"id": f"parked-{number}", "request": _request(model)}))
        await redis.xreadgroup(GROUP, "owner-0", {_KEY: ">"})
        await redis.xclaim(
            _KEY, GROUP, f"waiting:{number % 64}:{model}", 0, [job], idle=10**12 - 86_400_000, justid=True
        )  # fmt: skip


def _start_worker(url: str, vllm: str, lease: float) -> "subprocess.Popen[bytes]":
    own = {"REDIS_URL": url, "VLLM_URLS": f"{vllm},{_AWAY}", "WORKER_LEASE": str(lease), "WORKER_DRAIN_TIMEOUT": "0.1"}
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "worker", "run"]
    return subprocess.Popen(command, env=os.environ | own | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL)


async def _are_started(redis: Redis, workers: int) -> bool:
    return await redis.hlen("chat:workers") == workers + _OWNERS


async def _usage(redis: Redis) -> dict[str, tuple[int, int]]:
    stats = await redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): (figures["calls"], figures["usec"]) for name, figures in stats.items()}


async def _run(jobs: int, workers: int, lines: int, lease: float, seconds: float) -> None:
    with start_redis() as server:
        async with Redis.from_url(server.url, protocol=2) as redis, Simulator() as simulator:
            print(server.what)
            await redis.xgroup_create(_KEY, GROUP, id="0", mkstream=True)
            owners = Owners(redis, lease)
            await owners.take(jobs)
            await _make_lines(redis, lines)
            keeping = asyncio.create_task(owners.keep())
            processes = [_start_worker(server.url, simulator.url, lease) for _ in range(workers)]
            try:
                await eventually(lambda: _are_started(redis, workers))
                await redis.config_resetstat()
                began = time.monotonic()
                await asyncio.sleep(seconds)
                took, usage = time.monotonic() - began, await _usage(redis)
                waits = [await owners.hand_over_one() for _ in range(20)]
            finally:
                keeping.cancel()
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.wait()
    print(f"{jobs} jobs, {workers} idle workers, {lines} lines, {took:.0f} s, leases of {lease:g} s")
    for name, (calls, usec) in sorted(usage.items(), key=lambda item: -item[1][1]):
        mark = "*" if name in _OF_THE_SEARCH else " "
        print(f"{mark} {name:20}{calls / took:9.1f} calls/s {usec / took / 10_000:8.3f} % of a core")
    share = sum(usec for name, (_, usec) in usage.items() if name in _OF_THE_SEARCH) / took / 10_000
    print(f"handed-over jobs began after {min(waits):.2f} to {max(waits):.2f} s")
    print(f"* together {share:.3f} %")


@click.command(help=__doc__)
@click.option("--jobs", default=10_000, show_default=True)
@click.option("--workers", default=4, show_default=True)
@click.option("--lines", default=0, show_default=True, help="Lines of parked jobs.")
@click.option("--lease", default=15.0, show_default=True)
@click.option("--seconds", default=60.0, show_default=True)
def main(jobs: int, workers: int, lines: int, lease: float, seconds: float) -> None:
    asyncio.run(_run(jobs, workers, lines, lease, seconds))


if __name__ == "__main__":
    main()

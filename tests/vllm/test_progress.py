"""Progress of jobs at a pool of servers that fail at random, in virtual time: no job waits for a server that works."""

import asyncio
import random
import time
from collections import Counter
from typing import cast

import pytest
from virtual_servers import Mode, VirtualLoop, VirtualServer, VirtualTransport

from worker.engine.pace import Pace
from worker.engine.tries import FailedTry, Raise, Tries, after_failure
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.servers.circuit import Caller, CircuitState
from worker.vllm.servers.pool import ServerPool
from worker.vllm.servers.server import Server
from worker.vllm.stream.watchdog import StreamTimeouts

MODES: tuple[Mode, ...] = ("works", "away", "silent", "draining", "no_backend", "errors", "limits_rate", "cuts")

LONGEST_IDLE = 70.0
"""Seconds: the longest pause after a refusal, and a probe."""


class Job:
    """One job, which asks as `Generation` does, with an intake that starts it only while there is room."""

    def __init__(self, pool: ServerPool, model: str) -> None:
        self._pool = pool
        self._model = model
        self.has_begun = False

    async def run(self) -> None:
        pool, model, pace = self._pool, self._model, Pace()
        while True:
            while pool.room(model) <= 0:
                await pool.wait_changed(0.5)
            demand, caller, tries = pool.expect(model), Caller(), Tries(3, pace.first_retry)
            try:
                while not isinstance(tries, Raise):
                    caller.may_exceed_limit = self.has_begun
                    if not pool.accepts(model, caller):
                        await pool.wait_available(model, caller=caller, within=pace.longest_wait_here)
                    if not pool.accepts(model, caller):
                        break  # parked
                    server = pool.choose(model, caller)
                    is_trial = server.circuit.state is CircuitState.HALF_OPEN
                    try:
                        with server.reserve():
                            demand.end()
                            return await self._ask(server, caller)
                    except UpstreamError as error:
                        failed = FailedTry(
                            error=error, tries=tries.with_one_more(),
                            has_room_elsewhere=pool.accepts(model, caller),
                            was_failed_trial=is_trial and server.circuit in caller.failed_at,
                        )  # fmt: skip
                        decision = after_failure(failed, pace)
                        if isinstance(decision, Raise):
                            break  # the job fails; here it is added again
                        tries = decision.tries
                        await asyncio.sleep(decision.pause)
            finally:
                demand.end()
            await asyncio.sleep(1)

    async def _ask(self, server: Server, caller: Caller) -> None:
        parser = ChunkParser()

        def on_events(events: list[bytes]) -> bool:
            for data in events:
                parser.parse(data)
            self.has_begun = True
            return parser.done

        async with self._pool.stream(server, {"model": self._model, "messages": []}, caller=caller) as stream:
            while await stream.read_into(on_events) and not parser.done:
                pass
            parser.check_complete()


@pytest.mark.parametrize("seed", range(6))
def test_no_job_waits_while_a_server_works(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(seed)  # of the jitter
    loop = VirtualLoop()
    monkeypatch.setattr(time, "monotonic", loop.time)
    monkeypatch.setattr("worker.vllm.stream.watchdog.monotonic", loop.time)
    monkeypatch.setitem(cast("dict[str, object]", Server.__init__.__kwdefaults__), "clock", loop.time)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(_storm(random.Random(seed), loop))  # noqa: S311 - a simulation


async def _storm(rng: random.Random, loop: VirtualLoop) -> None:
    servers = {
        name: VirtualServer(
            rng, places=rng.choice([1, 4, 16]), queue=rng.choice([0, 4, 10_000]), model=rng.choice(["m", "m", "other"]),
            has_metrics=rng.random() < 0.5,
        )
        for name in ("a", "b", "c")
    }  # fmt: skip
    servers["a"].model = "m"
    pool = ServerPool(
        [f"http://{name}:1" for name in servers],
        limits=StreamTimeouts(connect=5, first_token=20, gap=5), most=64, transport=VirtualTransport(servers),
    )  # fmt: skip
    monitor = asyncio.create_task(pool.monitor())
    jobs: list[asyncio.Task[None]] = []
    serving = [server for server in servers.values() if server.model == "m"]
    works_since = {server: loop.time() for server in serving}
    idle_since, requests = loop.time(), 0

    def check() -> None:
        nonlocal idle_since, requests
        now, sent = loop.time(), sum(server.requests for server in serving)
        is_busy = any(server.in_flight for server in pool.servers)
        if sent > requests or is_busy or all(job.done() for job in jobs):
            idle_since = now
        assert sent - requests <= 100, "jobs ask without pauses"
        requests = sent
        for server, since in works_since.items():
            assert server.mode != "works" or now - max(since, idle_since) <= LONGEST_IDLE, "jobs wait for nothing"

    for _ in range(25):
        unfinished = sum(not job.done() for job in jobs)
        jobs += [asyncio.create_task(Job(pool, "m").run()) for _ in range(max(0, rng.choice([1, 8, 30]) - unfinished))]
        name = rng.choice(list(servers))
        server = servers[name]
        server.mode = rng.choice(MODES)
        server.places = rng.choice([1, 4, 16])
        works_since[server] = loop.time()
        if server.model != "m":
            works_since.pop(server)
        for _ in range(rng.choice([2, 10, 60])):
            await asyncio.sleep(0.5)
            check()
    for server in servers.values():
        server.mode, server.places = "works", 16
    ends = loop.time() + 900
    while not all(job.done() for job in jobs) and loop.time() < ends:
        await asyncio.sleep(0.5)
        check()
    await asyncio.gather(*(job for job in jobs if job.done()))
    left = Counter(job.done() for job in jobs)[False]
    for job in jobs:
        job.cancel()
    monitor.cancel()
    await asyncio.gather(monitor, *jobs, return_exceptions=True)
    await pool.aclose()
    assert left == 0
    assert [server.in_flight for server in pool.servers] == [0, 0, 0]
    assert [len(server.requests) + len(server.unanswered) for server in pool.servers] == [0, 0, 0]
    assert (pool._demands.by_model, len(pool._places)) == ({}, 0)
    assert [server.running + server.waiting for server in servers.values()] == [0, 0, 0]

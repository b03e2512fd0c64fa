"""A small installation for tests and commands: a Redis, two simulated vLLM servers, worker processes, a steady load."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from command import run, started
from redis.asyncio import Redis
from steered_clock import SteeredClock

from worker import Client
from worker.client.errors import ClientError
from worker.contract.entries import Object
from worker.sandbox.embedded_redis import EmbeddedRedis, start_redis
from worker.sandbox.programs import Programs, start_programs
from worker.sandbox.simulator.scheduler import ServerClock
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest

LEASE = 15.0
"""The default: what is named within a time is named so in production."""
STREAMS = 4
REQUEST: Object = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 60}
_ANSWERS = Scenario(rate=20, first_token=0.1, tokens=60)
_EXIT_TIMEOUT = 30.0
_HANG = 300.0


class StoppableSimulator(Simulator):
    """A server whose replies a test may stop: it then accepts connections and begins no reply, also to a probe.

    `probe_delay` is how many seconds it takes for its health and for its list of models.
    """

    def __init__(self, options: Options, clock: ServerClock) -> None:
        super().__init__(options, clock=clock)
        self.probe_delay = 0.0
        self._runs = asyncio.Event()
        self._runs.set()

    def stop(self) -> None:
        self._runs.clear()

    def go_on(self) -> None:
        self._runs.set()

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        await self._runs.wait()
        if request.path in {"/health", "/v1/models"}:
            await asyncio.sleep(self.probe_delay)
        await super()._handle(request, connection)


@dataclass(slots=True)
class VllmServer:
    """A simulated server, and its clock."""

    simulator: StoppableSimulator
    clock: SteeredClock


@dataclass(slots=True)
class Installation:
    """What `start_installation` starts. `workers` are the processes, in the order of their start."""

    server: EmbeddedRedis
    redis: Redis
    client: Client
    vllm: list[VllmServer]
    programs: Programs
    lease: float = LEASE
    workers: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url

    def start_worker(self, *program: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start a worker process with settings besides the usual ones."""
        settings = {
            "REDIS_URL": self.url,
            "VLLM_URLS": ",".join(server.simulator.url for server in self.vllm),
            "WORKER_LEASE": str(self.lease),
            "WORKER_SLOTS": "8",
            "WORKER_DRAIN_TIMEOUT": "1",
        } | variables
        if program:
            process = self.programs.start([sys.executable, *program], **settings)
        else:
            process = self.programs.start_own("run", **settings)
        self.workers.append(process)
        return process

    async def replace_worker(self, number: int) -> None:
        """Deploy: stop a worker by SIGTERM and start another in its place."""
        old = self.workers.pop(number)
        old.terminate()
        self.start_worker()
        await asyncio.to_thread(old.wait, _EXIT_TIMEOUT)


async def read_status(url: str) -> dict[str, Any]:
    """What `worker status --json` prints."""
    return cast("dict[str, Any]", json.loads((await run("status", "--json", REDIS_URL=url)).out))


class Watch:
    """The pictures of a `worker status --watch --json`, which runs as a process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def next(self) -> dict[str, Any]:
        """The next picture."""
        assert self._process.stdout is not None
        async with asyncio.timeout(_HANG):
            return cast("dict[str, Any]", json.loads(await self._process.stdout.readline()))

    async def healthy(self, workers: int = 2, *, idle: bool = False) -> None:
        """Wait until all workers stream, or are idle, and nothing is wrong."""
        async with asyncio.timeout(_HANG):
            while True:
                picture = await self.next()
                working = [one for one in picture["workers"] if one["state"] == "working"]
                there = [one for one in working if bool(one["tokens_per_s"]) is not idle]
                if len(there) == workers and not picture["faults"]:
                    return

    async def diagnose(self, wanted: Collection[str] = ()) -> tuple[str, float]:
        """Wait until a fault is named; with `wanted`, until one of these is.

        Returns the name of the most severe fault that counts, and the seconds until then. Nothing but the status is
        used.
        """
        began = time.monotonic()
        async with asyncio.timeout(_HANG):
            while True:
                named = [fault["fault"] for fault in (await self.next())["faults"]]
                if counting := [name for name in named if not wanted or name in wanted]:
                    return counting[0], time.monotonic() - began


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[Watch]:
    """Watch the status of an installation, of which only the URL of its Redis is known."""
    async with started("status", "--watch", "--json", REDIS_URL=url) as process:
        yield Watch(process)


@asynccontextmanager
async def start_installation(
    redis_server: Path | None = None, *, lease: float = LEASE, streams: int = STREAMS, workers: int = 2
) -> AsyncIterator[Installation]:
    """Start all of it under load. The load goes on through faults."""
    with start_redis(redis_server) as server, start_programs("operation") as programs:
        async with (
            Redis.from_url(server.url, protocol=2) as redis,
            Client(server.url, patience=1) as client,
            _vllm_server() as one,
            _vllm_server() as other,
        ):
            it = Installation(server, redis, client, [one, other], programs, lease)
            for _ in range(workers):
                it.start_worker()
            load = [asyncio.create_task(_keep_asking(client)) for _ in range(streams)]
            try:
                yield it
            finally:
                for task in load:
                    task.cancel()
                await asyncio.gather(*load, return_exceptions=True)
                for vllm in it.vllm:
                    vllm.clock.release()
                    vllm.simulator.go_on()


@asynccontextmanager
async def _vllm_server() -> AsyncIterator[VllmServer]:
    clock = SteeredClock()
    async with StoppableSimulator(Options(scenario=_ANSWERS), clock) as simulator:
        yield VllmServer(simulator, clock)


async def _keep_asking(client: Client) -> None:
    while True:
        with suppress(ClientError):
            await client.result(await client.enqueue(REQUEST))


@contextmanager
def stopped(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Stop a process by SIGSTOP, and let it continue at the end."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)

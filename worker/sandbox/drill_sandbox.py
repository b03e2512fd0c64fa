"""The sandbox of the drill: Redis, two simulated vLLM servers, two workers, and the faults that break them."""

import asyncio
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import httpx
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from .embedded_redis import EmbeddedRedis, free_port, start_redis
from .programs import Programs, SandboxFailed, start_programs
from .prometheus import Prometheus

LEASE = 2
RATE = 25
"""Tokens per second of an answer."""
GAP_TIMEOUT = 15
"""Seconds without a token after which an answer continues at another server: more than the 10 s after which the alert
ServerIsSilent fires, and fewer than by default, so that the drill is short."""
_JOB = "vllm-relay-worker"
_MEMORY = 64_000_000
_BALLAST = ("ballast", "more ballast")
_PIECES = (1000, 10)
"""Bytes of the pieces that fill the rest of Redis, which refuses a large one while there is room for a small one. The
buffer for a piece of a megabyte would itself count as used memory, until Redis shrinks it."""
_SETTINGS = {
    "WORKER_LEASE": str(LEASE),
    "WORKER_GAP_TIMEOUT": str(GAP_TIMEOUT),
    "WORKER_SLOTS": "32",
    "WORKER_DRAIN_TIMEOUT": "0",  # Ctrl-C does not wait for the answers
}
_GUARD = 120.0
"""Seconds within which everything serves. Only for a machine on which something does not start."""


class DrillSandbox:
    """The processes of the drill. `prometheus` is None if this machine has none."""

    def __init__(self, programs: Programs, redis: EmbeddedRedis) -> None:
        if redis.process is None:
            raise SandboxFailed("the drill needs a real Redis server: install redis-server")
        self.redis_url = redis.url
        self._redis_process = redis.process
        self._programs = programs
        self._server_ports = [free_port(), free_port()]
        self._worker_ports = [free_port(), free_port()]
        self._servers = [
            programs.start_own("simulate", "--port", str(port), "--rate", str(RATE)) for port in self._server_ports
        ]
        self._workers = [self._start_worker(port) for port in self._worker_ports]
        program = shutil.which("prometheus")
        self.prometheus = Prometheus(programs, program, {_JOB: self._worker_ports}) if program else None

    def _start_worker(self, port: int) -> "subprocess.Popen[bytes]":
        own = {
            "REDIS_URL": self.redis_url,
            "VLLM_URLS": ",".join(f"http://127.0.0.1:{port}" for port in self._server_ports),
            "WORKER_METRICS": f"127.0.0.1:{port}",
        }
        return self._programs.start_own("run", **own, **_SETTINGS)

    async def wait_ready(self) -> None:
        """Wait until both workers take jobs, and Prometheus has scraped them.

        Raises:
            SandboxFailed: when a process ends, or does not serve in time.
        """
        try:
            async with asyncio.timeout(_GUARD), httpx.AsyncClient(trust_env=False) as http:
                for port in self._server_ports:
                    await self._wait_answers(http, f"http://127.0.0.1:{port}/health")
                for port in self._worker_ports:
                    await self._wait_answers(http, f"http://127.0.0.1:{port}/readyz")
            if self.prometheus is not None:
                await self.prometheus.wait_ready(_GUARD)
        except TimeoutError:
            raise SandboxFailed(f"the processes of the drill do not serve within {_GUARD:g} s") from None
        except ChildProcessError as error:
            raise SandboxFailed(str(error)) from None

    async def _wait_answers(self, http: httpx.AsyncClient, url: str) -> None:
        while True:
            for process in (*self._servers, *self._workers):
                if process.poll() is not None:
                    raise ChildProcessError(self._programs.why_ended(process))
            with suppress(httpx.TransportError):
                if (await http.get(url)).is_success:
                    return
            await asyncio.sleep(0.05)

    @asynccontextmanager
    async def kill_worker(self) -> AsyncIterator[None]:
        """Kill the worker with the most jobs, and start another one in its place at the end."""
        running: list[float] = []
        async with httpx.AsyncClient(trust_env=False) as http:
            for port in self._worker_ports:
                page = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
                running.append(float(page.partition("\nvllm_relay_jobs_running ")[2].partition("\n")[0]))
        busiest = running.index(max(running))
        self._workers[busiest].kill()
        yield
        self._workers[busiest] = self._start_worker(self._worker_ports[busiest])

    @asynccontextmanager
    async def freeze_server(self) -> AsyncIterator[None]:
        """Stop a vLLM server (SIGSTOP): its connections stay open, and it sends nothing."""
        with _stopped(self._servers[0]):
            yield

    @asynccontextmanager
    async def stall_redis(self) -> AsyncIterator[None]:
        """Stop Redis (SIGSTOP)."""
        with _stopped(self._redis_process):
            yield

    @asynccontextmanager
    async def fill_redis(self) -> AsyncIterator[None]:
        """Fill the memory of Redis up to `maxmemory`, and keep it full."""
        async with Redis.from_url(self.redis_url, protocol=2) as redis:
            free = _MEMORY - int((await redis.info("memory"))["used_memory"])
            is_over = asyncio.Event()
            filling = asyncio.create_task(_keep_full(redis, free, is_over))
            try:
                yield
            finally:
                is_over.set()
                await filling
                await redis.delete(*_BALLAST)


async def _keep_full(redis: Redis, free: int, is_over: asyncio.Event) -> None:
    block, pieces = _BALLAST
    await redis.setrange(block, free * 9 // 10, "x")
    while not is_over.is_set():
        for size in _PIECES:
            with suppress(OutOfMemoryError):
                while not is_over.is_set():
                    await redis.append(pieces, bytes(size))
        await asyncio.sleep(0.05)


@contextmanager
def _stopped(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def start_drill_sandbox() -> AsyncIterator[DrillSandbox]:
    """A sandbox that serves, and ends with the context or with this process.

    Raises:
        NoRedis: when there is no Redis server.
        SandboxFailed: when something does not start.
    """
    options = ("--maxmemory", str(_MEMORY), "--maxmemory-policy", "noeviction")
    with start_redis(None, *options) as redis, start_programs("drill") as programs:
        sandbox = DrillSandbox(programs, redis)
        try:
            await sandbox.wait_ready()
            yield sandbox
        finally:
            if sandbox.prometheus is not None:
                await sandbox.prometheus.aclose()

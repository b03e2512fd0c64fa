"""The worker processes of the demo, which run the real program and end with the demo."""

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from .programs import SandboxFailed, start_programs

LEASE = 2
"""Seconds after which the other worker takes over: fewer than a real worker's, so that the demo is short."""
_SETTINGS = {
    "WORKER_SLOTS": "2",
    "WORKER_LEASE": str(LEASE),
    "WORKER_DRAIN_TIMEOUT": "0",  # Ctrl-C does not wait for the answers
}


class DemoWorkers:
    """The worker processes."""

    def __init__(self, processes: "list[subprocess.Popen[bytes]]") -> None:
        self._processes = processes
        self._killed: set[int] = set()

    def name_of(self, worker: str) -> str:
        """A short name for the worker of an entry, found by the process id in the worker's name."""
        for number, process in enumerate(self._processes, 1):
            if f"-{process.pid}-" in worker:
                return f"worker {number} (pid {process.pid})"
        return worker

    def kill(self, worker: str) -> None:
        """Kill this worker with SIGKILL."""
        for process in self._processes:
            if f"-{process.pid}-" in worker:
                self._killed.add(process.pid)
                process.kill()

    async def watch(self) -> None:
        """Wait until a worker that was not killed ends.

        Raises:
            SandboxFailed: always, when that happens.
        """
        while all(process.poll() is None for process in self._processes if process.pid not in self._killed):  # noqa: ASYNC110 - a process is no asyncio event
            await asyncio.sleep(0.2)
        raise SandboxFailed("a worker ended unexpectedly: start `worker run` by hand to see why")


@contextmanager
def start_workers(redis_url: str, vllm_url: str, prefix: str) -> Iterator[DemoWorkers]:
    """Two worker processes, which end with the context or with this process."""
    own = {"REDIS_URL": redis_url, "VLLM_URLS": vllm_url, "WORKER_PREFIX": prefix, **_SETTINGS}
    with start_programs("demo") as programs:
        yield DemoWorkers([programs.start_own("run", **own) for _ in range(2)])

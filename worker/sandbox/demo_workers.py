"""The worker processes of the demo, which run the real program and end with the demo."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .orphans import guarded_folder

LEASE = 2
"""Seconds after which the other worker takes over: fewer than a real worker's, so that the demo is short."""
_SETTINGS = {
    "WORKER_SLOTS": "2",
    "WORKER_LEASE": str(LEASE),
    "WORKER_DRAIN_TIMEOUT": "0",  # Ctrl-C does not wait for the answers
}
_EXIT_TIMEOUT = 8.0
"""Seconds that a worker has to end after SIGTERM."""


class DemoFailed(RuntimeError):
    """The demo failed. The message is the reason."""


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
            DemoFailed: always, when that happens.
        """
        while all(process.poll() is None for process in self._processes if process.pid not in self._killed):  # noqa: ASYNC110 - a process is no asyncio event
            await asyncio.sleep(0.2)
        raise DemoFailed("a worker ended unexpectedly: start `worker run` by hand to see why")


@contextmanager
def start_workers(redis_url: str, vllm_url: str, prefix: str) -> Iterator[DemoWorkers]:
    """Two worker processes, which end with the context or with this process."""
    own = {"REDIS_URL": redis_url, "VLLM_URLS": vllm_url, "WORKER_PREFIX": prefix, **_SETTINGS}
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("WORKER_", "VLLM_URL"))}
    rest["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), rest.get("PYTHONPATH"))))
    package = __name__.partition(".")[0]
    with guarded_folder("vllm-relay-demo-") as guard:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(2):
                with (guard.folder / f"{number}.log").open("wb") as log:
                    process = subprocess.Popen(  # noqa: S603 - this program
                        [sys.executable, "-m", package, "run"],
                        env=rest | own,
                        cwd=guard.folder,
                        stderr=log,
                        start_new_session=True,  # Ctrl-C in a terminal is for the demo, which then ends its workers
                    )
                processes.append(process)
                guard.add(process)
            yield DemoWorkers(processes)
        finally:
            try:
                for process in processes:
                    process.terminate()
                for process in processes:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_EXIT_TIMEOUT)
            finally:  # also after a second Ctrl-C
                for process in processes:
                    process.kill()
                    process.wait()

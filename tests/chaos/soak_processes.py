"""The processes of the soak (a Redis with an append-only file, simulators, workers) and the faults they suffer."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from redis import Redis as BlockingRedis
from redis.exceptions import RedisError

from worker.sandbox.embedded_redis import free_port
from worker.settings import Settings

__all__ = ["LEASE", "ROOT", "Chaos", "Processes"]

LEASE = 2.0  # with 1 s, workers on a busy machine lose their leases all the time, and few jobs end
ROOT = Path(__file__).parents[2]
_SETTINGS: dict[str, object] = {
    "slots": 64,
    "lease": LEASE,
    "drain_timeout": 0.3,
    # A busy machine must not make a worker give up an answer that a simulator has sent completely.
    "gap_timeout": 4,
    "first_token_timeout": 6,
    "tries": 50,
    "max_deliveries": 1000,
    "log_format": "json",
    "log_level": "warning",
}


class Processes:
    """All processes, until `stop` ends them. Their output goes to files in `folder`.

    `beside` is the folder of another version of the package, which every second worker runs.
    """

    def __init__(
        self, folder: Path, *, workers: int, simulators: int, redis_server: Path, beside: Path | None = None
    ) -> None:
        self.folder = folder
        self.trees = [ROOT, beside or ROOT]
        self.records = [folder / f"simulator-{number}.jsonl" for number in range(simulators)]
        self._redis_server = redis_server
        self._redis_port = free_port()
        self._ports = [free_port() for _ in self.records]
        self._number = 0
        self.redis_url = f"redis://127.0.0.1:{self._redis_port}/0"
        self.redis = self._start_redis()
        self.simulators = [self._start_simulator(number) for number in range(simulators)]
        self.workers = [self.start_worker() for _ in range(workers)]
        self.leaving: list[subprocess.Popen[bytes]] = []
        """Workers that got SIGTERM."""

    def _start(self, name: str, *command: str | Path, **environment: str) -> "subprocess.Popen[bytes]":
        rest = {key: value for key, value in os.environ.items() if not key.startswith(("WORKER_", "VLLM_", "REDIS_"))}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, env=rest | {"PYTHONPATH": str(ROOT)} | environment, stdout=log, stderr=log, cwd=self.folder
            )

    def _start_redis(self) -> "subprocess.Popen[bytes]":
        options = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--dir", str(self.folder)]
        place = ["--port", str(self._redis_port), "--bind", "127.0.0.1"]
        return self._start("redis", self._redis_server, *place, *options)

    def _start_simulator(self, number: int) -> "subprocess.Popen[bytes]":
        script = Path(__file__).parent / "soak_simulator.py"
        port, record = str(self._ports[number]), str(self.records[number])
        # Every second simulator ignores the field by which a chat continues after token ids.
        ignored = ["kv_transfer_params"] * (number % 2)
        return self._start(f"simulator-{number}", sys.executable, script, port, record, *ignored)

    def start_worker(self) -> "subprocess.Popen[bytes]":
        """Start one more worker."""
        self._number += 1
        known = {name: value for name, value in _SETTINGS.items() if name in Settings.model_fields}
        settings = {f"WORKER_{name.upper()}": str(value) for name, value in known.items()}
        urls = ",".join(f"http://127.0.0.1:{port}" for port in self._ports)
        return self._start(
            f"worker-{self._number}", sys.executable, "-m", "worker", "run",
            **settings, REDIS_URL=self.redis_url, VLLM_URLS=urls, PYTHONPATH=str(self.trees[self._number % 2]),
        )  # fmt: skip

    def restart_redis(self) -> None:
        """Kill Redis (SIGKILL) and start a new one, which reads the append-only file."""
        _kill(self.redis)
        self.redis = self._start_redis()

    def restart_simulator(self, number: int) -> None:
        """Kill a simulator (SIGKILL) and start a new one on the same port."""
        _kill(self.simulators[number])
        self.simulators[number] = self._start_simulator(number)

    def replace_worker(self, number: int) -> None:
        """Kill a worker (SIGKILL) and start a new one."""
        _kill(self.workers[number])
        self.workers[number] = self.start_worker()

    def deploy_worker(self, number: int) -> None:
        """Terminate a worker (SIGTERM) and start a new one beside it."""
        self.workers[number].terminate()
        self.leaving.append(self.workers[number])
        self.workers[number] = self.start_worker()

    def failures(self) -> list[str]:
        """The processes that ended by themselves, and the terminated workers whose status is not 0."""
        self.leaving, ended = [
            [process for process in self.leaving if (process.poll() is None) is running] for running in (True, False)
        ]
        # A worker that gets SIGTERM before it handles signals ends by it.
        wrong = [
            f"a terminated worker ended with status {process.returncode}"
            for process in ended
            if process.returncode not in {0, -signal.SIGTERM}
        ]
        rest = [("Redis", self.redis), *(("a simulator", process) for process in self.simulators)]
        rest += [("a worker", process) for process in self.workers]
        return wrong + [
            f"{name} ended by itself with status {process.returncode}"
            for name, process in rest
            if process.poll() is not None
        ]

    def stop(self) -> None:
        """Kill all processes."""
        for process in [*self.workers, *self.leaving, *self.simulators, self.redis]:
            _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


class Chaos:
    """Causes faults at random moments, drawn from `dice`. In the end all processes run again.

    `pause` is the mean time between two faults, in seconds.
    """

    def __init__(self, processes: Processes, dice: random.Random, pause: float) -> None:
        self._processes = processes
        self._dice = dice
        self._pause = pause
        self.done: Counter[str] = Counter()
        self._harms: dict[str, tuple[int, Callable[[], None]]] = {
            "workers killed": (4, lambda: processes.replace_worker(self._worker())),
            "workers paused": (3, self._pause_worker),
            "workers terminated": (3, lambda: processes.deploy_worker(self._worker())),
            "simulators killed": (2, lambda: processes.restart_simulator(dice.randrange(len(processes.simulators)))),
            "Redis killed": (1, processes.restart_redis),
            "all connections cut": (4, self._cut),
        }
        self._paused: dict[subprocess.Popen[bytes], float] = {}

    def _worker(self) -> int:
        return self._dice.randrange(len(self._processes.workers))

    def _pause_worker(self) -> None:
        process = self._processes.workers[self._worker()]
        process.send_signal(signal.SIGSTOP)
        self._paused[process] = asyncio.get_running_loop().time() + LEASE * self._dice.uniform(0.5, 2.5)

    def _cut(self) -> None:
        try:
            with BlockingRedis.from_url(self._processes.redis_url, protocol=2, socket_timeout=1) as redis:
                redis.execute_command("CLIENT", "KILL", "TYPE", "normal")
        except RedisError:
            pass  # Redis is being restarted: there is no connection to cut

    async def run(self, times: int) -> None:
        """Cause so many faults, or as many as fit until the task is cancelled."""
        try:
            for _ in range(times):
                await asyncio.sleep(self._dice.expovariate(1 / self._pause))
                self._wake(asyncio.get_running_loop().time())
                kinds = list(self._harms)
                (kind,) = self._dice.choices(kinds, [weight for weight, _ in self._harms.values()])
                self._harms[kind][1]()
                self.done[kind] += 1
            await asyncio.sleep(max(self._paused.values(), default=0) - asyncio.get_running_loop().time())
        finally:
            self._wake(float("inf"))

    def _wake(self, now: float) -> None:
        for process in [process for process, until in self._paused.items() if until <= now]:
            process.send_signal(signal.SIGCONT)  # without effect on a process that was killed meanwhile
            del self._paused[process]

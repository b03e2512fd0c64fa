"""The bridges that are compared, and how each is started; ours is the real worker with everything on."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from worker.sandbox.embedded_redis import free_port

_HERE = Path(__file__).parent
_BRIDGES = _HERE / "bridges"
_ROOT = _HERE.parents[1]
_SLOTS = 8192
_NODE_OPTIONS = ("--single-threaded-gc", "--max-semi-space-size=2")
"""On its one core the collector of Node 20 has no use for threads, and the nursery of 16 MiB that it has by default
takes 6 to 10 ms to go through: with these it holds 20,000/s within 5 ms, without them 3,000/s."""


class NotAtHand(RuntimeError):
    """What a bridge needs is not on this machine."""


@dataclass(frozen=True)
class Bridge:
    """A program that brings tokens from vLLM to Redis, started with `command(port of vLLM, port of Redis)`.

    It takes its jobs from the job stream, or where `by_lines` from lines `<first> <count>` on its standard input.
    """

    name: str
    what: str
    command: Callable[[int, int], list[str]]
    environment: Callable[[int, int], Mapping[str, str]] = field(default=lambda _vllm, _redis: {})
    by_lines: bool = False
    first_entries: int = 0
    """How many entries of a log come before its first delta."""

    @contextmanager
    def running(self, vllm: int, redis: int, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
        """The process, killed in the end. What it prints goes to `log`."""
        rest = {name: value for name, value in os.environ.items() if not name.startswith(("WORKER_", "VLLM_"))}
        environment = rest | {"PYTHONPATH": str(_ROOT)} | dict(self.environment(vllm, redis))
        with log.open("wb") as said:
            process = subprocess.Popen(
                self.command(vllm, redis),
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env=environment,
                cwd=log.parent,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def ours() -> Bridge:
    """The worker: ids, leases, parsing, metrics and all. Only its limits are as wide as the benchmark needs them."""

    def environment(vllm: int, redis: int) -> dict[str, str]:
        return {
            "VLLM_URLS": _http(vllm),
            "REDIS_URL": _redis(redis),
            "WORKER_SLOTS": str(_SLOTS),
            "WORKER_METRICS": f"127.0.0.1:{free_port()}",
            # Streams that are held open for their memory are silent for long.
            "WORKER_GAP_TIMEOUT": "3600",
            "WORKER_LOG_FORMAT": "json",
        }

    def command(_vllm: int, _redis: int) -> list[str]:
        return [sys.executable, "-m", "worker", "run"]

    return Bridge("ours", "the real worker", command, environment, first_entries=2)  # `started` and `opened`


def straightforward() -> Bridge:
    """The worker of a good tutorial."""
    script = str(_BRIDGES / "straightforward.py")
    return Bridge(
        "straightforward", "httpx, json, awaited xadd",
        lambda vllm, redis: [sys.executable, script, _http(vllm), _redis(redis)],
    )  # fmt: skip


def floor(folder: Path) -> Bridge:
    """The least: a few lines of C, or of Python where there is no compiler. `folder` is for the program."""
    compiler = shutil.which("cc")
    if compiler is None:
        command, what = [sys.executable, str(_BRIDGES / "floor.py")], "minimal Python, for there is no C compiler"
    else:
        command, what = [str(folder / "floor")], "minimal C"
        subprocess.run([compiler, "-O2", "-o", command[0], str(_BRIDGES / "floor.c")], check=True)
    return Bridge("floor", what, lambda vllm, redis: [*command, str(vllm), str(redis)], by_lines=True)


def node() -> Bridge:
    """The lean worker of a good Node engineer.

    Raises:
        NotAtHand: without node and npm, or when npm cannot install what it needs.
    """
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        raise NotAtHand("node and npm are not on this machine")
    script = _installed(npm) / "bridge.mjs"
    return Bridge(
        "node", "undici, eventsource-parser, ioredis",
        lambda vllm, redis: [program, *_NODE_OPTIONS, str(script), _http(vllm), _redis(redis)],
    )  # fmt: skip


def _installed(npm: str) -> Path:
    """A folder of the user's cache with the script and its packages, installed there once for each list of them."""
    wanted = (_BRIDGES / "node" / "package.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "vllm-relay-benchmarks" / hashlib.sha256(wanted).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_BRIDGES / "node" / "bridge.mjs", folder)
    if not (folder / "installed").exists():
        shutil.copy(_BRIDGES / "node" / "package.json", folder)
        command = [npm, "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotAtHand(f"npm cannot install its packages: {done.stderr.strip()[-200:]}")
        (folder / "installed").touch()
    return folder


def _http(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _redis(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"

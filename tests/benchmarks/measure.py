"""What is measured from outside: the CPU and the memory of a process, what Redis has done, and numbers out of many."""

import math
import os
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median as median_of

import psutil
from redis import Redis

_CPUCLOCK_SCHED = 2


def cpu_of(pid: int) -> int:
    """CPU of a process with all its threads, user and system, in nanoseconds.

    The clock is the one of clock_getcpuclockid(3), which has no ticks of 10 ms as /proc/<pid>/stat has.
    """
    return time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED)


def keep_to(pid: int, cores: Iterable[int]) -> None:
    """Let a process, with the threads that it has by now, run on these cores only."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    return int(psutil.Process(pid).memory_info().rss)


@dataclass(frozen=True, slots=True)
class RedisState:
    """What Redis has done, from its INFO."""

    added: int
    """Entries that XADD has added to streams."""
    memory: int


def redis_state(redis: "Redis") -> RedisState:
    """Two sections of INFO at once; Redis 6.2 gives no two of them in one."""
    pipe = redis.pipeline(transaction=False)
    pipe.info("commandstats")
    pipe.info("memory")
    commands, memory = pipe.execute()
    xadd = commands.get("cmdstat_xadd", {})
    return RedisState(int(xadd.get("calls", 0)) - int(xadd.get("failed_calls", 0)), int(memory["used_memory"]))


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` percent of all do not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * part / 100) - 1)]


def median(values: Sequence[float | None]) -> float | None:
    """The median of what could be measured."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    return median_of(there) if there else None


def many_files() -> None:
    """Allow as many open files as the machine does: each stream is one, in each process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

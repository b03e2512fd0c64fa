"""Short jobs: what a whole job costs where the server answers at once, with all of its tokens in one write.

Each bridge has a Redis and a load generator of its own. The windows of the bridges alternate.
"""

import itertools
import json
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self, cast

from bridge import Bridge
from chunks import WORDS
from measure import cpu_of, median, percentile
from reader import key_of
from redis.exceptions import ResponseError
from rig import Rig, RigFailed, helper
from scenarios import Figures, Run
from short_client import Connection, packed_job

USUAL = 10
TOKENS = (USUAL, 1, 50)
JOBS, JOBS_QUICK = 3000, 500
SLOW = 50
"""Jobs a second while latency is measured."""
_WINDOWS = 3
"""Those that count. One more comes first, in which a bridge opens its connections and compiles its code."""
_WARM_UP = 2.0
_WARM_UP_JOBS = 50
_PATIENCE = 60.0
_COUNTED = 500
"""Jobs whose commands are counted."""
_LIMIT, _LIMIT_QUICK = 10.0, 3.0
"""Seconds after which a bridge counts as one that does not keep up."""
_POLL, _POLL_LAST = 0.02, 0.002
"""Seconds between two looks at the queue: more would cost Redis a part of what is measured."""
_TRAILING = 0.1
"""Seconds after the last acknowledgement in which a bridge does what it has put off."""
_CHECKED = 50
_END = b"end of the commands"


@dataclass(frozen=True, slots=True)
class Burst:
    """Jobs that were enqueued at once. CPU is in microseconds a job."""

    rate: float
    """Acknowledged jobs a second."""
    cpu: float
    redis_cpu: float
    complete: bool
    """Whether all of them were acknowledged in time."""


class ShortJobs:
    """A bridge, its Redis and its load generator, and who gives it jobs."""

    def __init__(self, bridge: Bridge) -> None:
        self.rig = Rig(bridge, streams=1)
        self._stack = ExitStack()
        self._sent = 0
        self._milliseconds = time.time_ns() // 1_000_000

    def __enter__(self) -> Self:
        try:
            self._stack.enter_context(self.rig)
            port = self.rig.redis_port
            self._enqueuing = self._stack.enter_context(Connection(port).peer)
            self._client = self._stack.enter_context(helper("short_client.py", str(port), str(self._milliseconds)))
            self.rig.others.append(self._client.pid)
            self._warm_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _warm_up(self) -> None:
        """No window then has what a bridge loads, compiles or connects at its first jobs."""
        until = time.monotonic() + _WARM_UP
        while time.monotonic() < until:
            if self._run(_WARM_UP_JOBS, USUAL, _PATIENCE)[0] < _WARM_UP_JOBS:
                raise RigFailed(f"{self.rig.name} does not answer its first jobs")

    def burst(self, jobs: int, tokens: int, limit: float = _LIMIT) -> Burst:
        """Enqueue so many jobs at once, and wait until all are acknowledged, for `limit` seconds at most.

        The CPU includes what Redis spends on the enqueuing, and what follows the last acknowledgement.
        """
        before = self._cpu()
        done, seconds = self._run(jobs, tokens, limit)
        time.sleep(_TRAILING)
        cpu, redis_cpu = ((after - old) / 1e3 / max(1, done) for old, after in zip(before, self._cpu(), strict=True))
        if done == jobs:
            self._check_logs(range(self._sent, self._sent - jobs, -max(1, jobs // _CHECKED)), tokens)
        return Burst(done / seconds, cpu, redis_cpu, done == jobs)

    def _run(self, jobs: int, tokens: int, limit: float) -> tuple[int, float]:
        """How many of the jobs were acknowledged, and within how many seconds."""
        first, self._sent = self._sent, self._sent + jobs
        data = b"".join(packed_job(self._milliseconds, number, tokens) for number in range(first + 1, self._sent + 1))
        began = time.monotonic()
        self._enqueuing.sendall(data)
        done = 0
        while done < jobs and time.monotonic() - began < limit:
            time.sleep(_POLL if done < 0.9 * jobs else _POLL_LAST)
            self.rig.check()
            done = self._acknowledged() - first
        seconds = time.monotonic() - began
        self._drop_replies()
        return done, seconds

    def _cpu(self) -> tuple[int, int]:
        return self.rig.cpu_now(), cpu_of(self.rig.redis_pid)

    def _acknowledged(self) -> int:
        """How many jobs have ended since the bridge has started."""
        try:
            groups = self.rig.redis.xinfo_groups("chat:jobs")
        except ResponseError:  # there is no stream yet
            return 0
        for group in groups:
            return int(group["last-delivered-id"].partition(b"-")[2]) - int(group["pending"])
        return 0

    def _drop_replies(self) -> None:
        self._enqueuing.setblocking(False)
        try:
            while self._enqueuing.recv(1 << 20):
                pass
        except BlockingIOError:
            self._enqueuing.setblocking(True)

    def _check_logs(self, jobs: Sequence[int], tokens: int) -> None:
        """Raise an error if the log of one of the jobs does not have all of its text."""
        pipe = self.rig.redis.pipeline(transaction=False)
        for number in jobs:
            pipe.xrange(key_of(number))
        text = "".join(WORDS[number % len(WORDS)] for number in range(tokens)).encode()
        for number, entries in zip(jobs, pipe.execute(), strict=True):
            found = b"".join(fields.get(b"content", b"") for _, fields in entries if fields[b"type"] == b"delta")
            if found != text:
                raise RigFailed(f"{self.rig.name}: the log of job {number} has {found!r}, not {text!r}")

    def first_deltas(self, jobs: int) -> list[float]:
        """Milliseconds from the XADD of each job to its first delta, at a steady pace."""
        first, self._sent = self._sent + 1, self._sent + jobs
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write(f"{first} {jobs} {SLOW} {USUAL}\n".encode())
        self._client.stdin.flush()
        line = self._client.stdout.readline()
        if not line:
            raise RigFailed(f"{self.rig.name} did not answer {jobs} jobs")
        return [each / 1e6 for each in cast("list[int]", json.loads(line))]

    def commands(self, jobs: int, tokens: int) -> tuple[Counter[str], Counter[str]]:
        """The commands that clients sent, and those that scripts called, while so many jobs ran.

        INFO commandstats does not tell the two apart; MONITOR does.
        """
        own = self.rig.redis.client_info()["addr"].encode()
        with socket.create_connection(("127.0.0.1", self.rig.redis_port)) as monitor:
            monitor.sendall(b"MONITOR\r\n")
            monitor.recv(1024)  # it begins with this reply
            self.burst(jobs, tokens)
            self.rig.redis.echo(_END)
            shown = bytearray()
            while _END not in shown:
                if not (piece := monitor.recv(1 << 20)):
                    raise RigFailed("Redis has closed the connection that monitors it")
                shown += piece
        sent, called = Counter[str](), Counter[str]()
        for line in shown.splitlines():
            # +<seconds> [<database> <address, or "lua">] "<command>" "<argument>" ...
            _, _, rest = line.partition(b" [")
            who, _, words = rest.partition(b"] ")
            name = words.partition(b" ")[0].strip(b'"').decode().lower()
            if name and not who.endswith(own):
                (called if who.endswith(b" lua") else sent)[name] += 1
        return sent, called


class Contestant:
    """One bridge through all of its windows."""

    def __init__(self, bridge: Bridge, run: Run) -> None:
        self._bridge = bridge
        self._run = run
        self._values = defaultdict[str, list[float]](list)
        self._jobs: ShortJobs | None = None
        self._beyond: set[int] = set()
        """The numbers of tokens with which it does not keep up."""
        self._failed = False

    @property
    def figures(self) -> Figures:
        """The median of each figure over the windows."""
        return {name: median(values) for name, values in self._values.items()}

    def close(self) -> None:
        """End all of its processes."""
        jobs, self._jobs = self._jobs, None
        if jobs is not None:
            jobs.__exit__()

    def window(self, do: Callable[[ShortJobs], None]) -> None:
        """Do something with the bridge, which has a core of its own meanwhile. What has failed once is left out."""
        if self._failed:
            return
        try:
            if self._jobs is None:
                self._jobs = ShortJobs(self._bridge).__enter__()
            with self._jobs.rig.apart():
                do(self._jobs)
        except RigFailed as error:
            self._failed = True
            self._run.note(str(error))
            self.close()

    def burst(self, jobs: int, tokens: int, limit: float, *, counts: bool) -> None:
        """Measure so many jobs that come at once."""
        if tokens not in self._beyond:
            self.window(lambda running: self._burst(running, jobs, tokens, limit, counts=counts))

    def _burst(self, running: ShortJobs, jobs: int, tokens: int, limit: float, *, counts: bool) -> None:
        burst = running.burst(jobs, tokens, limit)
        self._show(
            f"{tokens:2} tokens: {burst.rate:,.0f} jobs/s, {burst.cpu:.0f} µs and {burst.redis_cpu:.0f} µs in Redis"
        )
        names = [f"short_{name}_{tokens}" for name in ("rate", "us", "redis_us")]
        if burst.complete and not counts and tokens == USUAL:
            self._values["short_us_first"].append(burst.cpu)
        if burst.complete and counts:
            for name, value in zip(names, (burst.rate, burst.cpu, burst.redis_cpu), strict=True):
                self._values[name].append(value)
        if not burst.complete:
            self._beyond.add(tokens)
            self._values |= {name: [] for name in names} | {names[0]: [burst.rate]}
            done = f"{burst.rate:,.0f}/s in {limit:g} s"
            self._run.note(f"{self._bridge.name} did not keep up with {jobs:,} jobs of {tokens} tokens at once: {done}")
            self.close()  # the next window starts it anew, without the jobs that it has left

    def first_deltas(self, jobs: int) -> None:
        """Measure the time to the first delta of so many jobs that come one after the other."""
        self.window(lambda running: self._first_deltas(running, jobs))

    def _first_deltas(self, running: ShortJobs, jobs: int) -> None:
        latencies = running.first_deltas(jobs)
        for part in (50, 99):
            self._values[f"short_p{part}"].append(percentile(latencies, part))
        self._show(f"first delta p50 {percentile(latencies, 50):.2f} ms, p99 {percentile(latencies, 99):.2f} ms")

    def commands(self) -> None:
        """Count the commands of a job."""
        self.window(self._commands)

    def _commands(self, running: ShortJobs) -> None:
        sent, called = running.commands(_COUNTED, USUAL)
        self._values["short_sent"].append(sent.total() / _COUNTED)
        self._values["short_commands"].append((sent + called).total() / _COUNTED)
        for what, counts in (("sent", sent), ("called by scripts", called)):
            each = ", ".join(f"{name} {count / _COUNTED:.2f}" for name, count in counts.most_common(12))
            self._show(f"commands a job, {what}: {counts.total() / _COUNTED:.1f}: {each}")

    def _show(self, line: str) -> None:
        self._run.show(f"  {self._bridge.name:15} {line}")


def short(bridges: Sequence[Bridge], run: Run) -> dict[str, Figures]:
    """The figures of each bridge. The windows of the bridges alternate."""
    jobs, limit, seconds = (JOBS, _LIMIT, run.seconds) if run.climbs else (JOBS_QUICK, _LIMIT_QUICK, 1.0)
    contestants = {bridge.name: Contestant(bridge, run) for bridge in bridges}
    everyone = contestants.values()
    try:
        for _, each in itertools.product(range(_WINDOWS), everyone):
            each.first_deltas(round(SLOW * seconds))
        for each in everyone:
            each.commands()
        for tokens in TOKENS:
            for window, each in itertools.product(range(1 + _WINDOWS), everyone):
                each.burst(jobs, tokens, limit, counts=window > 0)
    finally:
        for each in everyone:
            each.close()
    return {name: each.figures for name, each in contestants.items()}

"""The reading side: the cost of following many requests in one process, with a blocking XREAD for each, with one XREAD
for all, and with the library's own `Client`.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from board import Board, Count, folder
from measure import TICKS, cpu_of, cpu_of_others, kept_apart, percentile
from rig import ELSE, RigFailed, helper
from scenarios import FAST, TRIES, Figures, Run

from worker.sandbox.embedded_redis import start_redis

LOGS = (100, 1000, 5000)
_SETTLED = 0.5
_PATIENCE = 120.0
_KEPT = 0.97


@dataclass(frozen=True)
class Follower:
    """A way to follow requests. Its process gets the board, the port of Redis and `arguments`."""

    name: str
    what: str
    script: str
    arguments: Callable[[int], list[int]]
    feed: bool
    """Whether the writer publishes to the feed. The figures of the others must not include that cost."""


FOLLOWERS = {
    follower.name: follower
    for follower in (
        Follower("each", "a blocking XREAD for each request", "reader.py", lambda logs: [1, 0, logs, 1], feed=False),
        Follower("shared", "one blocking XREAD for all", "reader.py", lambda logs: [logs, 0, logs, 1], feed=False),
        Follower("follow", "`Client.follow` for each", "reading_client.py", lambda logs: [logs, 0], feed=True),
        Follower("pour", "`Client.pour` for each", "reading_client.py", lambda logs: [logs, 1], feed=True),
    )
}


@dataclass(frozen=True, slots=True)
class _Moment:
    time: int
    written: int
    read: int
    redis: int
    follower: int


class Reading:
    """A Redis with many logs that are written at a steady rate, and a process that follows all of them."""

    def __init__(self, stack: ExitStack, follower: Follower, logs: int) -> None:
        self._stack = stack
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-relay-bench-", dir=folder())))
        self._path = str(place / "board")
        self.board = Board.create(place / "board", logs)
        server = stack.enter_context(start_redis())
        assert server.process is not None, "fakeredis measures nothing"
        self._redis = server.process
        self._port = server.url.rpartition(":")[2].partition("/")[0]
        feed = str(int(follower.feed))
        self._writer = stack.enter_context(helper("reading_writer.py", self._path, self._port, str(logs), feed))
        assert self._writer.stdout is not None
        self._writer.stdout.readline()
        self._pids = {os.getpid(), self._writer.pid, self._redis.pid}
        stack.enter_context(kept_apart([], [self._writer.pid, self._redis.pid]))
        self._follower: subprocess.Popen[bytes] | None = None

    def pace(self, rate: float) -> None:
        """Write so many deltas a second from now on."""
        assert self._writer.stdin is not None
        self._writer.stdin.write(f"pace {rate}\n".encode())
        self._writer.stdin.flush()
        time.sleep(_SETTLED)

    def follow(self, follower: Follower, logs: int) -> None:
        """Start a follower, and wait until it has read all entries so far."""
        arguments = map(str, follower.arguments(logs))
        self._follower = self._stack.enter_context(helper(follower.script, self._path, self._port, *arguments))
        self._stack.enter_context(kept_apart([self._follower.pid], [os.getpid()]))
        self._pids.add(self._follower.pid)
        deadline = time.monotonic() + _PATIENCE
        while self.board[Count.READ] < self.board[Count.WRITTEN]:
            if self._follower.poll() is not None or time.monotonic() > deadline:
                raise RigFailed(f"{follower.name} does not read {logs} logs")
            time.sleep(0.05)
        time.sleep(_SETTLED)

    def window(self, run: Run, what: str) -> tuple[_Moment, _Moment]:
        """The begin and end of the first window in which the machine does nothing else, or of the last try."""
        tries = 0
        while True:
            others = cpu_of_others(self._pids)
            before = self.look()
            time.sleep(run.seconds)
            after = self.look()
            others = cpu_of_others(self._pids) - others
            tries += 1
            is_disturbed = others.total() > ELSE * TICKS * run.seconds
            if is_disturbed and tries < TRIES:
                continue
            if is_disturbed:
                run.note(f"{what}: the machine did something else, which is in the latency")
            return before, after

    def look(self) -> _Moment:
        """The counts so far."""
        return _Moment(
            time.monotonic_ns(), self.board[Count.WRITTEN], self.board[Count.READ], cpu_of(self._redis.pid),
            cpu_of(self._follower.pid) if self._follower else 0,
        )  # fmt: skip


def reading(follower: Follower, run: Run) -> Figures:
    """CPU of the follower and of Redis for a delta that arrives, and latency, at 20,000 deltas/s of all together.

    What Redis spends on the writes themselves, without the feed, is measured beforehand and taken off.
    """
    figures: Figures = {}
    for logs in LOGS:
        with ExitStack() as stack:
            plain = Reading(stack, FOLLOWERS["each"], logs)
            plain.pace(FAST)
            before, after = plain.window(run, f"{logs:,} logs that nobody reads")
            written = (after.redis - before.redis) / 1e3 / max(1, after.written - before.written)
        with ExitStack() as stack:
            rig = Reading(stack, follower, logs)
            rig.pace(logs)  # about one delta each, so that every log has been read once
            rig.pace(0)
            rig.follow(follower, logs)
            rig.pace(FAST)
            before, after = rig.window(run, f"{follower.name} of {logs:,}")
            samples = rig.board.samples(before.read)
            latencies = [sample.latency / 1e6 for sample in samples if sample.arrived <= after.time]
            _tell(figures, run, follower, logs, (before, after), written, latencies)
            figures["stray"] = (figures.get("stray") or 0) + rig.board[Count.STRAY]
    return figures


def _tell(
    figures: Figures, run: Run, follower: Follower, logs: int, window: tuple[_Moment, _Moment], written: float,
    latencies: list[float],
) -> None:  # fmt: skip
    before, after = window
    read = max(1, after.read - before.read)
    own, redis = (after.follower - before.follower) / 1e3 / read, (after.redis - before.redis) / 1e3 / read - written
    figures[f"read_us_{logs}"], figures[f"read_redis_us_{logs}"] = own + redis, redis
    figures[f"read_p50_{logs}"], figures[f"read_p99_{logs}"] = percentile(latencies, 50), percentile(latencies, 99)
    rate = read * 1e9 / (after.time - before.time)
    run.show(
        f"  {logs:,} followed: {rate:,.0f}/s read, {own:.1f} µs here and {redis:.1f} µs in Redis each, "
        f"p50 {figures[f'read_p50_{logs}']:.2f} ms, p99 {figures[f'read_p99_{logs}']:.2f} ms"
    )
    if rate < _KEPT * FAST:
        run.note(f"{follower.name} of {logs:,}: {rate:,.0f}/s were read")

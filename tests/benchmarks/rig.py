"""One bridge at work, between a load generator and a Redis of its own, with a reader of some of its logs."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from board import Board, Count, folder
from bridge import Bridge
from chunks import MODEL
from measure import TICKS, cpu_of, cpu_of_others, kept_apart, percentile, redis_state, resident, undisturbed
from reader import key_of
from redis import Redis

from worker.sandbox.embedded_redis import start_redis

_HERE = Path(__file__).parent
_OF_AN_XREAD = 4
"""Logs in one XREAD of the reader. More of them would cost Redis more for each delta."""
_PATIENCE = 120.0
_SETTLED = 0.5
_ON_TIME = 0.99
_IDLE = 0.2
"""The part of a core that a bridge may need for streams that are open and silent."""
_PROBES = 10
"""More XADDs than an idle worker sends meanwhile: it probes whether Redis accepts writes."""
_SAMPLE_TRIES = 200
_AT_ONCE = 10_000_000
"""Nanoseconds within which all counts of a sample must be read; otherwise they are read again. On a full core this
process may have to wait between two of them, and then the count of Redis is older than that of the load generator."""
ELSE = 0.016
"""The part of a core that other processes may take; the kernel's own upkeep takes half of it."""
_KEPT = 0.97
"""A bridge keeps a rate when it brings this part of it within the window."""


class RigFailed(RuntimeError):
    """A condition did not come true in time, or a process has ended."""


@dataclass(frozen=True, slots=True)
class Window:
    """The figures of some seconds of steady load. Times are in microseconds, latencies in milliseconds."""

    seconds: float
    rate: float
    written: int
    replied: int
    late: int
    cpu: float
    redis_cpu: float
    load_cpu: float
    reader_cpu: float
    """Of these four: the part of a core."""
    p50: float
    p99: float
    memory: int
    """The growth of Redis's memory, in bytes."""
    others_cpu: float
    """The part of a core that everything else on the machine took."""

    @property
    def paced(self) -> bool:
        """Whether the load generator wrote as much as it should have."""
        return self.written >= _KEPT * self.rate * self.seconds

    @property
    def on_time(self) -> bool:
        """Whether it wrote each token when it was due: latencies are valid only then."""
        return self.paced and self.late <= (1 - _ON_TIME) * self.written

    @property
    def disturbed(self) -> bool:
        """Whether the machine did something else too, which then is most of the p99."""
        return self.others_cpu > ELSE

    @property
    def kept(self) -> bool:
        """Whether the bridge kept up with the load generator."""
        return self.replied >= _KEPT * self.written

    @property
    def cpu_us(self) -> float:
        """CPU of the bridge for a delta, in microseconds."""
        return self.cpu * self.seconds * 1e6 / max(1, self.replied)

    @property
    def redis_us(self) -> float:
        """CPU of Redis for a delta, in microseconds."""
        return self.redis_cpu * self.seconds * 1e6 / max(1, self.replied)


class Rig:
    """Everything that runs for one bridge. At most `streams` may be open; those in `followed` are read back."""

    def __init__(self, bridge: Bridge, *, streams: int, followed: range = range(0)) -> None:
        self._bridge = bridge
        self._streams = streams
        self._followed = followed
        self._rate = 0.0
        self._enqueued = 0
        self._stack = ExitStack()
        self.others: list[int] = []
        """The processes around the bridge, which come before everything else on the machine."""

    @property
    def name(self) -> str:
        """The name of the bridge."""
        return self._bridge.name

    @property
    def bridge_pid(self) -> int:
        """The bridge's process id."""
        return self._process.pid

    @property
    def redis_pid(self) -> int:
        """The process id of its Redis."""
        return self._redis_process.pid

    @property
    def opened(self) -> int:
        """How many streams were opened."""
        return self._enqueued

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-relay-bench-", dir=folder())))
        self.board = Board.create(place / "board", self._streams)
        server = self._stack.enter_context(start_redis())
        assert server.process is not None, "fakeredis measures nothing"
        self._redis_process = server.process
        self.redis = self._stack.enter_context(Redis.from_url(server.url, protocol=2))
        self.redis_port = port = int(server.url.rpartition(":")[2].partition("/")[0])
        board = str(place / "board")
        self._load = self._stack.enter_context(helper("load.py", board))
        assert self._load.stdout is not None
        vllm = int(self._load.stdout.readline())
        followed = self._followed
        which = map(str, (_OF_AN_XREAD, followed.start, followed.stop, followed.step))
        self._reader = self._stack.enter_context(helper("reader.py", board, str(port), *which))
        self._log = place / "bridge.log"
        self._process = self._stack.enter_context(self._bridge.running(vllm, port, self._log))
        self.others = [process.pid for process in (self._load, self._reader, self._redis_process)]

    def open(self, count: int) -> None:
        """Open so many more streams."""
        first, self._enqueued = self._enqueued, self._enqueued + count
        if self._bridge.by_lines:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{first} {count}\n".encode())
            self._process.stdin.flush()
        else:
            pipe = self.redis.pipeline(transaction=False)
            for number in range(first, self._enqueued):
                pipe.xadd("chat:jobs", {"v": "1", "id": f"r{number}", "request": _request(number)})
            pipe.execute()
        self._until(lambda: self.board[Count.OPENED] >= self._enqueued, f"{self._enqueued} streams are open")
        self._quiet()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Meanwhile the bridge has a core of its own, and nothing else of the machine comes before it or the load.

        So every bridge is measured in the same place. Otherwise the kernel runs a bridge on the core of the load
        generator for some minutes and elsewhere for others, and the cost of waking it comes and goes with that: more
        than half of the CPU of the floor. This process, which queries Redis and reads /proc, runs on another core too.
        """
        pid, others = self.bridge_pid, self.others
        with kept_apart([pid], [*others, os.getpid()]), undisturbed(pid, others):
            yield

    def pace(self, rate: float, together: int = 1) -> None:
        """Write so many tokens a second from now on, so many of a stream at once."""
        self._rate = rate
        self._send(f"pace {rate} {together}")

    def window(self, seconds: float) -> Window:
        """Watch the load for some seconds."""
        first = self.board[Count.READ]
        ours = {os.getpid(), self.bridge_pid, *self.others}
        others = cpu_of_others(ours)  # outside of the window at both ends, since it takes 10 ms
        before = self._sample()
        time.sleep(seconds)
        after = self._sample()
        others = cpu_of_others(ours) - others
        latencies = [
            sample.latency / 1e6 for sample in self.board.samples(first) if before.time <= sample.arrived <= after.time
        ]
        took = (after.time - before.time) / 1e9
        load, reader, redis, bridge = (
            (last - old) / (after.time - before.time) for old, last in zip(before.cpu, after.cpu, strict=True)
        )
        return Window(
            seconds=took, rate=self._rate, written=after.written - before.written, replied=after.added - before.added,
            late=after.late - before.late, cpu=bridge, redis_cpu=redis, load_cpu=load, reader_cpu=reader,
            p50=percentile(latencies, 50), p99=percentile(latencies, 99), memory=after.memory - before.memory,
            others_cpu=others.total() / TICKS / took,
        )  # fmt: skip

    def steady(self, rate: float, seconds: float, together: int = 1) -> Window:
        """A window at a rate, after it has settled."""
        self.pace(rate, together)
        time.sleep(_SETTLED)
        return self.window(seconds)

    def warmed_up(self, rate: float, seconds: float) -> None:
        """Write at a rate for some seconds. No window then has what a bridge loads or connects at its first tokens."""
        self.pace(rate)
        time.sleep(seconds)
        self.drained()

    def drained(self) -> None:
        """Stop writing, and wait until all tokens are in Redis."""
        self.pace(0)
        self._quiet()

    def _quiet(self) -> None:
        """Wait until the bridge is idle."""
        deadline = time.monotonic() + _PATIENCE
        before = self._sample()
        while True:
            time.sleep(_SETTLED)
            after = self._sample()
            busy = (after.cpu[-1] - before.cpu[-1]) / (after.time - before.time)
            if after.added - before.added < _PROBES and busy < _IDLE:
                return
            if time.monotonic() > deadline:
                raise RigFailed(f"{self._bridge.name} is still busy after {_PATIENCE:g} s{self._output()}")
            before = after

    def missing(self) -> int:
        """How many of the written tokens have no entry in the logs. Call `drained` before."""
        pipe = self.redis.pipeline(transaction=False)
        for number in range(self._enqueued):
            pipe.xlen(key_of(number))
        entries = sum(pipe.execute()) - self._enqueued * self._bridge.first_entries
        return int(self.board[Count.WRITTEN] - entries)

    def end(self) -> None:
        """End every stream."""
        self._send("end")

    def cpu_now(self) -> int:
        """CPU that the bridge has used, in nanoseconds."""
        self.check()
        return cpu_of(self.bridge_pid)

    def memory_now(self) -> int:
        """Resident memory of the bridge, in bytes."""
        return resident(self.bridge_pid)

    def bytes_of_a_delta(self) -> float:
        """Bytes of Redis's memory for an entry of all logs."""
        used = entries = 0
        for number in range(self._enqueued):
            used += self.redis.memory_usage(key_of(number), samples=0) or 0
            entries += self.redis.xlen(key_of(number))
        return used / max(1, entries)

    def _sample(self) -> "_Moment":
        self.check()
        processes = (self._load, self._reader, self._redis_process, self._process)
        for _ in range(_SAMPLE_TRIES):
            began = time.monotonic_ns()
            state = redis_state(self.redis)
            moment = _Moment(
                time=time.monotonic_ns(), written=self.board[Count.WRITTEN], late=self.board[Count.LATE],
                added=state.added, memory=state.memory, cpu=[cpu_of(process.pid) for process in processes],
            )  # fmt: skip
            if time.monotonic_ns() - began < _AT_ONCE:
                return moment
        raise RigFailed(f"{self.name}: this process gets too little CPU time to read the counts")

    def _send(self, line: str) -> None:
        assert self._load.stdin is not None
        self._load.stdin.write(f"{line}\n".encode())
        self._load.stdin.flush()

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise RigFailed(f"{self._bridge.name}: not within {_PATIENCE:g} s: {what}{self._output()}")
            time.sleep(0.01)

    def check(self) -> None:
        """Raise an error if a process has ended."""
        for name, process in (("load", self._load), ("reader", self._reader), (self._bridge.name, self._process)):
            if process.poll() is not None:
                raise RigFailed(f"{name} has ended with status {process.returncode}{self._output()}")

    def _output(self) -> str:
        text = self._log.read_text(errors="replace")[-2000:]
        return f"; its output:\n{text}" if text else ""


@dataclass(frozen=True, slots=True)
class _Moment:
    time: int
    written: int
    late: int
    added: int
    memory: int
    cpu: list[int]


def _request(number: int) -> str:
    messages = [{"role": "user", "content": f"stream {number}"}]
    return json.dumps({"model": MODEL, "messages": messages})


@contextmanager
def helper(script: str, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    """A process of ours that ends with its standard input."""
    command = [sys.executable, str(_HERE / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(_HERE.parents[1])}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

"""The HTTP side: what a delivered event costs in the gateway, and how long its way takes.

As many followers read the same logs from each server. The floor makes its bytes up and reads no Redis.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

import psutil
from edge_browser import opened_in_chromium
from measure import TICKS, cpu_of, cpu_of_others, kept_apart, median, percentile, resident, undisturbed
from redis import Redis
from rig import ELSE, RigFailed, helper
from scenarios import FAST, TRIES, Figures, Run

from worker.sandbox.embedded_redis import free_port, start_redis

OF_A_LOG = 10
"""Followers of each log."""
LOGS, LOGS_QUICK = 200, 40
STEADY = FAST // 2
"""Events a second of all followers together while CPU is compared. Starlette does not hold many more."""
LATE = 10_000
"""Tokens of the answer that is opened late."""
_OPENINGS = 7
_CALLS, _CALLS_QUICK = 200, 60
_WARM = 20
_SETTLED = 1.0
_PAIRS = 5
"""Windows of the gateway and of the raw socket while CPU is compared. They alternate: what a core gives changes within
seconds where other programs run."""
_PAIR_SECONDS = 1.0
_PATIENCE = 60.0
_ROOT = Path(__file__).parents[2]
_Process: TypeAlias = "subprocess.Popen[bytes]"


@dataclass(frozen=True)
class EdgeServer:
    """A server of events. `start` gets the port of Redis and the number of logs."""

    name: str
    what: str
    start: Callable[[int, int], AbstractContextManager["RunningServer"]]
    reads_redis: bool = True


@dataclass(frozen=True)
class RunningServer:
    """A server that has started, at its port."""

    process: _Process
    port: int

    @property
    def pids(self) -> list[int]:
        process = psutil.Process(self.process.pid)
        return [process.pid, *(child.pid for child in process.children(recursive=True))]

    @property
    def cpu(self) -> int:
        """CPU so far, in nanoseconds."""
        return sum(map(cpu_of, self.pids))

    @property
    def memory(self) -> int:
        """Resident memory, in bytes."""
        return sum(map(resident, self.pids))


@contextmanager
def _program(*arguments: str, **environment: str) -> Iterator[_Process]:
    """The command `worker`, which gets SIGTERM at the end."""
    command = [sys.executable, "-m", "worker", *arguments]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(_ROOT)} | environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def gateway_of(redis: int, _logs: int = 0) -> Iterator[RunningServer]:
    """The gateway, as it runs by its defaults, but without a key and a log of requests."""
    port = free_port()
    settings = {"LISTEN": f"127.0.0.1:{port}", "NO_AUTH": "true", "ACCESS_LOG": "false", "DRAIN_DELAY": "0"}
    settings |= {"DRAIN_TIMEOUT": "0"}
    variables = {f"GATEWAY_{name}": value for name, value in settings.items()}
    with _program("gateway", REDIS_URL=f"redis://127.0.0.1:{redis}/0", **variables) as process:
        _wait(lambda: _status(port, "/readyz") == 200, "the gateway does not start")
        yield RunningServer(process, port)


@contextmanager
def _floor_of(_redis: int, logs: int) -> Iterator[RunningServer]:
    with helper("edge_floor.py", str(logs)) as process:
        yield RunningServer(process, int(_line(process)))


@contextmanager
def _straightforward_of(redis: int, _logs: int) -> Iterator[RunningServer]:
    with helper("edge_straightforward.py", str(redis)) as process:
        yield RunningServer(process, int(_line(process)))


SERVERS = {
    server.name: server
    for server in (
        EdgeServer("xread", "Starlette's StreamingResponse over an XREAD for each follower", _straightforward_of),
        EdgeServer("gateway", "`worker gateway`", gateway_of),
        EdgeServer("raw", "a uvloop socket for each follower; reads no Redis", _floor_of, reads_redis=False),
    )
}


@dataclass
class _Window:
    """Some seconds of steady load."""

    rate: float
    cpu_us: float
    latencies: list[float] = field(default_factory=list)
    """In milliseconds."""


class EdgeRig:
    """A Redis whose logs are written at a steady rate, a server, and followers of the logs."""

    def __init__(self, stack: ExitStack, server: EdgeServer, logs: int) -> None:
        self._stack = stack
        self._logs = logs
        redis = stack.enter_context(start_redis())
        assert redis.process is not None, "fakeredis measures nothing"
        self.redis_port = int(redis.url.rpartition(":")[2].partition("/")[0])
        self.commands = stack.enter_context(Redis(port=self.redis_port, protocol=2))
        self.writer = stack.enter_context(helper("edge_writer.py", str(self.redis_port), str(logs)))
        _line(self.writer)
        self._connected_before = self.connections
        self.server = stack.enter_context(server.start(self.redis_port, logs))
        self._paced = self.writer if server.reads_redis else self.server.process
        self._others = [os.getpid(), self.writer.pid, redis.process.pid]
        self._reader: _Process | None = None
        self.idle = 0
        """Memory of the server before the followers came, in bytes."""

    @property
    def connections(self) -> int:
        """How many connections Redis has, pub/sub included."""
        return len(self.commands.client_list())

    @property
    def server_connections(self) -> int:
        """How many of them are the server's."""
        return self.connections - self._connected_before

    def follow(self, followers: int) -> None:
        """Connect the followers, and wait until all have the head of their response."""
        # The first streams take memory that all share, and `idle` has it.
        with helper("edge_reader.py", str(self.server.port), str(_WARM), str(self._logs)) as warming:
            _line(warming)
        time.sleep(_SETTLED)
        self.idle = self.server.memory
        arguments = (str(self.server.port), str(followers), str(self._logs))
        self._reader = self._stack.enter_context(helper("edge_reader.py", *arguments))
        _line(self._reader)
        self._others.append(self._reader.pid)
        self._stack.enter_context(kept_apart(self.server.pids, self._others))
        time.sleep(_SETTLED)

    def pace(self, events: float) -> None:
        """Let so many events a second be delivered to all followers together."""
        tell(self._paced, f"pace {events / OF_A_LOG}")
        time.sleep(_SETTLED)

    def steady(self, events: float, seconds: float) -> _Window:
        """A window at so many events a second. Before and after it nothing is delivered."""
        with undisturbed(self.server.process.pid, self._others):
            self.pace(events)
            self.look()
            before = self.look()
            time.sleep(seconds)
            after = self.look()
        tell(self._paced, "pace 0")
        rate = (after.events - before.events) * 1e9 / (after.time - before.time)
        cpu = (after.cpu - before.cpu) / (after.cpu_time - before.cpu_time)
        return _Window(rate, cpu * 1e6 / max(1.0, rate), [each / 1e6 for each in after.latencies])

    def fair(self, events: float, run: Run, what: str) -> _Window:
        """The first such window in which the machine does nothing else, or the last of some tries."""
        tries = 0
        while True:
            ours = {*self._others, *self.server.pids}
            others, began = cpu_of_others(ours), time.monotonic()
            window = self.steady(events, run.seconds)
            spent = (cpu_of_others(ours) - others).total() / TICKS / (time.monotonic() - began)
            tries += 1
            if spent <= ELSE:
                return window
            if tries == TRIES or not run.climbs:
                run.note(f"{what}: the machine did something else, which is in the latency")
                return window

    def look(self) -> "EdgeCounts":
        """The counts so far."""
        assert self._reader is not None
        cpu, cpu_time = self.server.cpu, time.monotonic_ns()
        counts = json.loads(tell(self._reader, "look"))
        return EdgeCounts(cpu_time, cpu, counts["time"], counts["events"], counts["latencies"])


@dataclass(frozen=True)
class EdgeCounts:
    """Counts at two moments; times are in nanoseconds."""

    cpu_time: int
    cpu: int
    """Of the server."""
    time: int
    events: int
    """That all followers have."""
    latencies: list[int]
    """Of a sample of the events since the look before."""


def edge(run: Run) -> dict[str, Figures]:
    """CPU for a delivered event of each server; of the gateway all other figures too."""
    figures: dict[str, Figures] = {name: {} for name in SERVERS}
    for names in (("xread",), ("gateway", "raw")):
        try:
            with ExitStack() as stack:
                _delivered(stack, run, {name: figures[name] for name in names})
        except RigFailed as error:
            run.note(str(error))
    figures["gateway"] |= opened_late(run) | first_token(run)
    return figures


def _delivered(stack: ExitStack, run: Run, figures: dict[str, Figures]) -> None:
    """The figures of delivered events of some servers, whose windows alternate."""
    logs = LOGS if run.climbs else LOGS_QUICK
    rigs = {name: EdgeRig(stack, SERVERS[name], logs) for name in figures}
    for name, rig in rigs.items():
        rig.follow(logs * OF_A_LOG)
        figures[name]["edge_kib"] = (rig.server.memory - rig.idle) / 1024 / (logs * OF_A_LOG)
        if SERVERS[name].reads_redis:
            figures[name]["edge_connections"] = float(rig.server_connections)
    rounds = [{name: rig.steady(STEADY, _PAIR_SECONDS) for name, rig in rigs.items()} for _ in range(_PAIRS)]
    for name in rigs:
        figures[name]["edge_us"] = median([each[name].cpu_us for each in rounds])
        figures[name]["edge_rate"] = median([each[name].rate for each in rounds])
        if "raw" in rigs:
            ratios = [each[name].cpu_us / each["raw"].cpu_us for each in rounds]
            figures[name]["edge_ratio"] = median(ratios)
            run.show(f"  {name}: {', '.join(f'{ratio:.2f}' for ratio in ratios)} of raw's CPU")
        run.show(f"  {name}: {figures[name]['edge_rate']:,.0f} events/s, {figures[name]['edge_us']:.1f} µs each")
    for name, rig in rigs.items():
        if name != "xread":
            window = rig.fair(FAST, run, f"{name} at {FAST:,}/s")
            figures[name] |= {f"edge_p{part}": percentile(window.latencies, part) for part in (50, 99)}
            run.show(f"  {name}: {window.rate:,.0f} events/s, p99 {figures[name]['edge_p99']:.2f} ms")


def opened_late(run: Run) -> Figures:
    """Time to all of a long answer that has ended, and the number of its events."""
    with ExitStack() as stack:
        rig = EdgeRig(stack, SERVERS["gateway"], 1)
        tell(rig.writer, f"long late {LATE}")
        found = [_read_events(rig.server.port, "late") for _ in range(_OPENINGS)]
        in_browser = opened_in_chromium(run, rig.server.port, "late", LATE)
    times, events, deltas = zip(*found, strict=True)
    if set(deltas) != {LATE}:
        raise RigFailed(f"a late reader got {deltas} of {LATE:,} tokens")
    figures: Figures = {"edge_late_ms": percentile(times, 50), "edge_late_frames": float(events[0])}
    run.show(f"  {LATE:,} tokens opened late: {figures['edge_late_ms']:.0f} ms, {events[0]} frames")
    return figures | in_browser


def first_token(run: Run) -> Figures:
    """Time to the first token of a chat completion, of the server itself and through gateway, queue and worker."""
    calls = _CALLS if run.climbs else _CALLS_QUICK
    times: dict[str, list[float]] = {"direct": [], "relayed": []}
    with ExitStack() as stack:
        redis = stack.enter_context(start_redis())
        url = redis.url
        port = free_port()
        stack.enter_context(_program("simulate", "--port", str(port), "--rate", "1000"))
        _wait(lambda: _status(port, "/health") == 200, "the simulated vLLM does not start")
        vllm = f"http://127.0.0.1:{port}"
        stack.enter_context(_program("run", REDIS_URL=url, VLLM_URLS=vllm, WORKER_LOG_LEVEL="error"))
        relay = stack.enter_context(gateway_of(int(url.rpartition(":")[2].partition("/")[0])))
        ways = {"direct": port, "relayed": relay.port}
        connections = {
            name: http.client.HTTPConnection("127.0.0.1", at, timeout=_PATIENCE) for name, at in ways.items()
        }
        for number in range(-_WARM, calls):
            for name, connection in connections.items():
                _time_to_first_token(connection, f"Warm up for {number} of {name}")
                taken = _time_to_first_token(connection, f"Tell me {number} for {name}")
                if number >= 0:
                    times[name].append(taken)
    figures: Figures = {f"edge_ttft_{name}": percentile(taken, 50) for name, taken in times.items()}
    figures["edge_ttft_added"] = percentile(times["relayed"], 50) - percentile(times["direct"], 50)
    run.show(
        f"  first token: {figures['edge_ttft_direct']:.2f} ms, + {figures['edge_ttft_added']:.2f} ms by the gateway"
    )
    return figures


def _time_to_first_token(connection: http.client.HTTPConnection, question: str) -> float:
    """Milliseconds to the first chunk with text. The answer is read to its end."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 4}
    began = time.monotonic_ns()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    taken = 0.0
    for line in response:
        if not taken and b'"content":"' in line and b'"content":""' not in line:
            taken = (time.monotonic_ns() - began) / 1e6
    if not taken:
        raise RigFailed(f"no token came, with status {response.status}")
    return taken


def _read_events(port: int, request_id: str) -> tuple[float, int, int]:
    """Milliseconds to the end of a log, its events, and its deltas."""
    began = time.monotonic_ns()
    with socket.create_connection(("127.0.0.1", port), _PATIENCE) as peer:
        peer.sendall(f"GET /requests/{request_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        whole = bytearray()
        while b'"type":"done"' not in whole[-4096:]:
            piece = peer.recv(1 << 20)
            if not piece:
                raise RigFailed("the stream ended too early")
            whole += piece
        taken = (time.monotonic_ns() - began) / 1e6
    return taken, whole.count(b"\ndata: "), whole.count(b'"type":"delta"')


def tell(process: _Process, line: str) -> str:
    """Send a line to a helper, and return its answer."""
    assert process.stdin is not None
    process.stdin.write(f"{line}\n".encode())
    process.stdin.flush()
    return _line(process)


def _line(process: _Process) -> str:
    output: IO[bytes] | None = process.stdout
    assert output is not None
    line = output.readline().decode()
    if not line:
        raise RigFailed("a helper has ended")
    return line


def _wait(condition: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise RigFailed(failure)
        time.sleep(0.02)


def _status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()

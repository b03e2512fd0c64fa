"""The results of a run, for people and for programs: medians, ratios beside their targets, and the machine."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from measure import median
from scenarios import Figures

from worker.sandbox.embedded_redis import find_servers, version_of

BRIDGES = ("straightforward", "node", "ours", "floor")
READERS = ("each", "shared", "follow", "pour")
EDGE = ("xread", "gateway", "raw")
_HOT = (
    ("highest_rate", "highest rate at p99 ≤ 5 ms, deltas/s", 0),
    ("cpu_us_5000", "CPU per delta at 5,000/s, µs", 1),
    ("cpu_us_20000", "CPU per delta at 20,000/s, µs", 1),
    ("cpu_us_coalesced", "CPU per delta, 20 in a write, µs", 1),
    ("rate_coalesced", "rate, 20 in a write and 100,000/s offered", 0),
    ("p50_5000", "added latency at 5,000/s, p50, ms", 2),
    ("p99_5000", "p99, ms", 2),
    ("p50_20000", "added latency at 20,000/s, p50, ms", 2),
    ("p99_20000", "p99, ms", 2),
    ("redis_us_20000", "Redis CPU per delta at 20,000/s, µs", 1),
    ("redis_bytes", "Redis memory per delta, bytes", 1),
    ("memory_kib", "memory per open stream, KiB", 1),
    ("open_ms_0", "CPU to open a stream among 0, ms", 2),
    ("open_ms_1000", "among 1,000, ms", 2),
    ("open_ms_3000", "among 3,000, ms", 2),
    ("cpu_us_streams_1", "CPU per delta, 1 stream at 20,000/s, µs", 1),
    ("cpu_us_streams_64", "64 streams, µs", 1),
    ("cpu_us_streams_512", "512 streams, µs", 1),
    ("cpu_us_streams_3000", "3,000 streams, µs", 1),
    ("missing", "tokens without an entry", 0),
    ("stray", "entries out of order, in the logs followed", 0),
)
_READING = (
    *(
        row
        for logs in (100, 1000, 5000)
        for row in (
            (f"read_us_{logs}", f"CPU per delta of {logs:,} followed, reader and Redis, µs", 1),
            (f"read_redis_us_{logs}", "of this Redis, µs", 1),
            (f"read_p50_{logs}", "latency, p50, ms", 2),
            (f"read_p99_{logs}", "p99, ms", 2),
        )
    ),
    ("stray", "entries out of order", 0),
)
_SHORT = (
    ("short_rate_1", "jobs of 1 token, all at once, jobs/s", 0),
    ("short_us_1", "CPU per job, µs", 0),
    ("short_redis_us_1", "Redis CPU per job, µs", 0),
    ("short_rate_10", "jobs of 10 tokens, jobs/s", 0),
    ("short_us_10", "CPU per job, µs", 0),
    ("short_us_first", "CPU per job among the first, µs", 0),
    ("short_redis_us_10", "Redis CPU per job, µs", 0),
    ("short_sent", "Redis commands per job, sent", 1),
    ("short_commands", "Redis commands per job, with those that scripts call", 1),
    ("short_rate_50", "jobs of 50 tokens, jobs/s", 0),
    ("short_us_50", "CPU per job, µs", 0),
    ("short_redis_us_50", "Redis CPU per job, µs", 0),
    ("short_p50", "XADD of a job to its first delta at 50 jobs/s, p50, ms", 2),
    ("short_p99", "p99, ms", 2),
)
_EDGE = (
    ("edge_us", "CPU per delivered event at 10,000/s, µs", 1),
    ("edge_ratio", "as a multiple of the raw socket's", 2),
    ("edge_kib", "memory per idle stream, KiB", 1),
    ("edge_connections", "connections to Redis", 0),
    ("edge_p50", "XADD to the follower's socket at 20,000/s, p50, ms", 2),
    ("edge_p99", "p99, ms", 2),
    ("edge_late_ms", "10,000 tokens opened late, ms", 0),
    ("edge_late_frames", "frames of them", 0),
    ("edge_browser_ms", "the same in Chromium, ms", 0),
    ("edge_browser_frames", "frames of them there", 0),
    ("edge_ttft_direct", "time to first token of the server itself, p50, ms", 2),
    ("edge_ttft_relayed", "through gateway, queue and worker, p50, ms", 2),
    ("edge_ttft_added", "which adds, ms", 2),
)


class Machine(msgspec.Struct, frozen=True):
    """The machine and the date of a run."""

    date: str
    cpu: str
    cores: int
    system: str
    redis: str
    python: str
    node: str

    @property
    def line(self) -> str:
        """The machine in one line, for people."""
        node = f", Node {self.node}" if self.node else ""
        programs = f"Redis {self.redis}, Python {self.python}{node}"
        return f"{self.date}: {self.cpu}, {self.cores} cores, {self.system}, {programs}"


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and its target.

    It is the figure itself, or its ratio in each round to the best of `others`, or to the figure `of` the same one.
    """

    what: str
    figure: str
    reach: float
    others: tuple[str, ...] = ()
    of: str = ""
    at_least: bool = False
    whose: str = "ours"
    by_time: bool = False
    """Whether other programs on the machine can spoil even the ratio."""
    tolerated: float = 2.0
    """By which factor one short round may miss the target, before `--quick` fails."""

    def measured(self, rounds: Sequence[dict[str, Figures]]) -> float | None:
        """The median over the rounds."""
        return median([self._in(figures) for figures in rounds])

    @property
    def is_ratio(self) -> bool:
        return bool(self.others or self.of)

    def _in(self, figures: dict[str, Figures]) -> float | None:
        value = figures.get(self.whose, {}).get(self.figure)
        if not self.is_ratio or value is None:
            return value
        known = (figures.get(other, {}).get(self.of or self.figure) for other in self.others or (self.whose,))
        there = [other for other in known if other]
        return value / (max(there) if self.at_least else min(there)) if there else None

    def reached(self, value: float) -> bool:
        return value >= self.reach if self.at_least else value <= self.reach

    def gross(self, value: float) -> bool:
        """Whether it is a ratio, not of time alone, that misses its target by more than is tolerated."""
        bound = self.reach / self.tolerated if self.at_least else self.reach * self.tolerated
        return self.is_ratio and not self.by_time and (value < bound if self.at_least else value > bound)


_PLAIN, _NODE, _FLOOR = ("straightforward",), ("node",), ("floor",)
TARGETS = (
    Target("highest rate, against straightforward", "highest_rate", 9, _PLAIN, at_least=True),
    Target("highest rate, against node", "highest_rate", 1.5, _NODE, at_least=True),
    Target("CPU per delta at 20,000/s, against the floor", "cpu_us_20000", 2, _FLOOR),
    Target("CPU per delta at 20,000/s, against node", "cpu_us_20000", 0.75, _NODE),
    Target("CPU per delta, 20 in a write, against straightforward", "cpu_us_coalesced", 1 / 15, _PLAIN),
    Target("added latency at 5,000/s, p50, ms", "p50_5000", 0.3),
    Target("added latency at 5,000/s, p99, ms", "p99_5000", 3),
    Target("CPU to open a stream among 3,000, ms", "open_ms_3000", 0.5),
    Target("Redis memory per delta, bytes", "redis_bytes", 45),
    Target("memory per open stream, KiB", "memory_kib", 25),
    Target("CPU per delta, 3,000 streams against 512", "cpu_us_streams_3000", 1.5, of="cpu_us_streams_512"),
    Target("CPU per job of 10 tokens, against node", "short_us_10", 1.2, _NODE, tolerated=3),  # not reached yet
    Target("Redis CPU per job of 10 tokens, against node", "short_redis_us_10", 2.5, _NODE, tolerated=3),  # nor is this
    Target("Redis commands per job of 10 tokens, sent", "short_sent", 20),
    Target("jobs/s of 10 tokens, against node", "short_rate_10", 0.8, _NODE, at_least=True, by_time=True),
    Target("XADD of a job to its first delta, p50, against node", "short_p50", 1.2, _NODE, by_time=True),
    *(
        target
        for logs in (100, 1000, 5000)
        for target in (
            Target(
                f"CPU per delta of {logs:,} followed by pour, against the better XREAD", f"read_us_{logs}", 1 / 3,
                ("each", "shared"), whose="pour",
            ),
            Target(f"latency of {logs:,} followed by pour, p99, ms", f"read_p99_{logs}", 2, whose="pour"),
        )
    ),
    Target("CPU per delivered event, against a raw socket", "edge_ratio", 1.4, ("raw",), whose="gateway"),
    Target("CPU per delivered event, against XREADs", "edge_us", 0.6, ("xread",), whose="gateway"),
    Target("memory per idle stream, KiB", "edge_kib", 12, whose="gateway"),
    Target("XADD to the follower's socket at 20,000/s, p99, ms", "edge_p99", 3, whose="gateway"),
    Target("connections to Redis", "edge_connections", 10, whose="gateway"),
    Target("10,000 tokens opened late, ms", "edge_late_ms", 100, whose="gateway"),
    Target("10,000 tokens opened late, frames", "edge_late_frames", 20, whose="gateway"),
    Target("10,000 tokens opened late in Chromium, ms", "edge_browser_ms", 100, whose="gateway"),
    Target("10,000 tokens opened late in Chromium, frames", "edge_browser_frames", 20, whose="gateway"),
    Target("time to first token that the gateway adds, p50, ms", "edge_ttft_added", 3, whose="gateway"),
)  # fmt: skip


class Report(msgspec.Struct, kw_only=True):
    """A whole run. `rounds` has the figures of each round by bridge, `ratios` are the medians of `TARGETS`."""

    machine: Machine
    bridges: dict[str, str]
    rounds: list[dict[str, Figures]]
    notes: list[str]
    medians: dict[str, Figures] = msgspec.field(default_factory=dict)
    ratios: dict[str, float | None] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.medians = {
            name: {
                figure: median([figures.get(name, {}).get(figure) for figures in self.rounds])
                for figure, _, _ in _HOT + _SHORT + _READING + _EDGE
            }
            for name in self.bridges
        }
        self.ratios = {target.what: target.measured(self.rounds) for target in TARGETS}

    @property
    def table(self) -> str:
        """The medians of all bridges, the ratios beside their targets, and the notes, as Markdown."""
        ratios = [
            [target.what, _number(value, 2), _bound(target), "yes" if target.reached(value) else "no"]
            for target in TARGETS
            if (value := self.ratios[target.what]) is not None
        ]
        kinds = [f"- {name}: {what}" for name, what in self.bridges.items()]
        return "\n".join([
            f"{self.machine.line}; medians of {len(self.rounds)} rounds", "",
            *kinds, "",
            *self._figures(BRIDGES, _HOT), *self._figures(BRIDGES, _SHORT),
            *self._figures(READERS, _READING), *self._figures(EDGE, _EDGE),
            *([*_table(["figure of ours", "measured", "to reach", "reached"], ratios), ""] if ratios else []),
            *(f"- {note}" for note in self.notes),
        ])  # fmt: skip

    def _figures(self, columns: Sequence[str], rows: Sequence[tuple[str, str, int]]) -> list[str]:
        names = [name for name in columns if name in self.bridges]
        cells = [
            [label, *(_number(self.medians[name][figure], digits) for name in names)]
            for figure, label, digits in rows
            if any(self.medians[name][figure] is not None for name in names)
        ]
        return [*_table(["figure", *names], cells), ""] if cells else []

    @property
    def gross(self) -> list[str]:
        """The ratios that miss their target by more than a factor of two."""
        values = [(target, self.ratios[target.what]) for target in TARGETS]
        return [
            f"{target.what}: {value:.2f}, to reach: {_bound(target)}"
            for target, value in values
            if value is not None and target.gross(value)
        ]


def this_machine() -> Machine:
    """The machine on which this process runs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    server = next(iter(find_servers()), None)
    node = shutil.which("node")
    return Machine(
        date=datetime.now(UTC).date().isoformat(),
        cpu=model or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        system=f"{platform.system()} {platform.release()}",
        redis=version_of(server) if server else "",
        python=sys.version.split()[0],
        node=subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip().lstrip("v")
        if node
        else "",
    )


def _bound(target: Target) -> str:
    return f"{'≥' if target.at_least else '≤'} {target.reach:.3g}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of Markdown whose columns stand below each other as plain text too."""
    cells = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first, *rest = widths
    lines = [
        " | ".join([row[0].ljust(first), *(text.rjust(width) for text, width in zip(row[1:], rest, strict=True))])
        for row in cells
    ]
    rule = " | ".join(["-" * first, *("-" * (width - 1) + ":" for width in rest)])
    return [f"| {line} |" for line in (lines[0], rule, *lines[1:])]

"""The parts of the benchmark and their figures: the hot path, the cost of streams, and how that cost grows."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from board import Count
from bridge import Bridge
from ladder import Highest, Verdict, ladder
from rig import Rig, Window

Figures: TypeAlias = dict[str, float | None]
"""By name; None if a bridge cannot do it, or if it could not be measured."""

STREAMS = 512
OPEN = (0, 1000, 3000)
GROWTH = (1, 64, 512, 3000)
SLOW, FAST, COALESCED = 5_000, 20_000, 100_000
TOGETHER = 20
LIMIT_MS = 5.0
_FOLLOWED = 32
_MORE = 600
_ROUND = 5.0
"""Seconds in which our worker does its upkeep of every open stream once: a third of its lease."""
TRIES, _LOSSES = 6, 3
_LONG = 4
_DELTAS_OF_A_LONG_LOG = 4000


@dataclass
class Run:
    """How to measure. `show` shows progress; `notes` are remarks that the reader of the figures must know."""

    seconds: float
    rung_seconds: float
    show: Callable[[str], None]
    climbs: bool = True
    """Whether to search for the highest rate, and to repeat other windows that were not fair."""
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a remark that the figures need."""
        self.notes.append(text)
        self.show(f"  note: {text}")

    def watch(self, rig: Rig, rate: float) -> Window:
        """A window with the load generator on time and nothing else on the machine, or the last of some tries."""
        tries = 0
        while True:
            window = rig.steady(rate, self.seconds)
            self.show(f"  {_shown(window)}")
            tries += 1
            fair = window.on_time and not window.disturbed
            if fair or tries == TRIES or not self.climbs:
                break
            if not window.kept:
                rig.drained()
        if not window.on_time:
            self.note(f"{rig.name} at {rate:,.0f}/s: the load generator was late, so there is no latency")
        elif window.disturbed:
            self.note(f"{rig.name} at {rate:,.0f}/s: the machine did something else, which is in the latency")
        return window


def hot_path(bridge: Bridge, run: Run) -> Figures:
    """Latency and CPU at the two rates and coalesced, and the highest rate, at 512 streams."""
    figures: Figures = {}
    followed = range(0, STREAMS, STREAMS // _FOLLOWED)
    with Rig(bridge, streams=STREAMS, followed=followed) as rig:
        rig.open(STREAMS)
        with rig.apart():
            rig.warmed_up(SLOW, run.seconds)
            _at_rate(rig, run, SLOW, figures)
            rig.drained()
            if run.climbs:
                highest = _climb(rig, run)
                figures["highest_rate"] = highest.rate
                if highest.at_least:
                    run.note(f"{rig.name}: {highest.rate:,.0f}/s at least, for the load generator kept no higher pace")
            _at_rate(rig, run, FAST, figures)
            rig.drained()
            figures["missing"], figures["stray"] = rig.missing(), rig.board[Count.STRAY]
            # This window is the last, since a slow bridge would need hours to catch up. It is the only one in which a
            # bridge may fall behind. The load generator skips streams that the bridge does not read, so the bridge has
            # all the work that it can do.
            window = rig.steady(COALESCED, run.seconds, TOGETHER)
        run.show(f"  {_shown(window)}")
        figures["cpu_us_coalesced"] = window.cpu_us if window.replied else None
        figures["rate_coalesced"] = window.replied / window.seconds
    return figures


def long_logs(bridge: Bridge, run: Run) -> Figures:
    """Memory of Redis for a delta, in logs so long that the memory of an empty log does not matter."""
    with Rig(bridge, streams=_LONG) as rig:
        rig.open(_LONG)
        rig.pace(_LONG * _DELTAS_OF_A_LONG_LOG / run.seconds)
        time.sleep(run.seconds)
        rig.drained()
        used = rig.bytes_of_a_delta()
        run.show(f"  {used:.1f} bytes in Redis for a delta")
    return {"redis_bytes": used}


def _at_rate(rig: Rig, run: Run, rate: int, figures: Figures) -> None:
    window = run.watch(rig, rate)
    kept = window.paced and window.kept
    if not kept:
        run.note(f"{rig.name} did not hold {rate:,}/s: {window.replied / window.seconds:,.0f}/s of it")
    for name in ("cpu_us", "redis_us", "p50", "p99"):
        is_valid = kept and (window.on_time or name.endswith("us"))
        figures[f"{name}_{rate}"] = getattr(window, name) if is_valid else None


def _climb(rig: Rig, run: Run) -> Highest:
    rates = ladder(4000)
    rate = next(rates)
    while True:
        try:
            rate = rates.send(_rung(rig, run, rate))
        except StopIteration as end:
            highest: Highest = end.value
            return highest


def _rung(rig: Rig, run: Run, rate: float) -> Verdict:
    """Try one rate of the ladder. It is repeated before it counts as not held: machines stall now and then."""
    verdict, losses = Verdict.VOID, 0
    for _ in range(TRIES):
        window = rig.steady(rate, run.rung_seconds)
        run.show(f"  {_shown(window)}")
        if window.on_time and window.kept and window.p99 <= LIMIT_MS:
            return Verdict.HELD
        if window.on_time:
            verdict = Verdict.LOST
            losses += not window.disturbed
        rig.drained()
        if losses == _LOSSES:
            break
    return verdict


def open_streams(bridge: Bridge, run: Run) -> Figures:
    """CPU to open one more stream among many open and silent ones, and the memory of each of those."""
    figures: Figures = {}
    with Rig(bridge, streams=OPEN[-1] + _MORE) as rig, rig.apart():
        rig.open(1)  # the first stream also loads modules and opens connections
        memory = rig.memory_now()
        for among in OPEN:
            rig.open(max(0, among - rig.opened))
            if among == OPEN[-1]:
                figures["memory_kib"] = (rig.memory_now() - memory) / 1024 / rig.opened
            idle = rig.window(2 * _ROUND).cpu
            before, began = rig.cpu_now(), time.monotonic()
            rig.open(_MORE)
            time.sleep(max(0.0, began + _ROUND - time.monotonic()))
            spent, took = (rig.cpu_now() - before) / 1e9, time.monotonic() - began
            idle = (idle + rig.window(2 * _ROUND).cpu) / 2  # the streams that were opened meanwhile cost CPU too
            figures[f"open_ms_{among}"] = 1000 * (spent - idle * took) / _MORE
            run.show(f"  {_MORE} more among {among}: {figures[f'open_ms_{among}']:.2f} ms each")
    return figures


def growth(bridge: Bridge, run: Run) -> Figures:
    """CPU per delta with few and with many streams, at the same total rate."""
    figures: Figures = {}
    for streams in GROWTH:
        with Rig(bridge, streams=streams) as rig:
            rig.open(streams)
            with rig.apart():
                rig.warmed_up(SLOW, run.seconds)
                window = rig.steady(FAST, run.seconds)
            run.show(f"  {streams:,} streams: {_shown(window).strip()}")
            figures[f"cpu_us_streams_{streams}"] = window.cpu_us if window.paced and window.kept else None
    return figures


def _shown(window: Window) -> str:
    """A line of progress for the person who runs the benchmark."""
    return (
        f"{window.rate:9,.0f}/s: {window.replied / window.seconds:9,.0f}/s brought, "
        f"{window.cpu_us:6.1f} µs each, p50 {window.p50:.2f} ms, p99 {window.p99:.2f} ms; "
        f"cores: bridge {window.cpu:.2f}, Redis {window.redis_cpu:.2f}, load {window.load_cpu:.2f}, "
        f"reader {window.reader_cpu:.2f}, others {window.others_cpu:.3f}; {window.late} late"
    )

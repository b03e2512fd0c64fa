"""What is done with a bridge, and which figures come out: the hot path, the cost of streams, and how it grows."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from board import Count
from bridge import Bridge
from ladder import Highest, Verdict, ladder
from rig import Rig, Window

Figures: TypeAlias = dict[str, float | None]
"""By name; None is what a bridge cannot, or what could not be measured."""

STREAMS = 512
OPEN = (0, 1000, 3000)
GROWTH = (1, 64, 512, 3000)
SLOW, FAST, COALESCED = 5_000, 20_000, 100_000
TOGETHER = 20
LIMIT_MS = 5.0
_FOLLOWED = 32
_MORE = 600
_ROUND = 5.0
"""Seconds in which our worker does once what it does for every open stream: a third of its lease."""
TRIES, _LOSSES = 6, 3
_LONG = 4
_DELTAS_OF_A_LONG_LOG = 4000


@dataclass
class Run:
    """How to measure, and who is told of what happens; `notes` is what the reader of the figures must know."""

    seconds: float
    rung_seconds: float
    tell: Callable[[str], None]
    climbs: bool = True
    """Whether the highest rate is looked for, and whether other windows are tried again that were not fair."""
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Something that a figure does not say by itself."""
        self.notes.append(text)
        self.tell(f"  note: {text}")

    def watch(self, rig: Rig, rate: float) -> Window:
        """A window in which the load generator was on time and nobody disturbed, or the last of some tries."""
        tries = 0
        while True:
            window = rig.steady(rate, self.seconds)
            self.tell(f"  {_shown(window)}")
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
            # Last, for a slow bridge will not have brought all of it in hours. It is the one window in which a bridge
            # may fall behind, and streams that it does not read are passed over: so it has all the work that it can do.
            window = rig.steady(COALESCED, run.seconds, TOGETHER)
        run.tell(f"  {_shown(window)}")
        figures["cpu_us_coalesced"] = window.cpu_us if window.replied else None
        figures["rate_coalesced"] = window.replied / window.seconds
    return figures


def long_logs(bridge: Bridge, run: Run) -> Figures:
    """Memory of Redis for a delta where logs are so long that what a log takes by itself is nothing."""
    with Rig(bridge, streams=_LONG) as rig:
        rig.open(_LONG)
        rig.pace(_LONG * _DELTAS_OF_A_LONG_LOG / run.seconds)
        time.sleep(run.seconds)
        rig.drained()
        used = rig.bytes_of_a_delta()
        run.tell(f"  {used:.1f} bytes in Redis for a delta")
    return {"redis_bytes": used}


def _at_rate(rig: Rig, run: Run, rate: int, figures: Figures) -> None:
    window = run.watch(rig, rate)
    kept = window.paced and window.kept
    if not kept:
        run.note(f"{rig.name} did not hold {rate:,}/s: {window.replied / window.seconds:,.0f}/s of it")
    for name in ("cpu_us", "redis_us", "p50", "p99"):
        told = kept and (window.on_time or name.endswith("us"))
        figures[f"{name}_{rate}"] = getattr(window, name) if told else None


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
    """One rate of the ladder, tried again before it is said not to be held: a machine has its moments."""
    verdict, losses = Verdict.VOID, 0
    for _ in range(TRIES):
        window = rig.steady(rate, run.rung_seconds)
        run.tell(f"  {_shown(window)}")
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
    """CPU to open one more stream among many that are open and silent, and what memory each of these takes."""
    figures: Figures = {}
    with Rig(bridge, streams=OPEN[-1] + _MORE) as rig, rig.apart():
        rig.open(1)  # what is loaded and connected once is not a stream's
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
            idle = (idle + rig.window(2 * _ROUND).cpu) / 2  # those that were opened cost something meanwhile too
            figures[f"open_ms_{among}"] = 1000 * (spent - idle * took) / _MORE
            run.tell(f"  {_MORE} more among {among}: {figures[f'open_ms_{among}']:.2f} ms each")
    return figures


def growth(bridge: Bridge, run: Run) -> Figures:
    """CPU per delta with few and with many streams, at the same rate of all together."""
    figures: Figures = {}
    for streams in GROWTH:
        with Rig(bridge, streams=streams) as rig:
            rig.open(streams)
            with rig.apart():
                rig.warmed_up(SLOW, run.seconds)
                window = rig.steady(FAST, run.seconds)
            run.tell(f"  {streams:,} streams: {_shown(window).strip()}")
            figures[f"cpu_us_streams_{streams}"] = window.cpu_us if window.paced and window.kept else None
    return figures


def _shown(window: Window) -> str:
    """A line for whoever watches."""
    return (
        f"{window.rate:9,.0f}/s: {window.replied / window.seconds:9,.0f}/s brought, "
        f"{window.cpu_us:6.1f} µs each, p50 {window.p50:.2f} ms, p99 {window.p99:.2f} ms; "
        f"cores: bridge {window.cpu:.2f}, Redis {window.redis_cpu:.2f}, load {window.load_cpu:.2f}, "
        f"reader {window.reader_cpu:.2f}, others {window.others_cpu:.3f}; {window.late} late"
    )

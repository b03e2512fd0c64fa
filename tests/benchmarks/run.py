"""The benchmark of the hot path: every bridge side by side in one run, in turn, for some rounds.

    python tests/benchmarks/run.py --rounds 3 --json report.json --plot report.svg

The benchmark needs the machine for itself: where other programs run too, little but the ratios of CPU is valid.
"""
# ruff: noqa: E402 - where the project is not installed, the imports below need the changed sys.path

import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

_HERE = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (_HERE.parents[1], _HERE, _HERE.parent, _HERE.parent / "edge")]

import click
import msgspec
from bridge import Bridge, NotInstalled, floor, node, ours, straightforward
from edge import SERVERS, edge
from measure import many_files
from plot import svg
from reading import FOLLOWERS, reading
from report import BRIDGES, Report, this_machine
from rig import RigFailed
from scenarios import Figures, Run, growth, hot_path, long_logs, open_streams
from short import short

_T = TypeVar("_T")
_TAKE_JOBS = ("straightforward", "node", "ours")
_PARTS: dict[str, tuple[Callable[[Bridge, Run], Figures], tuple[str, ...]]] = {
    "hot": (hot_path, BRIDGES),
    "redis": (long_logs, BRIDGES),
    "open": (open_streams, _TAKE_JOBS),
    "growth": (growth, ("ours", "floor")),
}
"""The parts of the benchmark, and the bridges of each. The floor takes no jobs. Growth is measured for ours and the
floor alone."""

_OTHERS = ("short", "reading", "edge")
"""The parts that compare in a way of their own."""


def compare(bridges: Sequence[Bridge], parts: Sequence[str], rounds: int, run: Run) -> Report:
    """Run all parts with all bridges in turn, once in each round."""
    done: list[dict[str, Figures]] = []
    kinds = {bridge.name: bridge.what for bridge in bridges}
    readers = FOLLOWERS.values() if "reading" in parts else ()
    servers = SERVERS.values() if "edge" in parts else ()
    kinds |= {way.name: way.what for way in (*readers, *servers)}
    for number in range(1, rounds + 1):
        run.show(f"round {number} of {rounds}")
        figures: dict[str, Figures] = {name: {} for name in kinds}
        for part, (do, whose) in _PARTS.items():
            for bridge in bridges:
                if part in parts and bridge.name in whose:
                    run.show(f" {bridge.name}, {part}")
                    figures[bridge.name] |= _tried(run, do, bridge)
        if "short" in parts:
            run.show(" short")
            takers = [bridge for bridge in bridges if bridge.name in _TAKE_JOBS]
            for name, found in short(takers, run).items():
                figures[name] |= found
        for follower in readers:
            run.show(f" {follower.name}, reading")
            figures[follower.name] = _tried(run, reading, follower)
        if "edge" in parts:
            run.show(" edge")
            figures |= edge(run)
        done.append(figures)
    return Report(machine=this_machine(), bridges=kinds, rounds=done, notes=run.notes)


def _tried(run: Run, do: Callable[[_T, Run], Figures], whom: _T) -> Figures:
    """Run one part. If it fails, note the reason and return no figures."""
    try:
        return do(whom, run)
    except RigFailed as error:
        run.note(str(error))
        return {}


def _bridges(names: Sequence[str], folder: Path, run: Run) -> list[Bridge]:
    make: dict[str, Callable[[], Bridge]] = {
        "ours": ours, "straightforward": straightforward, "node": node, "floor": lambda: floor(folder),
    }  # fmt: skip
    made = []
    for name in names:
        try:
            made.append(make[name]())
        except NotInstalled as error:
            run.note(f"{name} is left out: {error}")
    return made


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.5), default=2.5, show_default=True, help="Of each steady window.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*_PARTS, *_OTHERS]),
    help="Parts to run; all if it is left out.",
)
@click.option("--bridges", multiple=True, type=click.Choice(BRIDGES), help="Bridges to compare; all if it is left out.")
@click.option("--quick", is_flag=True, help="Run for a few minutes; exit with 1 if a ratio misses its target by half.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Write all figures to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the medians, as SVG, into this file.")
def main(
    rounds: int, seconds: float, only: tuple[str, ...], bridges: tuple[str, ...], quick: bool, as_json: Path | None,
    plot: Path | None,
) -> None:  # fmt: skip
    """Compare the worker with other bridges between vLLM and Redis, and ways to read and to serve with each other."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise a Redis would be left behind
    many_files()
    run = Run(
        seconds=min(seconds, 2.0) if quick else seconds, rung_seconds=min(seconds, 3.0), climbs=not quick,
        show=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="vllm-relay-bench-") as folder:
        parts = only or (("hot", "short", "edge") if quick else (*_PARTS, *_OTHERS))
        needed = {name for part, (_, whose) in _PARTS.items() if part in parts for name in whose}
        needed |= set(_TAKE_JOBS) if "short" in parts else set()
        chosen = _bridges([name for name in bridges or BRIDGES if name in needed], Path(folder), run)
        report = compare(chosen, parts, 1 if quick else rounds, run)
    if as_json:
        as_json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    if plot:
        plot.write_text(svg(report))
    click.echo(report.table)
    if quick and (wrong := report.gross or ([] if any(report.ratios.values()) else ["nothing could be measured"])):
        click.echo("\n".join(["", "far from the targets:", *wrong]), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

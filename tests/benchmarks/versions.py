"""CPU of the worker for a delta: this checkout against another one, in alternating windows.

    git worktree add /tmp/old v1.0.0
    .venv/bin/python tests/benchmarks/versions.py /tmp/old

Both workers run at the same time, and one of them is idle. The windows are short and alternate, so other programs on
the machine slow both workers alike. Each pair of processes has memory layouts of its own, so several pairs are
measured. Only ratios are valid on a busy machine. Both checkouts must work with the packages of this virtual
environment.
"""
# ruff: noqa: E402 - where the project is not installed, the imports below need the changed sys.path

import signal
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import click
from bridge import Bridge, ours
from measure import many_files
from rig import Rig
from scenarios import FAST, SLOW, STREAMS


def worker_of(checkout: Path) -> Bridge:
    """The worker of a checkout, with the Python and the packages of this one."""
    bridge = ours()
    environment = bridge.environment
    path = {"PYTHONPATH": str(checkout.resolve())}
    return replace(bridge, name=str(checkout), environment=lambda vllm, redis: {**environment(vllm, redis), **path})


def alternate(old: Rig, new: Rig, rate: int, seconds: float, windows: int) -> list[tuple[float, float]]:
    """CPU for a delta in microseconds, (old, new), for each pair of windows. The order changes from pair to pair."""
    pairs = []
    for number in range(windows):
        cpu: dict[str, float] = {}
        for rig in (old, new) if number % 2 else (new, old):
            with rig.apart():
                window = rig.steady(rate, seconds)
                rig.drained()
            is_valid = window.paced and window.kept
            remark = "" if is_valid else ", rate not held"
            click.echo(f"{rate:6}/s {rig.name}: {window.cpu_us:.1f} µs{remark}", err=True)
            if is_valid:
                cpu[rig.name] = window.cpu_us
        if len(cpu) == 2:
            pairs.append((cpu[old.name], cpu[new.name]))
    return pairs


def summary(rate: int, pairs: list[tuple[float, float]]) -> str:
    """The medians and the least figures of both, and the median of the ratios."""
    if not pairs:
        return f"{rate:,}/s: no pair of windows held the rate"
    old, new = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = median(after / before for before, after in pairs)
    return (
        f"{rate:,}/s, {len(pairs)} pairs: median {median(old):.1f} -> {median(new):.1f} µs, "
        f"least {min(old):.1f} -> {min(new):.1f} µs, median of the ratios {ratio:.3f}"
    )


@click.command()
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--processes", type=click.IntRange(1), default=3, show_default=True, help="Pairs of worker processes.")
@click.option("--windows", type=click.IntRange(1), default=2, show_default=True, help="For each rate and process.")
@click.option("--seconds", type=click.FloatRange(0.5), default=10.0, show_default=True, help="Of each window.")
def main(other: Path, processes: int, windows: int, seconds: float) -> None:
    """Compare the CPU for a delta of the worker of another checkout with that of this one."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise a Redis would be left behind
    many_files()
    found: dict[int, list[tuple[float, float]]] = {SLOW: [], FAST: []}
    for _ in range(processes):
        bridges = worker_of(other), worker_of(Path(__file__).parents[2])
        with Rig(bridges[0], streams=STREAMS) as old, Rig(bridges[1], streams=STREAMS) as new:
            for rig in (old, new):
                rig.open(STREAMS)
                rig.warmed_up(SLOW, 2.0)
            for rate, pairs in found.items():
                pairs.extend(alternate(old, new, rate, seconds, windows))
    for rate, pairs in found.items():
        click.echo(summary(rate, pairs))


if __name__ == "__main__":
    main()

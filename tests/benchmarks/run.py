"""The benchmark of the hot path: every bridge side by side in one run, in turn, for some rounds.

    python tests/benchmarks/run.py --rounds 3 --json report.json --plot report.svg

It takes the machine for itself: on one that does something else besides, only the ratios mean anything.
"""
# ruff: noqa: E402 - what follows the change of sys.path needs it, where the project is not installed

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import click
import msgspec
from bridge import Bridge, NotAtHand, floor, node, ours, straightforward
from measure import many_files
from report import ORDER, Report, this_machine
from rig import RigFailed
from scenarios import Figures, Run, growth, hot_path, open_streams

PARTS = ("hot", "open", "growth")
_QUICK = ("straightforward", "ours", "floor")


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _round(bridge: Bridge, parts: Sequence[str], run: Run, *, climb: bool) -> Figures:
    figures: Figures = {}
    for part in parts:
        _tell(f" {bridge.name}, {part}")
        try:
            if part == "hot":
                figures |= hot_path(bridge, run, climb=climb)
            elif part == "open" and bridge.name != "floor":
                figures |= open_streams(bridge, run)
            elif part == "growth" and bridge.name in {"ours", "floor"}:
                figures |= growth(bridge, run)
        except RigFailed as error:
            run.note(str(error))
    return figures


def compare(bridges: Sequence[Bridge], parts: Sequence[str], rounds: int, run: Run, *, climb: bool = True) -> Report:
    """Run all bridges in turn, round after round."""
    done = []
    for number in range(1, rounds + 1):
        _tell(f"round {number} of {rounds}")
        done.append({bridge.name: _round(bridge, parts, run, climb=climb) for bridge in bridges})
    kinds = {bridge.name: bridge.what for bridge in bridges}
    return Report(machine=this_machine(), bridges=kinds, rounds=done, notes=run.notes)


def _bridges(names: Sequence[str], folder: Path, run: Run) -> list[Bridge]:
    made = []
    for name in names:
        try:
            made.append(
                {"ours": ours, "straightforward": straightforward, "node": node}.get(name, lambda: floor(folder))()
            )
        except NotAtHand as error:
            run.note(f"{name} is left out: {error}")
    return made


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.5), default=5.0, show_default=True, help="Of each steady window.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Parts to run; all if left out.")
@click.option("--bridges", multiple=True, type=click.Choice(ORDER), help="Whom to compare; all if left out.")
@click.option(
    "--quick", is_flag=True, help="A minute; exits with 1 when a ratio is below half of what is to be reached."
)
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Write all figures to this file.")
def main(
    rounds: int, seconds: float, only: tuple[str, ...], bridges: tuple[str, ...], quick: bool, as_json: Path | None
) -> None:  # fmt: skip
    """Compare the worker with other bridges between vLLM and Redis."""
    many_files()
    run = Run(seconds=2.0 if quick else seconds, rung_seconds=min(seconds, 3.0), tell=_tell)
    with tempfile.TemporaryDirectory(prefix="vllm-relay-bench-") as folder:
        chosen = _bridges(bridges or (_QUICK if quick else ORDER), Path(folder), run)
        if quick:
            report = compare(chosen, ("hot",), 1, run, climb=False)
        else:
            report = compare(chosen, only or PARTS, rounds, run)
    if as_json:
        as_json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    click.echo(report.table)
    if quick and report.gross:
        click.echo("\n".join(["", "far from what is to be reached:", *report.gross]), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

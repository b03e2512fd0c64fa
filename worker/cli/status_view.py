"""Draws a survey as lines of at most 80 columns, for a terminal or a file."""

from collections.abc import Iterable, Sequence
from itertools import chain

import click

from ..ops.survey_types import QueueState, RedisState, Survey, WorkerState
from ..ops.units import duration, size

_WIDTH = 80


def lines_of(survey: Survey) -> list[str]:
    """The lines: the faults first, then a table for each part."""
    return list(
        chain(
            _faults(survey),
            _table(("QUEUE", "WAITING", "OLDEST", "RUNNING", "WORKERS", "PAUSED"), map(_queue, survey.queues)),
            _table(
                ("WORKER", "STATE", "RUNNING", "DONE/S", "FAILED", "TOKENS/S", "SILENT", "VERSION", "QUEUES"),
                map(_worker, survey.workers),
            ),
            _table(
                ("SERVER", "STATE", "RUNNING"),
                [(one.url, one.state, f"{one.requests}/{one.limit:.0f}") for one in survey.servers],
            ),
            _table(("REDIS", "MEMORY", "FULL IN"), map(_redis, survey.redis)),
            _dead_letters(survey),
            [f"not readable for this user: {', '.join(survey.unread)}"] if survey.unread else [],
        )
    )


def _faults(survey: Survey) -> list[str]:
    if not survey.faults:
        return [click.style("no fault is known", fg="green")]
    lines = []
    for fault in survey.faults:
        mark = click.style(
            "error  " if fault.level == "error" else "warning", fg="red" if fault.level == "error" else "yellow"
        )
        since = f" (for {duration(survey.time / 1000 - fault.since / 1000)})" if fault.since else ""
        lines.append(f"{mark} {fault.subject}: {fault.message}{since}")
        if fault.fix:
            lines.append(f"        → {fault.fix}")
    return lines


def _queue(queue: QueueState) -> tuple[str, ...]:
    oldest = "-" if queue.oldest is None else duration(queue.oldest)
    workers = "-" if queue.workers is None else str(queue.workers)
    return queue.name, str(queue.waiting), oldest, str(queue.running), workers, "yes" if queue.pause else "no"


def _worker(worker: WorkerState) -> tuple[str, ...]:
    state = f"{worker.state}: {worker.reason}" if worker.reason else worker.state
    running = f"{worker.running}/{worker.slots}"
    rates = f"{worker.done_per_s:.1f}", str(worker.failed), f"{worker.tokens_per_s:.0f}", duration(worker.silence)
    return worker.name, state, running, *rates, worker.version, ",".join(worker.queues)


def _redis(redis: RedisState) -> tuple[str, ...]:
    limit = size(redis.limit) if redis.limit else "no limit"
    return redis.name, f"{size(redis.used)} of {limit}", "unknown" if redis.full_in is None else duration(redis.full_in)


def _dead_letters(survey: Survey) -> list[str]:
    letters = survey.dead_letters
    if letters.newest is None:
        return ["", "dead letters: none"]
    return ["", f"dead letters: {letters.count}; newest {duration(letters.newest)} ago: {letters.reason}"[:_WIDTH]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table. The first column is shortened until the table fits."""
    found = list(rows)
    if not found:
        return []
    widths = [max(len(row[column]) for row in [head, *found]) for column in range(len(head))]
    widths[0] = max(8, min(widths[0], _WIDTH - sum(widths[1:]) - 2 * (len(head) - 1)))
    lines = []
    for row in [head, *found]:
        cells = [_shortened(row[0], widths[0]), *row[1:]]
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()[:_WIDTH])
    return ["", click.style(lines[0], bold=True), *lines[1:]]


def _shortened(text: str, width: int) -> str:
    """A text in at most `width` characters: its middle is left out, since names of pods end with what differs."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"

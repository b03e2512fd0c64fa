"""Draws a survey or a finding as lines of at most 80 columns, or those of a narrower terminal."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain

import click

from ..ops.findings import Finding, Level
from ..ops.survey_types import GatewayState, QueueState, RedisState, ServerState, Survey, WorkerState
from ..ops.units import WIDTH, duration, folded, instant, printable, size

_LEAST_NAME = 20
_COLOURS: Mapping[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}


def lines_of(survey: Survey, width: int = WIDTH) -> list[str]:
    """The lines, of at most `width` columns: the faults first, then a table for each part."""
    table = partial(_table, width=width)
    tables = (
        table(("QUEUE", "WAITING", "OLDEST", "RUNNING", "DONE/S", "FAILED", "WORKERS"), map(_queue, survey.queues)),
        table(("WORKER", "STATE", "RUNNING", "TOKENS/S", "SILENT", "VERSION", "QUEUES"), map(_worker, survey.workers)),
        table(("GATEWAY", "STATE", "STREAMS", "VERSION", "ADDRESS"), map(_gateway, survey.gateways)),
        table(("SERVER", "STATE", "RUNNING"), map(_server, survey.servers)),
        table(("REDIS", "MEMORY", "FULL IN"), map(_redis, survey.redis)),
    )
    lines = [*_faults(survey, width), *chain.from_iterable(tables)]
    if survey.redis:  # else nothing could be read
        lines += ["", _cut(_dead_letters(survey), width)]
    if survey.unread:
        lines += ["", *folded(f"not readable for this user: {', '.join(survey.unread)}", width=width)]
    return lines


def _faults(survey: Survey, width: int) -> list[str]:
    if not survey.faults:
        return [click.style("no fault is known", fg="green")]
    return list(chain.from_iterable(lines_of_finding(fault, width) for fault in survey.faults))


def lines_of_finding(finding: Finding, width: int = WIDTH) -> list[str]:
    """The lines of one finding: level, subject and message, then how to fix it."""
    since = f", since {instant(finding.since)}" if finding.since else ""
    first, *rest = folded(f"{finding.level:<7} {finding.subject}: {finding.message}{since}", 8, width)
    first = click.style(first[:7], fg=_COLOURS[finding.level]) + first[7:]
    return [first, *rest, *(folded(f"        → {finding.fix}", 10, width) if finding.fix else [])]


def _queue(queue: QueueState) -> tuple[str, ...]:
    oldest = "-" if queue.oldest is None else duration(queue.oldest)
    workers = "paused" if queue.pause else "-" if queue.workers is None else str(queue.workers)
    return (
        queue.name,
        str(queue.waiting),
        oldest,
        str(queue.running),
        f"{queue.done_per_s:.1f}",
        str(queue.failed),
        workers,
    )


def _worker(worker: WorkerState) -> tuple[str, ...]:
    rates = f"{worker.running}/{worker.slots}", f"{worker.tokens_per_s:.0f}", duration(worker.silence)
    return worker.name, worker.reason or worker.state, *rates, worker.version, ",".join(worker.queues)


def _gateway(gateway: GatewayState) -> tuple[str, ...]:
    return gateway.name, gateway.state, str(gateway.streams), gateway.version, gateway.address


def _server(server: ServerState) -> tuple[str, ...]:
    return server.url, server.state, f"{server.requests}/{server.limit:.0f}"


def _redis(redis: RedisState) -> tuple[str, ...]:
    limit = size(redis.limit) if redis.limit else "no limit"
    return redis.name, f"{size(redis.used)} of {limit}", _full_in(redis)


def _full_in(redis: RedisState) -> str:
    if not redis.limit:
        return "-"
    if redis.used >= redis.limit:
        return "full"
    if redis.full_in is not None:
        return duration(redis.full_in)
    if redis.needed is None:
        return "unknown"
    return "not at this rate" if redis.needed else "too little load"


def _dead_letters(survey: Survey) -> str:
    letters = survey.dead_letters
    if letters.newest is None:
        return "dead letters: none"
    return f"dead letters: {letters.count}; newest {duration(letters.newest)} ago: {printable(letters.reason)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> list[str]:
    """A table. Its last column is cut, and the names in its first one are shortened, until it fits."""
    found = [head, *(tuple(map(printable, row)) for row in rows)]
    if len(found) == 1:
        return []
    widths = [max(len(row[column]) for row in found) for column in range(len(head))]
    between = 2 * (len(head) - 1)
    excess = sum(widths) + between - width
    widths[0] -= (cut := max(0, min(excess, widths[0] - _LEAST_NAME)))
    widths[-1] = max(len(head[-1]), widths[-1] - max(0, excess - cut))
    lines = []
    for row in found:
        cells = [_shortened(row[0], widths[0]), *row[1:-1], _cut(row[-1], widths[-1])]
        lines.append("  ".join(cell.ljust(room) for cell, room in zip(cells, widths, strict=True)).rstrip()[:width])
    return ["", click.style(lines[0], bold=True), *lines[1:]]


def _shortened(text: str, width: int) -> str:
    """A text in at most `width` characters: its middle is left out, since names of pods end with what differs."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"

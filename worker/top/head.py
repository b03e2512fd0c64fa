"""The lines above and below the tables: Redis, dead letters, what is wrong, and the selected row in full."""

from collections.abc import Sequence

from rich.text import Text

from ..ops.findings import Finding
from ..ops.running import RunningRequest
from ..ops.survey_types import QueueState, RedisState, ServerState, Survey, WorkerState
from ..ops.units import duration, printable, size

_STYLES = {"error": "bold red", "warning": "bold yellow"}


def storage_line(survey: Survey) -> str:
    """The memory of each Redis, the gateways, and the dead letters."""
    parts = [_memory(redis) for redis in survey.redis]
    letters = survey.dead_letters
    newest = "" if letters.newest is None else f", newest {duration(letters.newest)} ago: {letters.reason}"
    if gateways := [gateway for gateway in survey.gateways if gateway.state != "silent"]:
        parts.append(f"gateways {len(gateways)}, streams {sum(gateway.streams for gateway in gateways)}")
    return "   ".join([*parts, f"dead letters {letters.count}{newest}"])


def _memory(redis: RedisState) -> str:
    limit = f" of {size(redis.limit)}" if redis.limit else ""
    full = "" if redis.full_in is None else f", full in {duration(redis.full_in)}"
    return f"Redis {redis.version} memory {size(redis.used)}{limit}{full}"


def sentence_of(fault: Finding, now: float) -> str:
    """A fault in one line, with how long it has lasted at a time in Unix seconds, and its fix."""
    lasts = f" (for {duration(max(0.0, now - fault.since / 1000))})" if fault.since else ""
    fix = f" → {fault.fix}" if fault.fix else ""
    return f"{fault.subject}: {fault.message}{lasts}{fix}"


def faults_text(faults: Sequence[Finding], now: float, room: int) -> Text:
    """The first faults, one on a line, in at most `room` lines."""
    if not faults:
        return Text("no fault is known", style="green")
    shown = faults if len(faults) <= room else faults[: max(1, room - 1)]
    text = Text()
    for fault in shown:
        text.append(f"{fault.level:<8}", style=_STYLES.get(fault.level, ""))
        text.append(f"{printable(sentence_of(fault, now))}\n")
    if more := len(faults) - len(shown):
        text.append(f"and {more} more: press !", style="bold")
    text.rstrip()
    return text


def names_of(row: RunningRequest | QueueState | WorkerState | ServerState | None) -> str:
    """The names of a row in full, which its table may have shortened."""
    match row:
        case RunningRequest():
            return f"{row.request_id or 'request unknown'}  queue {row.queue}  worker {row.worker}  job {row.job}"
        case QueueState():
            waits = ", ".join(f"{jobs} for {model or 'any model'}" for model, jobs in row.parked.items())
            by = f"  paused by {row.pause.by}: {row.pause.why}".rstrip(": ") if row.pause else ""
            return f"queue {row.name}{f'  waiting for room: {waits}' if waits else ''}{by}  {row.problem}".rstrip()
        case WorkerState():
            where = f"  process {row.pid} on {row.host}" if row.host else ""
            return f"worker {row.name}{where}  {row.reason}".rstrip()
        case ServerState():
            return f"server {row.url}  {row.reason}".rstrip()
        case None:
            return ""

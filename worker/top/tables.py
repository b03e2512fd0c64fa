"""The columns of the four tables: queues, workers, servers and running requests, and what they mean."""

from ..broker.consumers import HANDED_OVER
from ..ops.running import RunningRequest
from ..ops.survey_types import QueueState, ServerState, WorkerState
from ..ops.units import duration
from .columns import Cell, Column, Tone

_SILENT, _VERY_SILENT = 10.0, 30.0
"""Seconds without a token from which on a request is shown as a warning, and as an error."""


def _silence(seconds: float, text: str = "") -> Cell:
    tone: Tone = "error" if seconds >= _VERY_SILENT else "warning" if seconds >= _SILENT else ""
    return Cell(text or duration(seconds), seconds, tone)


def _number(value: float, tone: Tone = "") -> Cell:
    return Cell(f"{value:.0f}", value, tone)


# Requests


def _request_id(request: RunningRequest) -> Cell:
    if request.request_id:
        return Cell(request.request_id, request.request_id)
    return Cell(f"job {request.job}", request.job, "dim")


def _holder(request: RunningRequest) -> Cell:
    return Cell(request.worker, request.worker, "warning" if request.worker == HANDED_OVER else "")


def _age(request: RunningRequest) -> Cell:
    return Cell(f"{'' if request.has_started else '<'}{duration(request.age)}", request.age)


def _tokens(request: RunningRequest) -> Cell:
    return Cell("") if request.tokens is None else _number(request.tokens)


def _rate(request: RunningRequest) -> Cell:
    return Cell("") if request.rate is None else _number(request.rate)


def _request_silence(request: RunningRequest) -> Cell:
    if request.silence is None:
        return Cell("")
    if request.has_ended:
        return Cell("ends", 0.0, "dim")
    least = "" if request.has_grown else ">"
    return _silence(request.silence, f"{least}{duration(request.silence)}")


def _attempt(request: RunningRequest) -> Cell:
    return _number(request.attempt, "warning" if request.attempt > 1 else "") if request.attempt else Cell("")


REQUESTS: tuple[Column[RunningRequest], ...] = (
    Column("request", _request_id, least=12),
    Column("queue", lambda request: Cell(request.queue, request.queue), least=7, drop=1),
    Column("worker", _holder, least=11),
    Column("age", _age, is_number=True),
    Column("tokens", _tokens, is_number=True),
    Column("tok/s", _rate, is_number=True),
    Column("silent", _request_silence, is_number=True),
    Column("attempt", _attempt, is_number=True),
)

# Queues


def _oldest(queue: QueueState) -> Cell:
    return Cell("") if queue.oldest is None else Cell(duration(queue.oldest), queue.oldest)


def _serving(queue: QueueState) -> Cell:
    if queue.workers is None:
        return Cell("?")
    return _number(queue.workers, "" if queue.workers or not queue.waiting else "error")


def _queue_state(queue: QueueState) -> Cell:
    if queue.pause:
        text = f"paused by {queue.pause.by}" if queue.pause.by else "paused"
        return Cell(f"{text}: {queue.pause.why}" if queue.pause.why else text, "paused", "warning")
    return Cell(queue.problem, queue.problem, "error")


QUEUES: tuple[Column[QueueState], ...] = (
    Column("queue", lambda queue: Cell(queue.name, queue.name), least=10),
    Column("waiting", lambda queue: _number(queue.waiting), is_number=True),
    Column("oldest", _oldest, is_number=True),
    Column("running", lambda queue: _number(queue.running), is_number=True),
    Column("done/s", lambda queue: Cell(f"{queue.done_per_s:.1f}", queue.done_per_s), is_number=True, drop=2),
    Column("failed", lambda queue: _number(queue.failed), is_number=True, drop=1),
    Column("workers", _serving, is_number=True),
    Column("", _queue_state, least=6),
)

# Workers

_WORKER_TONES: dict[str, Tone] = {
    "working": "good", "paused": "warning", "starting": "warning", "draining": "warning", "silent": "error",
    "unknown": "warning",
}  # fmt: skip


def _worker_state(worker: WorkerState) -> Cell:
    text = f"{worker.state}: {worker.reason}" if worker.reason else worker.state
    return Cell(text, text, _WORKER_TONES.get(worker.state, ""))


def _worker_queues(worker: WorkerState) -> Cell:
    paused = set(worker.paused_queues)
    text = ", ".join(f"{name} (paused)" if name in paused else name for name in worker.queues)
    return Cell(text, text, "warning" if paused else "")


WORKERS: tuple[Column[WorkerState], ...] = (
    Column("worker", lambda worker: Cell(worker.name, worker.name), least=12),
    Column("state", _worker_state, least=8),
    Column("running", lambda worker: Cell(f"{worker.running}/{worker.slots}", worker.running), is_number=True),
    Column("tok/s", lambda worker: _number(worker.tokens_per_s), is_number=True),
    Column("done/s", lambda worker: Cell(f"{worker.done_per_s:.1f}", worker.done_per_s), is_number=True),
    Column("failed", lambda worker: _number(worker.failed), is_number=True),
    Column("silent", lambda worker: _silence(worker.silence), is_number=True),
    Column("queues", _worker_queues, least=7, drop=1),
    Column("version", lambda worker: Cell(worker.version, worker.version), drop=2),
)

# Servers

_SERVER_TONES: dict[str, Tone] = {
    "up": "good", "full": "warning", "silent": "error", "partly": "warning", "away": "error", "starting": "warning"
}  # fmt: skip


def _server_state(server: ServerState) -> Cell:
    text = f"{server.state}: {server.reason}" if server.reason else server.state
    return Cell(text, text, _SERVER_TONES.get(server.state, ""))


SERVERS: tuple[Column[ServerState], ...] = (
    Column("server", lambda server: Cell(server.url, server.url), least=16),
    Column("state", _server_state, least=8),
    Column("running", lambda server: Cell(f"{server.requests}/{server.limit:.0f}", server.requests), is_number=True),
    Column("workers", lambda server: _number(server.workers), is_number=True, drop=1),
)

HELP = (
    ("Tab", "to the next table: the keys act on its selected row. ↑ ↓ PgUp PgDn Home End select"),
    ("/", "show only rows that have a text; Esc shows all again"),
    ("s  S", "sort by the next column, or the one before; a click on a column's head does it too"),
    ("r", "reverse the order"),
    ("c", "cancel the request, after a question"),
    ("p", "pause the queue of the row, after a question, or resume it"),
    ("d", "drain the worker of the row, after a question: as SIGTERM, it hands its jobs over and ends"),
    ("f", "follow the request: shows its answer. Nothing else here shows content"),
    ("!", "all that is wrong, in full"),
    ("q", "quit; so does Ctrl-C"),
    ("", ""),
    ("age", "since the request started; with <, since its job was added: its start is not in the lifecycle"),
    ("tokens", "about: the entries of its log but the three before the first token"),
    ("tok/s", "new tokens a second, between the last two pictures"),
    ("silent", "since its log last grew; with >, it has not grown since it was first seen here"),
    ("attempt", "the attempts so far: more than 1 after a worker or a server was lost"),
    ("job …", "a request whose start is not in the lifecycle yet, or no longer"),
)
"""The keys and the columns of the requests, each with its meaning."""

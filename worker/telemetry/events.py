"""The events that a worker emits: frozen records of what happened. This module imports no other part of the project.

The engine, the broker and the vLLM side emit events to a `Telemetry`. It has two receivers: `worker.telemetry.metrics`
counts events, and `worker.telemetry.logging` writes them to the log. The events of one job are in `job_events`. No
event is emitted per token, and no event holds a prompt, an output or a secret.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

Level = Literal["silent", "info", "warning", "error"]
"""How an event is logged. A `silent` event is only counted."""

Outcome = Literal["done", "error", "cancelled"]

GapCause = Literal["handover", "takeover", "vllm", "redis"]
"""What interrupted an answer: its worker left, or died; its vLLM server failed; Redis did not accept entries."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. Its name in the log is `name` or, if that is empty, the class's name in snake case."""

    level: ClassVar[Level] = "info"
    name: ClassVar[str] = ""


class Telemetry(Protocol):
    """A receiver of events."""

    def emit(self, event: Event) -> None:
        """Receive an event. Implementations return quickly and never raise, since emitters wait for them."""


class Receivers:
    """Forwards every event to each of several receivers."""

    def __init__(self, *receivers: Telemetry) -> None:
        self._receivers = receivers

    def emit(self, event: Event) -> None:
        for receiver in self._receivers:
            receiver.emit(event)


NO_TELEMETRY: Telemetry = Receivers()
"""Discards all events."""


# Failures that last: logged at first, then every half minute, and once when they are over.


@dataclass(frozen=True, slots=True)
class Failing(Event):
    """An operation failed and is tried again. `what` is its name in the log, `advice` is how to fix the cause."""

    level = "warning"
    what: str
    error: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Recovered(Event):
    """The operation of an earlier `Failing` works again; `after` is its `what`."""

    after: str


# The process.


@dataclass(frozen=True, slots=True)
class UnknownSettings(Event):
    """Variables begin with WORKER_ and are not settings."""

    level = "warning"
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkerStarting(Event):
    version: str
    redis: str
    vllm: list[str]


@dataclass(frozen=True, slots=True)
class WorkerStarted(Event):
    version: str
    queues: tuple[str, ...]
    slots: int
    redis: str
    vllm: list[str]


@dataclass(frozen=True, slots=True)
class MetricsServed(Event):
    port: int


@dataclass(frozen=True, slots=True)
class TracesExported(Event):
    """The worker exports traces to the endpoint that the environment states."""


@dataclass(frozen=True, slots=True)
class TracesOff(Event):
    """The environment asks for traces, and the worker cannot export them."""

    level = "warning"
    reason: str


@dataclass(frozen=True, slots=True)
class HeartbeatRefused(Event):
    """No heartbeat file can be written, so `worker health` does not find this worker. The worker tries again."""

    level = "warning"
    error: str


@dataclass(frozen=True, slots=True)
class WorkerDraining(Event):
    running: int


@dataclass(frozen=True, slots=True)
class LeaveFailed(Event):
    """The worker's record and consumer were not removed in time. Other workers remove them as stale."""

    level = "warning"
    error: str


@dataclass(frozen=True, slots=True)
class WorkerStopped(Event):
    finished: int


# Taking jobs.


@dataclass(frozen=True, slots=True)
class IntakePaused(Event):
    """The worker pauses its intake for this reason (`on` is true), or this reason no longer applies."""

    level = "silent"
    reason: str
    on: bool


@dataclass(frozen=True, slots=True)
class ClaimsPaused(Event):
    level = "warning"
    reason: str


@dataclass(frozen=True, slots=True)
class ClaimsResumed(Event):
    level = "warning"
    reason: str


@dataclass(frozen=True, slots=True)
class QueuePaused(Event):
    """An operator has paused a queue of this worker. `until` is Unix ms; 0 is no end."""

    level = "warning"
    queue: str
    by: str = ""
    why: str = ""
    until: int = 0


@dataclass(frozen=True, slots=True)
class QueueResumed(Event):
    """The pause of a queue is over."""

    level = "warning"
    queue: str


@dataclass(frozen=True, slots=True)
class DrainRequested(Event):
    """An operator asks this worker to drain."""

    level = "warning"
    by: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class QueueMeasured(Event):
    """The length of a queue. `waiting` is None where Redis cannot count waiting jobs.

    `oldest_s` is the age of the oldest pending job in seconds: None if no job is pending, NaN while Redis is
    unavailable.
    """

    level = "silent"
    queue: str
    waiting: int | None
    oldest_s: float | None


@dataclass(frozen=True, slots=True)
class RedisMeasured(Event):
    """The memory of Redis in bytes. `limit` is its maxmemory, or 0. NaN where it is not known."""

    level = "silent"
    used: float
    limit: float


@dataclass(frozen=True, slots=True)
class GroupRecreated(Event):
    """A queue's consumer group was missing, and this worker has created it again."""

    name = "group_made_again"
    level = "warning"
    queue: str


@dataclass(frozen=True, slots=True)
class ConsumerRemoved(Event):
    """A stale consumer without pending jobs was removed from its group."""

    queue: str
    consumer: str


@dataclass(frozen=True, slots=True)
class StoppedLeasesEnded(Event):
    level = "warning"
    queue: str
    consumer: str
    jobs: int


@dataclass(frozen=True, slots=True)
class JobsHandedOver(Event):
    jobs: int


@dataclass(frozen=True, slots=True)
class HandOverFailed(Event):
    level = "warning"
    jobs: int
    error: str


@dataclass(frozen=True, slots=True)
class ReaderGap(Event):
    """An answer that had begun was interrupted, and a reader waited for its next delta for `seconds`.

    `request_id` is empty if the event is emitted in the job's own task.
    """

    level = "silent"
    cause: GapCause
    seconds: float
    request_id: str = ""


# Writing to Redis.


@dataclass(frozen=True, slots=True)
class EntriesAccepted(Event):
    """Redis has accepted entries of token logs; emitted at most four times a second."""

    level = "silent"
    count: int


@dataclass(frozen=True, slots=True)
class WriteFailed(Event):
    level = "silent"


@dataclass(frozen=True, slots=True)
class RecordRefused(Event):
    """Redis refused a record that is not a log entry: `lifecycle`, `dead`, `workers` or `feed`."""

    level = "silent"
    record: str


@dataclass(frozen=True, slots=True)
class CancelHintsRefused(Event):
    level = "warning"
    channel: str
    error: str


@dataclass(frozen=True, slots=True)
class ControlHintsRefused(Event):
    level = "warning"
    channel: str
    error: str


# The vLLM servers.


@dataclass(frozen=True, slots=True)
class VllmAway(Event):
    level = "warning"
    endpoint: str
    reason: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class VllmBack(Event):
    endpoint: str


@dataclass(frozen=True, slots=True)
class VllmRefused(Event):
    """A server refused a request because it is full or shutting down. The request waits, or goes to another server."""

    level = "silent"
    endpoint: str


@dataclass(frozen=True, slots=True)
class VllmTriedOut(Event):
    endpoint: str


@dataclass(frozen=True, slots=True)
class KeyFileUnreadable(Event):
    level = "warning"
    error: str

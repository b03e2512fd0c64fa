"""What happens in a worker, as frozen events. This module imports nothing of the project, so that every part may emit.

The engine, the broker and the vLLM side hand events to a `Telemetry`; `worker.telemetry.metrics` counts them and
`worker.telemetry.logging` writes them down. The name of an event's class, in snake case, is its name in the log. No
event is emitted per token, and none holds a prompt, an output or a secret.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

Level = Literal["silent", "info", "warning", "error"]
"""How an event is logged; `silent` is for metrics alone."""

Outcome = Literal["done", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `name` is what the log calls it where that is not the class's own name."""

    level: ClassVar[Level] = "info"
    name: ClassVar[str] = ""


class Telemetry(Protocol):
    """A receiver of events."""

    def emit(self, event: Event) -> None:
        """Take note of an event. Emitters are in the middle of their work: this is quick and raises nothing."""


class Receivers:
    """Hands every event to each of several receivers."""

    def __init__(self, *receivers: Telemetry) -> None:
        self._receivers = receivers

    def emit(self, event: Event) -> None:
        for receiver in self._receivers:
            receiver.emit(event)


NO_TELEMETRY: Telemetry = Receivers()
"""Discards all events."""


# Trouble that lasts: told at first, then every half minute, and once more when it is over.


@dataclass(frozen=True, slots=True)
class Failing(Event):
    """Something fails and is tried again; `what` is its name in the log, `advice` how to mend it."""

    level = "warning"
    what: str
    error: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Recovered(Event):
    """What had failed works again."""

    after: str


# The process.


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
class WorkerDraining(Event):
    running: int


@dataclass(frozen=True, slots=True)
class LeaveFailed(Event):
    """Redis did not remove this worker's record and consumer in time; others drop them as stale."""

    level = "warning"
    error: str


@dataclass(frozen=True, slots=True)
class WorkerStopped(Event):
    finished: int


# Taking jobs.


@dataclass(frozen=True, slots=True)
class IntakePaused(Event):
    """The worker takes no jobs, for `reason`, or does so no more (`on` false)."""

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
class QueueMeasured(Event):
    """How a queue stands. `waiting` is None where Redis cannot tell; `oldest_s` is None where nothing is pending.

    `oldest_s` is the age of the oldest pending job in seconds, NaN where Redis does not answer.
    """

    level = "silent"
    queue: str
    waiting: int | None
    oldest_s: float | None


@dataclass(frozen=True, slots=True)
class GroupMadeAgain(Event):
    level = "warning"
    queue: str


@dataclass(frozen=True, slots=True)
class ConsumerRemoved(Event):
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


# One job.


@dataclass(frozen=True, slots=True)
class JobStarted(Event):
    """A job's first attempt begins, `waited_s` seconds after its entry in the queue."""

    level = "silent"
    waited_s: float


@dataclass(frozen=True, slots=True)
class AttemptBegun(Event):
    """`reason` is `started`, `takeover`, or the code of the fault that made another attempt necessary."""

    level = "silent"
    reason: str


@dataclass(frozen=True, slots=True)
class JobTakenOver(Event):
    attempt: int
    delivery: int


@dataclass(frozen=True, slots=True)
class DuplicateFound(Event):
    name = "duplicate_job"
    queue: str
    job: str


@dataclass(frozen=True, slots=True)
class JobTakenElsewhere(Event):
    """Another worker held the lease of a job before this one could acquire its log."""

    queue: str
    job: str


@dataclass(frozen=True, slots=True)
class FencedOff(Event):
    """Another worker has begun a later attempt of a job that runs here."""

    name = "job_taken_elsewhere"
    level = "warning"
    reason: str


@dataclass(frozen=True, slots=True)
class JobLeft(Event):
    """The job stops here without an acknowledgement; the worker that gets it next goes on."""

    reason: str
    attempt: int | None = None
    queue: str = ""
    job: str = ""


@dataclass(frozen=True, slots=True)
class JobBrokenOff(Event):
    """An error of Redis ended the run of a job; it stays pending."""

    name = "job_left"
    level = "warning"
    queue: str
    job: str
    reason: str


@dataclass(frozen=True, slots=True)
class JobFailed(Event):
    """An error inside the worker ended the run of a job; it stays pending."""

    level = "error"
    queue: str
    job: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class InternalError(Event):
    level = "error"
    error: BaseException


@dataclass(frozen=True, slots=True)
class LeaseWasLost(Event):
    level = "silent"
    queue: str
    job: str


@dataclass(frozen=True, slots=True)
class LogDivergence(Event):
    name = "log_diverged"
    level = "warning"
    reason: str


@dataclass(frozen=True, slots=True)
class LogDisappeared(Event):
    name = "log_gone"
    level = "warning"
    attempt: int


@dataclass(frozen=True, slots=True)
class AnswerResumed(Event):
    attempt: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class AnswerRestarted(Event):
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class WaitingForModel(Event):
    """A job waits for a server that can take it; emitted once for each of its models."""

    model: str = ""


@dataclass(frozen=True, slots=True)
class ModelWaitBegan(Event):
    level = "silent"


@dataclass(frozen=True, slots=True)
class ModelWaitEnded(Event):
    level = "silent"


@dataclass(frozen=True, slots=True)
class ModelGivenUp(Event):
    level = "warning"
    code: str
    model: str
    next: str


@dataclass(frozen=True, slots=True)
class UpstreamFailed(Event):
    level = "warning"
    code: str
    status: int | None
    endpoint: str
    tried: int
    retryable: bool


@dataclass(frozen=True, slots=True)
class UnknownFinishReason(Event):
    level = "warning"
    reason: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class FirstDelta(Event):
    """Emitted when the job has ended: its first delta came `after_s` seconds after its start."""

    level = "silent"
    after_s: float


@dataclass(frozen=True, slots=True)
class JobFinished(Event):
    outcome: str
    code: str | None
    attempt: int
    queue: str
    model: str
    tokens: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class JobBuried(Event):
    level = "warning"
    queue: str
    job: str
    code: str


# Writing to Redis.


@dataclass(frozen=True, slots=True)
class EntriesAccepted(Event):
    """Redis has accepted entries of token logs; emitted once a flush."""

    level = "silent"
    count: int


@dataclass(frozen=True, slots=True)
class WriteFailed(Event):
    level = "silent"


@dataclass(frozen=True, slots=True)
class RecordRefused(Event):
    """Redis refused a record beside the logs: `lifecycle`, `dead`, `workers` or `feed`."""

    level = "silent"
    record: str


@dataclass(frozen=True, slots=True)
class CancelHintsRefused(Event):
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
class VllmTriedOut(Event):
    endpoint: str


@dataclass(frozen=True, slots=True)
class KeyFileUnreadable(Event):
    level = "warning"
    error: str

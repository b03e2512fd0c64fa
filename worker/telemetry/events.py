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

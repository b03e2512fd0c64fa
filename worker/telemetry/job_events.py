"""The events of one job: its start and end, its attempts, and the servers that it tries.

The rules for all events are in `worker.telemetry.events`.
"""

from dataclasses import dataclass

from .events import Event


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
    attempt: int


@dataclass(frozen=True, slots=True)
class RequestSent(Event):
    """A request for the answer is sent to a server."""

    level = "silent"
    endpoint: str


@dataclass(frozen=True, slots=True)
class JobRunEnded(Event):
    """The worker leaves a job: it has ended, or another worker continues it. The last event of a run."""

    level = "silent"


@dataclass(frozen=True, slots=True)
class JobParked(Event):
    """A job goes back to its queue, because no server has a place for it."""

    level = "silent"


@dataclass(frozen=True, slots=True)
class JobTakenOver(Event):
    """The worker continues a job that an earlier delivery had begun."""

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
    """The worker stops the job without an acknowledgement. The next worker that gets the job continues it."""

    reason: str
    attempt: int | None = None
    queue: str = ""
    job: str = ""


@dataclass(frozen=True, slots=True)
class JobBrokenOff(Event):
    """An error of Redis ended the run of a job, which stays pending."""

    name = "job_left"
    level = "warning"
    queue: str
    job: str
    reason: str


@dataclass(frozen=True, slots=True)
class JobFailed(Event):
    """An error in the worker's own code ended the run of a job, which stays pending."""

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
    """A job waits for a server of its model. Emitted once for each of its models."""

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
    """The first delta of a job came, `after_s` seconds after its first start by any worker. Emitted once a job."""

    level = "silent"
    after_s: float


@dataclass(frozen=True, slots=True)
class AnswerStreamEnded(Event):
    """A stream of an answer has ended. `mean_gap_s` and `longest_gap_s` are seconds between its deltas."""

    level = "silent"
    mean_gap_s: float
    longest_gap_s: float


@dataclass(frozen=True, slots=True)
class JobFinished(Event):
    outcome: str
    code: str | None
    attempt: int
    queue: str
    model: str
    tokens: int | None
    seconds: float
    prompt_tokens: int | None = None
    finish_reason: str = ""


@dataclass(frozen=True, slots=True)
class JobBuried(Event):
    level = "warning"
    queue: str
    job: str
    code: str

"""The context of one delivered job: its data, the conditions that stop it, and the services shared by all jobs."""

import asyncio
import enum
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from ..broker.cluster_publisher import AnyPublisher
from ..broker.dead_letters import DeadLetterWriter
from ..broker.job_queue import Delivery, JobQueue
from ..broker.lifecycle import LifecycleWriter
from ..broker.log_writer import LogWriter
from ..broker.ownership import LogOwnership
from ..contract.ids import is_traceparent
from ..contract.job import (
    InvalidJob,
    Job,
    check_limits,
    deadline_and_retention,
    is_digest_of,
    parse_job,
    request_id_of,
)
from ..contract.job import (
    digest as digest_of,
)
from ..contract.keys import Keys
from ..redisio.errors import is_permission_denied, is_transient
from ..redisio.retry import Outage, RetryUntilAvailable
from ..settings import Settings
from ..telemetry.events import Telemetry
from ..telemetry.traces import Traces
from ..vllm.errors import UpstreamError
from ..vllm.interrupt import TaskInterrupt
from ..vllm.servers.pool import ServerPool
from ..vllm.servers.room import Demand
from .outline import DAY_MS
from .pace import Pace
from .poison import Quarantine, may_be_poison

_T = TypeVar("_T")

UNREAD = InvalidJob("the job is not read yet")
"""The placeholder for a possible poison job until its log is claimed. So a death while it is read is a failure."""


class Stop(enum.Enum):
    """Why a running job must stop before its end."""

    LEASE_LOST = "lease_lost"
    HAND_OVER = "hand_over"


class Stopped(Exception):
    """The job stops here without an acknowledgement: another worker continues it."""


class DeadlinePassed(Exception):
    """The job's deadline has passed."""


class MustWait(Exception):
    """No server has a place for the job: it goes back to its queue. All entries of its log are written.

    Attributes:
        model: the model for which the job waits.
        tries: how many tries count so far; None if there are none and the answer has not begun.
    """

    def __init__(self, model: str, tries: int | None = None) -> None:
        super().__init__(f"no server has a place for a request for `{model}`")
        self.model = model
        self.tries = tries


@dataclass(frozen=True, slots=True, kw_only=True)
class JobServices:
    """The services that all jobs of a process share. `now` returns Redis's time in Unix ms."""

    settings: Settings
    keys: Keys
    jobs: JobQueue
    ownership: LogOwnership
    lifecycle: LifecycleWriter
    dead_letters: DeadLetterWriter
    publisher: AnyPublisher
    servers: ServerPool
    quarantine: Quarantine
    telemetry: Telemetry
    outage: Outage
    now: Callable[[], int]
    pace: Pace
    traces: Traces | None = None


class JobContext:
    """One delivered job. `began` and `deadline` are Unix ms by Redis's clock, `retention` and `remember` are seconds.

    `id` is the request's id; empty if the job has no valid id. `parsed` is the job, an `InvalidJob` if it does not
    validate, or `UNREAD`. `release_slot` lets another job start before this job has ended. `demand` counts against the
    room at the servers until the job has reserved a server. `traceparent` is the trace context of the job's requests to
    vLLM, empty for none. `server` is the address of the vLLM server that last streamed to the job here, without a
    password, empty before that. `may_park` is whether the job may go back to its queue to
    wait for a server. `retry` retries until Redis answers or the job must stop.
    """

    def __init__(
        self,
        services: JobServices,
        delivery: Delivery,
        stop: "asyncio.Future[Stop]",
        release_slot: Callable[[], None],
        demand: Demand | None = None,
        *,
        may_park: bool = True,
    ) -> None:
        self._settings = settings = services.settings
        self.delivery = delivery
        self.stop = stop
        self.release_slot = release_slot
        self.demand = demand
        self.may_park = may_park
        self.retry = RetryUntilAvailable(stop=stop, waits_for=_may_pass, outage=services.outage)
        self._now = services.now
        self.began = self._now()
        self.id = self._digest = self.traceparent = self.server = ""
        self.parsed: Job | InvalidJob = UNREAD
        deadline = retention = None
        try:
            self.id = request_id_of(delivery.fields)
            deadline, retention = deadline_and_retention(delivery.fields)
        except InvalidJob as problem:
            if not self.id:
                self.parsed = problem
        self.deadline = deadline or delivery.enqueued + DAY_MS
        self.retention = retention or settings.retention
        self.remember = max(settings.remember, self.retention)
        if not may_be_poison(delivery, settings.max_deliveries):
            self.parse()

    def parse(self) -> None:
        """Parse and check the job, unless that was done."""
        if self.parsed is not UNREAD:
            return
        settings = self._settings
        try:
            job = parse_job(self.delivery.fields, settings.max_request_bytes)
            check_limits(job.request, max_choices=settings.max_choices, max_tokens=settings.max_tokens)
        except InvalidJob as problem:
            self.parsed = problem
        else:
            self.parsed = job
            self.traceparent = job.traceparent if is_traceparent(job.traceparent) else ""

    @property
    def digest(self) -> str:
        """The digest of the request; empty if the request cannot be read."""
        if not self._digest and isinstance(self.parsed, Job):
            self._digest = digest_of(self.parsed.request, self.parsed.fallbacks)
        return self._digest

    def may_have_digest(self, known: str) -> bool:
        """Whether a log with this digest may belong to the same request. True if either digest is unknown."""
        job = self.parsed
        return not isinstance(job, Job) or not known or is_digest_of(known, job.request, job.fallbacks)

    def expires_at(self, now: int) -> int:
        """When a log that is never sealed expires, in Unix ms."""
        return max(self.deadline, now) + self.retention * 1000

    async def wait_for(self, event: "asyncio.Future[_T]") -> _T:
        """Wait for an event that Redis delays while it is full or does not answer.

        Raises:
            Stopped: when the job must stop before the event. The future then has this exception.
            Exception: the error of the future.
        """

        def end(_: object) -> None:
            if not event.done():
                event.set_exception(Stopped())

        self.stop.add_done_callback(end)
        try:
            return await event
        finally:
            self.stop.remove_done_callback(end)

    async def within_limits(self, work: Coroutine[object, object, _T], log: LogWriter) -> _T:
        """Do work that vLLM may delay, until the log is lost, the job must stop or the deadline passes.

        Raises:
            DeadlinePassed: when the deadline passes before the work is done.
            LogLost: when the log is lost before.
            Stopped: when the job must stop before.
        """
        limits: tuple[asyncio.Future[Any], ...] = (log.lost, self.stop)
        left = (self.deadline - self._now()) / 1000
        if left <= 0 or any(limit.done() for limit in limits):
            work.close()  # before its first step, so that vLLM gets no useless request
            self._check(log)
            raise DeadlinePassed
        wait = TaskInterrupt()  # cheaper than a task to wait for
        timer = self.stop.get_loop().call_later(left, wait.interrupt)
        try:
            with wait:
                for limit in limits:
                    limit.add_done_callback(wait.interrupt)
                result = await work
        except (TimeoutError, UpstreamError):
            self._check(log)
            if wait.has_come:
                raise DeadlinePassed from None
            raise
        finally:
            timer.cancel()
            for limit in limits:
                limit.remove_done_callback(wait.interrupt)
        self._check(log)
        return result

    def _check(self, log: LogWriter) -> None:
        if log.loss is not None or self.stop.done():
            raise log.loss or Stopped


def _may_pass(error: BaseException) -> bool:
    """Whether a job is retried after an error. An operator may grant a missing permission, which is not its fault."""
    return is_transient(error) or is_permission_denied(error)

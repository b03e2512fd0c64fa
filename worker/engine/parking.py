"""Parking: gives jobs that have no place at a vLLM server back to their queue, where they wait for any worker."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from redis.exceptions import RedisError, ResponseError

from ..broker.job_queue import Delivery
from ..broker.parked_jobs import ParkedJob, ParkedJobs
from ..redisio.errors import is_transient
from ..redisio.retry import failing
from ..telemetry.events import Recovered, Telemetry
from ..telemetry.job_events import JobParked
from .admission import Admission
from .job_context import MustWait
from .lines import KnownLines
from .outline import JobOutline, line_name, outline_of

_REFUSED_FOR = 30.0
"""Seconds for which no job is parked after Redis has refused the commands for it."""

_WHAT = "park_failed"


@dataclass(frozen=True, slots=True)
class JobToPark:
    """A job that must wait."""

    delivery: Delivery
    outline: JobOutline


class Parking:
    """Parks jobs. If Redis refuses the commands, jobs wait in their slots instead, and none is lost."""

    def __init__(self, parked: ParkedJobs, lines: KnownLines, admission: Admission, telemetry: Telemetry) -> None:
        self._parked = parked
        self.lines = lines
        self.admission = admission
        self._telemetry = telemetry
        self._refused_until = float("-inf")
        self._is_refused = False

    @property
    def is_possible(self) -> bool:
        """Whether jobs can be parked, as far as is known."""
        return time.monotonic() >= self._refused_until

    def refuse(self, error: Exception) -> None:
        """Record that Redis has refused a command that parked jobs need. Other errors do not count."""
        if isinstance(error, ResponseError) and not is_transient(error) and "NOGROUP" not in str(error):
            self._refused_until = time.monotonic() + _REFUSED_FOR
            self._is_refused = True
            self._telemetry.emit(failing(_WHAT, error))

    async def park(self, jobs: Sequence[JobToPark]) -> list[bool | Exception]:
        """Park jobs. Returns for each whether this worker still had the job, or the error if it was not parked."""
        parked = [
            ParkedJob(job.delivery, job.outline.tenant, line_name(job.outline.models), job.outline.deadline)
            for job in jobs
        ]
        try:
            results = await self._parked.park(parked)
        except (RedisError, OSError) as error:
            results = [error] * len(jobs)
        for job, given, result in zip(jobs, parked, results, strict=True):
            if result is True:
                self.lines.on_parked(given, job.outline)
                self._telemetry.emit(JobParked())
        if refusal := next((result for result in results if isinstance(result, Exception)), None):
            self.refuse(refusal)
        elif self._is_refused:
            self._is_refused = False
            self._telemetry.emit(Recovered(_WHAT))
        return results

    async def park_started(self, delivery: Delivery, wait: MustWait) -> bool | Exception:
        """Park a job that was started here and waits for a server of its model, or of one of its fallbacks."""
        outline = outline_of(delivery)
        if outline is None:
            return ValueError("the job has no outline")
        if wait.model in outline.models:
            place = outline.models.index(wait.model)
            outline = JobOutline(outline.models[place:], outline.tenant, outline.deadline)
        self.admission.on_parked(outline.models[0])
        (result,) = await self.park([JobToPark(replace(delivery, tries=wait.tries), outline)])
        return result

    def on_ended(self, model: str) -> None:
        """Record that a job of this model has ended here."""
        self.admission.on_ended(model)

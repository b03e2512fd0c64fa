"""Take-over: continues the jobs of workers that have died, and jobs that workers have handed over."""

import asyncio
from functools import partial

from ..broker.job_queue import JobQueue
from ..redisio.retry import Backoff
from ..settings import Settings
from ..telemetry.events import Telemetry
from .intake import JobIntake
from .pace import Pace, sleep_unless_set

_BEFORE_ALL_QUEUES = -1
"""The rank of jobs that other workers have begun."""


class TakeOver:
    """Searches the queues for jobs that no worker has any more, and starts them through the intake."""

    def __init__(
        self, settings: Settings, jobs: JobQueue, intake: JobIntake, *, pace: Pace, telemetry: Telemetry
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._intake = intake
        self._pace = pace
        self._telemetry = telemetry
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Take over no more jobs."""
        self._stopping.set()

    async def run(self) -> None:
        """Take over jobs whose lease has expired, until stopped.

        After a search that finds jobs, the next search follows at once.
        """
        pause = min(self._pace.scan_every, self._settings.lease / 3)
        backoff = Backoff("take_over_failed", self._telemetry, first=pause)
        found = 0
        while await sleep_unless_set(self._stopping, 0 if found else pause):
            found = 0
            for queue in self._settings.queues:
                fetch = partial(self._jobs.claim_expired, queue)
                found += await self._intake.fill_slots(_BEFORE_ALL_QUEUES, backoff, fetch) or 0

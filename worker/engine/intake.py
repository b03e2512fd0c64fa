"""Intake: takes jobs for free slots. It pauses while jobs could not be done."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..broker.job_queue import Delivery, JobQueue
from ..redisio.errors import is_connection_refused, is_login_refused, is_transient
from ..redisio.retry import Backoff
from ..settings import Settings
from ..telemetry.events import ClaimsPaused, ClaimsResumed, IntakePaused, Telemetry
from ..telemetry.logging import REPEAT_AFTER
from ..vllm.servers.pool import ServerPool
from .pace import Pace, sleep_unless_set
from .running_jobs import RunningJobs
from .slots import Slots

NO_VLLM = "no_vllm"
REDIS_FULL = "redis_full"
REDIS_REFUSES = "redis_refuses"
REDIS_LOGIN = "redis_login"
REDIS_AWAY = "redis_away"
"""Why no jobs are taken: no vLLM server is available; Redis has no memory left; Redis refuses writes or connections for
another reason; Redis refuses the password or the user; Redis does not answer."""


def reason_of(error: RedisError | OSError) -> str:
    """The reason for a pause after an error of Redis; empty for the refusal of a single command."""
    if is_login_refused(error):
        return REDIS_LOGIN
    if is_connection_refused(error):
        return REDIS_REFUSES
    return "" if isinstance(error, ResponseError) else REDIS_AWAY


class JobIntake:
    """Fills the slots of a process with jobs. `block` is how many seconds a read waits for a job."""

    def __init__(
        self,
        settings: Settings,
        jobs: JobQueue,
        servers: ServerPool,
        running_jobs: RunningJobs,
        slots: Slots,
        *,
        block: float,
        pace: Pace,
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._servers = servers
        self._running_jobs = running_jobs
        self._slots = slots
        self._block_ms = int(block * 1000)
        self._pace = pace
        self._telemetry = telemetry
        self._stopping = asyncio.Event()
        self.paused = ""
        """Why no jobs are taken now; empty while jobs are taken."""
        self._logged_pause = ""
        self._logged_at: dict[str, float] = {}
        """When each reason was last logged, by the monotonic clock in seconds."""

    def stop(self) -> None:
        """Take no more jobs."""
        self._stopping.set()
        self._slots.close()

    async def take_new(self, rank: int, queue: str) -> None:
        """Take new jobs of a queue until the intake stops. A lower rank is more important.

        A read in flight is never cancelled: the jobs that it returns would wait until their lease ends.
        """
        backoff = Backoff("claim_failed", self._telemetry)
        fetched: int | None = 0
        while fetched is not None:
            fetch = partial(self._jobs.read_new, queue, block_ms=self._block_ms)
            fetched = await self.fill_slots(rank, backoff, fetch)

    async def fill_slots(
        self, rank: int, backoff: Backoff, fetch: Callable[[int], Awaitable[list[Delivery]]]
    ) -> int | None:
        """Wait for free slots and fetch jobs for them, once. Returns the number of jobs; None when the intake stops.

        A lower rank is more important.
        """
        count = await self._slots.reserve(rank)
        if not count:
            return None
        deliveries: list[Delivery] = []
        failure, sent = None, 0.0
        try:
            self._pause_for(await self._reason_to_pause())
            if not self.paused:
                sent = time.monotonic()
                deliveries = await fetch(count)
        except (RedisError, OSError) as error:
            failure = error
            if reason := reason_of(error):
                self._pause_for(reason)
            if isinstance(error, RedisTimeoutError):
                self._slots.adapt(too_slow=True)
        if deliveries:
            took = time.monotonic() - sent - self._block_ms / 1000  # a read may have waited for its first job
            self._slots.adapt(too_slow=took > self._settings.lease / 3)
        self._slots.release(count - self._running_jobs.start(deliveries, sent))
        if failure is not None:
            await backoff.wait(failure)
            return 0
        backoff.reset()
        if self.paused == NO_VLLM:
            await self._wait_for_vllm()
        elif self.paused:
            await sleep_unless_set(self._stopping, self._pace.recheck_writes_after)
        return len(deliveries)

    async def _reason_to_pause(self) -> str:
        """Why a job that is taken now could not be done; empty if it could. Any worker can take it from the queue."""
        if not self._servers.is_available:
            return NO_VLLM
        try:
            await self._jobs.probe_writable()
        except ResponseError as error:
            if is_transient(error):
                return REDIS_FULL if isinstance(error, OutOfMemoryError) else REDIS_REFUSES
            # A missing right to the probed key alone is no reason. Other missing rights are reported by their commands.
        return ""

    def _pause_for(self, reason: str) -> None:
        """Begin a pause for a reason. An empty reason ends the pause."""
        if reason != self.paused:
            if self.paused:
                self._telemetry.emit(IntakePaused(self.paused, on=False))
            if reason:
                self._telemetry.emit(IntakePaused(reason, on=True))
            self.paused = reason
        self._log_pause("" if reason in (NO_VLLM, REDIS_AWAY) else reason)  # those two are logged elsewhere

    def _log_pause(self, reason: str) -> None:
        """Log each reason at most every half minute: a Redis with little free memory refuses some writes."""
        if reason == self._logged_pause:
            return
        if self._logged_pause:
            self._telemetry.emit(ClaimsResumed(self._logged_pause))
            self._logged_pause = ""
        now = time.monotonic()
        if reason and now - self._logged_at.get(reason, float("-inf")) > REPEAT_AFTER:
            self._telemetry.emit(ClaimsPaused(reason))
            self._logged_pause, self._logged_at[reason] = reason, now

    async def _wait_for_vllm(self) -> None:
        waiting = {
            asyncio.ensure_future(self._servers.wait_available("")),
            asyncio.ensure_future(self._stopping.wait()),
        }
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

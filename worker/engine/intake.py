"""Taking jobs: new ones and those of dead workers, for free slots, and none while they could not be done."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import structlog
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..broker.job_queue import Delivery, JobQueue
from ..redisio.clients import SAY_AGAIN, Backoff
from ..redisio.errors import is_transient
from ..settings import Settings
from ..telemetry.metrics import Metrics
from ..vllm.servers.pool import ServerPool
from .running_jobs import RunningJobs
from .slots import Slots

NO_VLLM = "no_vllm"
REDIS_FULL = "redis_full"
REDIS_REFUSES = "redis_refuses"
REDIS_AWAY = "redis_away"
"""Why no jobs are taken: no server is there; Redis has no memory for more; it takes no writes for another reason; it
does not answer."""

_BEFORE_ALL_QUEUES = -1
_SCAN_EVERY = 0.5
"""Seconds: what a worker hands over as it leaves goes on within one. After a find more is looked for at once."""

_LOOK_AGAIN = 0.5
"""Seconds until a Redis that takes no writes is asked again."""

_log = structlog.get_logger()


class JobIntake:
    """Fills the slots of a process. `block` is how many seconds a read waits for a job."""

    def __init__(
        self,
        settings: Settings,
        jobs: JobQueue,
        upstream: ServerPool,
        leases: RunningJobs,
        slots: Slots,
        *,
        block: float,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._upstream = upstream
        self._leases = leases
        self._slots = slots
        self._block_ms = int(block * 1000)
        self._metrics = metrics
        self._leaving = asyncio.Event()
        self.paused = ""
        """Why no jobs are taken at the moment, or nothing."""
        self._told = ""
        self._told_at: dict[str, float] = {}

    def leave(self) -> None:
        """Take no more jobs."""
        self._leaving.set()
        self._slots.close()

    async def read(self, rank: int, queue: str) -> None:
        """Take new jobs of a queue until told to leave; a lower rank is more important.

        A read in flight is never cancelled: the jobs it brings would wait for their lease to end.
        """
        backoff = Backoff("claim_failed")
        while await self._fill(rank, backoff, lambda count: self._jobs.read_new(queue, count, self._block_ms)):
            pass

    async def take_over(self) -> None:
        """Take jobs whose worker has let their lease run out, until told to leave."""
        pause = min(_SCAN_EVERY, self._settings.lease / 3)
        backoff = Backoff("take_over_failed", first=pause)
        took = False

        async def take(queue: str, count: int) -> list[Delivery]:
            nonlocal took
            deliveries = await self._jobs.claim_expired(queue, count)
            took = took or bool(deliveries)
            return deliveries

        while await self._rest(0 if took else pause):
            took = False
            for queue in self._settings.queues:
                await self._fill(_BEFORE_ALL_QUEUES, backoff, partial(take, queue))

    async def _fill(self, rank: int, backoff: Backoff, take: Callable[[int], Awaitable[list[Delivery]]]) -> bool:
        """Wait for free slots and take jobs for them, once; false when no more are to be taken."""
        count = await self._slots.reserve(rank)
        if not count:
            return False
        deliveries: list[Delivery] = []
        failure, sent = None, 0.0
        try:
            self._pause_for(await self._obstacle())
            if not self.paused:
                sent = time.monotonic()
                deliveries = await take(count)
        except (RedisError, OSError) as error:
            failure = error
            if not isinstance(error, ResponseError):
                self._pause_for(REDIS_AWAY)
            if isinstance(error, RedisTimeoutError):
                self._slots.adapt(too_slow=True)
        if deliveries:
            took = time.monotonic() - sent - self._block_ms / 1000  # a read may have waited for its first job
            self._slots.adapt(too_slow=took > self._settings.lease / 3)
        self._slots.release(count - self._leases.begin(deliveries, sent))
        if failure is not None:
            await backoff.wait(failure)
            return True
        backoff.reset()
        if self.paused == NO_VLLM:
            await self._until_vllm_is_there()
        elif self.paused:
            await self._rest(_LOOK_AGAIN)
        return True

    async def _obstacle(self) -> str:
        """Why a job that is taken now could not be done: it waits in the queue then, where any worker can take it."""
        if not self._upstream.is_available:
            return NO_VLLM
        try:
            await self._jobs.probe_writable()
        except ResponseError as error:
            if is_transient(error):
                return REDIS_FULL if isinstance(error, OutOfMemoryError) else REDIS_REFUSES
        return ""  # also where a right to this one key is missing: whoever must write will say so

    def _pause_for(self, reason: str) -> None:
        if reason != self.paused:
            for one, on in ((self.paused, False), (reason, True)):
                if one:
                    self._metrics.paused(one, on=on)
            self.paused = reason
        self._tell("" if reason in (NO_VLLM, REDIS_AWAY) else reason)  # of these the log tells already

    def _tell(self, reason: str) -> None:
        if reason == self._told:
            return
        if self._told:
            _log.warning("claims_resumed", reason=self._told)
            self._told = ""
        now = time.monotonic()
        # At the edge of its memory Redis refuses now and then.
        if reason and now - self._told_at.get(reason, float("-inf")) > SAY_AGAIN:
            _log.warning("claims_paused", reason=reason)
            self._told, self._told_at[reason] = reason, now

    async def _until_vllm_is_there(self) -> None:
        waiting = {
            asyncio.ensure_future(self._upstream.wait_available("")),
            asyncio.ensure_future(self._leaving.wait()),
        }
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

    async def _rest(self, seconds: float) -> bool:
        """Pause; false when told to leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._leaving.wait()
        return not self._leaving.is_set()

"""What a worker does three times a lease: it keeps its jobs, shows that it lives, measures, and clears up."""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress

from redis.exceptions import RedisError, ResponseError

from ..broker.cluster_publisher import AnyPublisher
from ..broker.dead_letters import DeadLetterWriter
from ..broker.job_queue import JobQueue
from ..broker.worker_registry import WorkerRegistry
from ..contract.records import WorkerRecord
from ..redisio.clients import Backoff
from ..redisio.clock import Clock
from ..settings import Settings
from ..telemetry.metrics import Metrics
from .running_jobs import RunningJobs

_STALE = 10
"""A worker that has not shown itself for so many leases is gone."""
_SILENT = 2
"""After so many leases without a new beat a worker's jobs are looked at: Redis's clock may hide that they are left."""


class Maintenance:
    """Keeps a process in order. `line` is how it shows itself."""

    def __init__(  # noqa: PLR0913 - it looks after all of these
        self,
        settings: Settings,
        *,
        jobs: JobQueue,
        leases: RunningJobs,
        registry: WorkerRegistry,
        dead_letters: DeadLetterWriter,
        publisher: AnyPublisher,
        clock: Clock,
        line: Callable[[], WorkerRecord],
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._leases = leases
        self._registry = registry
        self._dead_letters = dead_letters
        self._publisher = publisher
        self._clock = clock
        self._line = line
        self._metrics = metrics
        self._pause = settings.lease / 3
        self._swept = 0.0
        self._beats: dict[str, int] = {}
        self._unchanged: dict[str, tuple[int | None, float]] = {}
        """Of each consumer with jobs its last beat, and since when it is that; by the monotonic clock."""
        self._without_idle: dict[tuple[str, str], set[str]] = {}
        """Of each queue and consumer the jobs that showed no idle time at the last look."""
        self._over = asyncio.Event()

    def leave(self) -> None:
        """Come to an end."""
        self._over.set()

    async def keep_leases(self) -> None:
        """Renew the leases and look at the logs; nothing else may delay it, least of all a Redis that is full."""
        backoff = Backoff("renewal_failed", most=self._pause / 2)
        while await self._rest():
            try:
                if await self._leases.renew():  # else Redis was not asked, and may be away still
                    backoff.reset()
            except (RedisError, OSError) as error:
                await backoff.wait(error)
            self._publisher.verify_idle()

    async def stop_expired(self) -> None:
        """Stop the jobs whose lease ends, on time: a renewal that Redis does not answer takes some seconds."""
        wait = self._pause
        due = time.monotonic() + wait
        while await self._rest(wait):
            now, wait = time.monotonic(), self._pause
            if now - due < self._pause:  # else this process stood still, and a renewal comes first
                wait = min(wait, self._leases.stop_expired())
            due = now + wait

    async def keep_house(self) -> None:
        """Show that this worker lives, measure, and clear up; at once, and then time and again."""
        duties = {
            Backoff("clock_failed"): self._clock.sync,
            Backoff("trim_failed"): self._trim,
            Backoff("measure_failed"): self._measure,
            Backoff("beat_failed"): self._beat,
            Backoff("expire_failed"): self._expire_stopped,
            Backoff("forget_failed"): self._forget,
            Backoff("sweep_failed"): self._sweep,
        }
        is_over = False
        while not is_over:
            for backoff, duty in duties.items():
                try:
                    await duty()
                    backoff.reset()
                except (RedisError, OSError) as error:
                    is_away = not isinstance(error, ResponseError)
                    if is_away:
                        for queue in self._settings.queues:
                            self._metrics.queue(queue, None, math.nan)
                    await backoff.wait(error)
                    if is_away:
                        break  # a Redis that only refuses this may take the next, as when it is full
            is_over = not await self._rest()

    async def _trim(self) -> None:
        for queue in list(self._leases.to_trim):
            await self._jobs.trim(queue)
            self._leases.to_trim.discard(queue)

    async def _measure(self) -> None:
        for queue in self._settings.queues:
            depth = await self._jobs.depth(queue)
            oldest = None if depth.oldest is None else max(0, self._clock.now() - depth.oldest) / 1000
            self._metrics.queue(queue, depth.waiting, oldest)

    async def _beat(self) -> None:
        self._beats = await self._registry.beat(self._line(), stale_after=_STALE * self._settings.lease)

    async def _expire_stopped(self) -> None:
        """End leases that are not renewed and whose idle time stands still: of silent workers, and of jobs lost here.

        Redis's clock may step back, or a failover go to a host that is behind. A job then has no idle time until that
        clock has reached the time of its delivery, and XAUTOCLAIM does not take it. A job whose lease is renewed shows
        none only in the millisecond of its renewal, so one that shows none at two looks in a row is not renewed.
        """
        now, own = time.monotonic(), self._line().name
        unchanged: dict[str, tuple[int | None, float]] = {}
        without_idle: dict[tuple[str, str], set[str]] = {}
        for queue in self._settings.queues:
            for name in await self._jobs.busy_consumers(queue):
                beat = self._beats.get(name)
                known, since = self._unchanged.get(name, (beat, now))
                unchanged[name] = beat, since if beat == known else now
                if name != own and now - unchanged[name][1] < _SILENT * self._settings.lease:
                    continue
                ids = await self._jobs.jobs_without_idle_time(queue, name) - self._leases.running_in(queue)
                if stopped := ids & self._without_idle.get((queue, name), set()):
                    await self._jobs.end_leases(queue, name, stopped)
                without_idle[queue, name] = ids - stopped
        self._unchanged, self._without_idle = unchanged, without_idle

    async def _forget(self) -> None:
        await self._dead_letters.drop_older(self._clock.now() - self._settings.dead_retention * 1000)

    async def _sweep(self) -> None:
        """Remove the consumers of workers that are gone, which nobody else does where one was killed."""
        stale = _STALE * self._settings.lease
        if time.monotonic() - self._swept < stale:
            return
        alive = await self._registry.names()
        for queue in self._settings.queues:
            await self._jobs.remove_stale_consumers(queue, alive, stale)
        self._swept = time.monotonic()

    async def _rest(self, seconds: float | None = None) -> bool:
        """Pause, for a third of a lease where no seconds are given; false when all is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._pause if seconds is None else seconds):
                await self._over.wait()
        return not self._over.is_set()

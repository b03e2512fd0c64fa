"""Maintenance, three times a lease: lease renewal, heartbeat, sampling, trimming, cleaning up after dead workers."""

import asyncio
import math
import time
from collections.abc import Callable

from redis.exceptions import RedisError, ResponseError

from ..broker.cluster_publisher import AnyPublisher
from ..broker.dead_letters import DeadLetterWriter
from ..broker.job_queue import JobQueue
from ..broker.lifecycle_retention import LifecycleTrimmer
from ..broker.worker_registry import WorkerRegistry
from ..contract.records import WorkerRecord
from ..redisio.clock import Clock
from ..redisio.retry import Backoff
from ..settings import Settings
from ..telemetry.events import QueueMeasured, RedisMeasured, Telemetry
from .pace import sleep_unless_set
from .running_jobs import RunningJobs

_STALE_AFTER = 10
"""Leases without a heartbeat after which a worker counts as dead."""

_SILENT_AFTER = 2
"""Leases without a new heartbeat after which a worker's jobs are inspected: Redis's clock may hide expired leases."""


class Maintenance:
    """Renews leases, and cleans up data of workers in Redis. `record` returns this worker's record."""

    def __init__(  # noqa: PLR0913 - it maintains all of these
        self,
        settings: Settings,
        *,
        jobs: JobQueue,
        running_jobs: RunningJobs,
        registry: WorkerRegistry,
        lifecycle: LifecycleTrimmer,
        dead_letters: DeadLetterWriter,
        publisher: AnyPublisher,
        clock: Clock,
        record: Callable[[], WorkerRecord],
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._running_jobs = running_jobs
        self._registry = registry
        self._lifecycle = lifecycle
        self._dead_letters = dead_letters
        self._publisher = publisher
        self._clock = clock
        self._record = record
        self._telemetry = telemetry
        self._interval = settings.lease / 3
        self._swept_at = 0.0
        self._heartbeats: dict[str, int] = {}
        self._unchanged: dict[str, tuple[int | None, float]] = {}
        """The last heartbeat of each consumer with jobs, and when it was first seen (monotonic clock)."""
        self._without_idle_time: dict[tuple[str, str], set[str]] = {}
        """The jobs of each queue and consumer that had no idle time when last inspected."""
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Stop all loops."""
        self._stopping.set()

    async def keep_leases(self) -> None:
        """Renew the leases and verify idle logs until stopped. No other duty may delay this, as with a full Redis."""
        backoff = Backoff("renewal_failed", self._telemetry, most=self._interval / 4)
        while await sleep_unless_set(self._stopping, self._interval):
            try:
                if await self._running_jobs.renew_all():
                    backoff.reset()  # not without leases, since no command was then sent to Redis
            except (RedisError, OSError) as error:
                await backoff.wait(error)
            self._publisher.verify_idle()

    async def run_duties(self) -> None:
        """Send the heartbeat, sample the queues and clean up: at once, and then three times a lease until stopped."""
        duties = {
            Backoff("clock_failed", self._telemetry): self._clock.sync,
            Backoff("trim_failed", self._telemetry): self._trim,
            Backoff("lifecycle_trim_failed", self._telemetry): self._lifecycle.trim,
            Backoff("measure_failed", self._telemetry): self._sample,
            Backoff("beat_failed", self._telemetry): self._send_heartbeat,
            Backoff("queues_failed", self._telemetry): self._add_queues,
            Backoff("expire_failed", self._telemetry): self._end_stopped_leases,
            Backoff("forget_failed", self._telemetry): self._drop_old_dead_letters,
            Backoff("sweep_failed", self._telemetry): self._remove_stale_consumers,
        }
        while True:
            for backoff, duty in duties.items():
                try:
                    await duty()
                    backoff.reset()
                except (RedisError, OSError) as error:
                    is_away = not isinstance(error, ResponseError)
                    if is_away:
                        for queue in self._settings.queues:
                            self._telemetry.emit(QueueMeasured(queue, None, math.nan))
                        self._telemetry.emit(RedisMeasured(math.nan, math.nan))
                    await backoff.wait(error)
                    if is_away:
                        break  # a Redis that only refuses this duty, as when it is full, may accept the next
            if not await sleep_unless_set(self._stopping, self._interval):
                return

    async def _trim(self) -> None:
        for queue in list(self._running_jobs.to_trim):
            await self._jobs.trim(queue)
            self._running_jobs.to_trim.discard(queue)

    async def _sample(self) -> None:
        self._telemetry.emit(RedisMeasured(*await self._jobs.memory()))
        for queue in self._settings.queues:
            depth = await self._jobs.depth(queue)
            oldest = None if depth.oldest is None else max(0, self._clock.now() - depth.oldest) / 1000
            self._telemetry.emit(QueueMeasured(queue, depth.waiting, oldest))

    async def _send_heartbeat(self) -> None:
        stale_after = _STALE_AFTER * self._settings.lease
        self._heartbeats = await self._registry.beat(self._record(), stale_after=stale_after)

    async def _add_queues(self) -> None:
        await self._registry.add_queues(self._settings.queues)

    async def _end_stopped_leases(self) -> None:
        """End leases that no worker renews though Redis reports no idle time for them.

        These are jobs of silent workers, and jobs that this process lost. Redis's clock may be set back, or a failover
        may lead to a host whose clock is behind. A job then has no idle time until that clock has reached the time of
        its delivery, and no worker takes the job over. A job whose lease is renewed has no idle time only in the
        millisecond of its renewal. So a job without idle time in two inspections in a row is not renewed.
        """
        now, own = time.monotonic(), self._record().name
        unchanged: dict[str, tuple[int | None, float]] = {}
        without_idle: dict[tuple[str, str], set[str]] = {}
        for queue in self._settings.queues:
            for name in await self._jobs.busy_consumers(queue):
                beat = self._heartbeats.get(name)
                known, since = self._unchanged.get(name, (beat, now))
                unchanged[name] = beat, since if beat == known else now
                if name != own and now - unchanged[name][1] < _SILENT_AFTER * self._settings.lease:
                    continue
                ids = await self._jobs.jobs_without_idle_time(queue, name) - self._running_jobs.ids_in(queue)
                if stopped := ids & self._without_idle_time.get((queue, name), set()):
                    await self._jobs.end_leases(queue, name, stopped)
                without_idle[queue, name] = ids - stopped
        self._unchanged, self._without_idle_time = unchanged, without_idle

    async def _drop_old_dead_letters(self) -> None:
        await self._dead_letters.drop_older(self._clock.now() - self._settings.dead_retention * 1000)

    async def _remove_stale_consumers(self) -> None:
        """Remove the consumers of workers that were killed."""
        stale = _STALE_AFTER * self._settings.lease
        if time.monotonic() - self._swept_at < stale:
            return
        alive = await self._registry.names()
        for queue in self._settings.queues:
            await self._jobs.remove_stale_consumers(queue, alive, stale)
        self._swept_at = time.monotonic()

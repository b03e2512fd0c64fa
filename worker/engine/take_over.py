"""Take-over: continues the jobs of workers that have died, and jobs that workers have handed over."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from redis.exceptions import RedisError, ResponseError

from ..broker.abandoned_jobs import AbandonedJobs
from ..broker.consumers import HANDED_OVER, ConsumerState, is_pseudo_consumer
from ..broker.job_queue import Delivery
from ..broker.parked_jobs import lines_among
from ..redisio.errors import is_transient
from ..redisio.retry import Backoff
from ..settings import Settings
from ..telemetry.events import Telemetry
from .intake import JobIntake
from .lines import KnownLines
from .pace import Pace, sleep_unless_set
from .running_jobs import RunningJobs

_BEFORE_ALL_QUEUES = -1
"""The rank of jobs that other workers have begun."""

_LONGEST_SLOWNESS = 2
"""Leases for which a Redis that answers slowly counts as an outage. After that it is just slow."""

_MOST_ROUNDS = 64
"""The most claims in a row that get no job. Other workers have got the listed jobs, or they were deleted."""


class OutageHoldOff:
    """Decides when an outage of Redis is so recent that an expired lease says nothing about its owner. No I/O.

    Owners renew their leases when Redis answers again. Until half a lease after the outage, their jobs must therefore
    not be taken over. A process that has just started cannot know of an outage, and begins with a hold-off too.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = lease
        self._clock = clock
        self._until = clock() + lease / 2
        self._is_away = False
        self._slow_since: float | None = None

    @property
    def holds(self) -> bool:
        """Whether expired leases must not be taken over now."""
        return self._is_away or self._clock() < self._until

    def on_failure(self) -> None:
        """Record that Redis did not answer."""
        self._is_away = True
        self._slow_since = None

    def on_reply(self, took: float) -> None:
        """Record that Redis has answered after `took` seconds."""
        now = self._clock()
        if self._is_away:
            self._is_away = False
            self._until = now + self._lease / 2
        if took <= min(1.0, self._lease / 6):
            self._slow_since = None
            return
        if self._slow_since is None or took > self._lease / 2:
            self._slow_since = now
        if now - self._slow_since <= _LONGEST_SLOWNESS * self._lease:
            self._until = now + self._lease / 2


class SilenceForecast:
    """Decides when the idle times of a queue's workers must be read, because some may be silent. No I/O.

    An idle time begins again when the worker gets or renews a job, and only then. So a worker cannot become silent
    before the rest of the lease has passed since its idle time was read. A worker without a known idle time has got
    its jobs since the previous list of the workers that have jobs.
    """

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = lease
        self._clock = clock
        self._listed_at = float("-inf")
        self._idle_since: dict[str, float] = {}
        """When the idle time of each worker that has jobs began, at the earliest."""

    def on_listed(self, workers: Iterable[str], sent: float) -> None:
        """Record which workers have jobs. The list was requested at `sent`, by the clock."""
        self._idle_since = {name: self._idle_since.get(name, self._listed_at) for name in workers}
        self._listed_at = sent

    @property
    def may_be_silent(self) -> bool:
        """Whether a worker that has jobs may have been idle for a lease."""
        return self._clock() - min(self._idle_since.values(), default=float("inf")) > self._lease

    def on_read(self, idle: Mapping[str, float], sent: float) -> set[str]:
        """Record idle times in seconds, which were requested at `sent`. Returns the workers that are silent."""
        self._idle_since = {
            name: sent - idle[name] if name in idle else since for name, since in self._idle_since.items()
        }
        return {name for name in self._idle_since if idle.get(name, 0) > self._lease}


class TakeOver:
    """Searches the queues for jobs that no worker has any more, and starts them through the intake."""

    def __init__(
        self,
        settings: Settings,
        abandoned: AbandonedJobs,
        running_jobs: RunningJobs,
        intake: JobIntake,
        lines: KnownLines,
        *,
        pace: Pace,
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._abandoned = abandoned
        self._running_jobs = running_jobs
        self._intake = intake
        self._lines = lines
        self._pace = pace
        self._backoff = Backoff("take_over_failed", telemetry, first=self._pause, most=2 * self._pause)
        self._hold_off = OutageHoldOff(settings.lease)
        self._forecasts: defaultdict[str, SilenceForecast] = defaultdict(partial(SilenceForecast, settings.lease))
        """The forecast for each queue."""
        self._searches = 0
        self._last_looked_at: dict[str, str] = {}
        """For each queue, the consumer that was last looked at though it is not silent."""
        self._is_stopping = False
        self._woken = asyncio.Event()

    @property
    def _pause(self) -> float:
        return min(self._pace.scan_every, self._settings.lease / 3)

    def stop(self) -> None:
        """Take over no more jobs."""
        self._is_stopping = True
        self._woken.set()

    def search_now(self) -> None:
        """Let the next search follow at once: a worker has handed jobs over."""
        self._woken.set()

    async def run(self) -> None:
        """Take over jobs that workers have handed over, or whose lease has expired, until stopped.

        The next search follows at once if one finds jobs, or if a worker says that it has handed jobs over. Each search
        looks at one consumer of one queue that is not silent: a live worker may have lost jobs, and workers of earlier
        versions hand jobs over under their own names.
        """
        self._hold_off = OutageHoldOff(self._settings.lease)
        queues, found = self._settings.queues, 0
        while True:
            await sleep_unless_set(self._woken, 0 if found else self._pause)
            if self._is_stopping:
                return
            self._woken.clear()
            found, self._searches = 0, self._searches + 1
            for number, queue in enumerate(queues):
                found += await self._search(queue, looks_at_live=self._searches % len(queues) == number)

    async def _search(self, queue: str, *, looks_at_live: bool) -> int:
        """Take over jobs of one queue. Returns how many."""
        sent = time.monotonic()
        try:
            consumers = await self._abandoned.consumers(queue)
            self._hold_off.on_reply(time.monotonic() - sent)
            self._lines.replace(queue, lines_among(queue, consumers))
            others = self._abandoned.others(consumers)
            self._forecasts[queue].on_listed(others, sent)
            live = self._next_live(queue, consumers) if looks_at_live else ""
            running = self._running_jobs.ids_in(queue)
            own = self._abandoned.own(consumers)
            lost = 0
            if own is not None and (own.pending > len(running) or own.name == live):
                lost = await self._abandoned.hand_over_lost(queue, running)
            if live and (self._hold_off.holds or not await self._abandoned.list_claimable(queue, live, 1)):
                self._last_looked_at[queue], live = live, ""
            silent = set[str]() if self._hold_off.holds else await self._silent_in(queue)
        except (RedisError, OSError) as error:
            self._note_failure(error)
            await self._backoff.wait(error)
            return 0
        self._backoff.reset()
        found = 0
        if lost or any(consumer.name == HANDED_OVER for consumer in consumers):
            found += await self._take_from(queue, HANDED_OVER)
        if not self._hold_off.holds:
            for name in others:
                if name in silent or name == live:
                    found += await self._take_from(queue, name)
        return found

    async def _silent_in(self, queue: str) -> set[str]:
        """The workers that have jobs of a queue, and got and renewed none for a lease."""
        forecast, sent = self._forecasts[queue], time.monotonic()
        return forecast.on_read(await self._abandoned.idle_times(queue), sent) if forecast.may_be_silent else set()

    def _next_live(self, queue: str, consumers: Sequence[ConsumerState]) -> str:
        """The next worker that is looked at, silent or not; empty if there is none.

        Workers are looked at in the order of their names, each until it has no such jobs.
        """
        names = sorted(consumer.name for consumer in consumers if not is_pseudo_consumer(consumer.name))
        last = self._last_looked_at.get(queue, "")
        return next((name for name in names if name > last), names[0] if names else "")

    def _note_failure(self, error: RedisError | OSError) -> None:
        """Record an outage. A refusal that stays, such as of a key of the wrong type, is none."""
        if is_transient(error) or not isinstance(error, ResponseError):
            self._hold_off.on_failure()

    async def _take_from(self, queue: str, consumer: str) -> int:
        fetch = partial(self._fetch, queue, consumer)
        return await self._intake.fill_slots(_BEFORE_ALL_QUEUES, self._backoff, fetch) or 0

    async def _fetch(self, queue: str, consumer: str, count: int) -> list[Delivery]:
        """Claim up to `count` jobs of a consumer.

        They are claimed only after they were listed promptly. In the socket of a Redis that stands still, a claim would
        otherwise wait for it, and be executed before the owners can renew their leases.
        """
        try:
            for _ in range(_MOST_ROUNDS):
                sent = time.monotonic()
                jobs = await self._abandoned.list_claimable(queue, consumer, count)
                self._hold_off.on_reply(time.monotonic() - sent)
                if not jobs or (self._hold_off.holds and consumer != HANDED_OVER):
                    break
                if claimed := await self._abandoned.claim(queue, consumer, jobs):
                    return claimed
        except (RedisError, OSError) as error:
            self._note_failure(error)
            raise
        return []

"""Intake: takes new jobs for free slots and free places at the servers. It pauses while jobs could not be done."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..broker.job_queue import Delivery, JobQueue
from ..redisio.errors import is_connection_refused, is_login_refused, is_permission_denied, is_transient
from ..redisio.retry import Backoff
from ..settings import Settings
from ..telemetry.events import ClaimsPaused, ClaimsResumed, IntakePaused, Telemetry
from ..telemetry.logging import REPEAT_AFTER
from ..vllm.servers.pool import ServerPool
from ..vllm.servers.room import Demand
from .outline import JobOutline, may_be_valid, outline_of
from .pace import Pace, sleep_unless_set
from .parking import JobToPark, Parking
from .poison import may_be_poison
from .queue_pauses import QueuePauses
from .running_jobs import RunningJobs
from .slots import Slots

STARTING = "starting"
NO_VLLM = "no_vllm"
VLLM_FULL = "vllm_full"
REDIS_FULL = "redis_full"
REDIS_REFUSES = "redis_refuses"
REDIS_LOGIN = "redis_login"
REDIS_AWAY = "redis_away"
"""Why no jobs are taken: no vLLM server has accepted requests yet and not all were probed, which is no pause; no server
is available; every server has as many requests as it can answer now; Redis has no memory left; Redis refuses writes or
connections for another reason; Redis refuses the password or the user; Redis does not answer."""

_NO_PAUSE = ("", STARTING)
_NOT_LOGGED = (*_NO_PAUSE, VLLM_FULL, NO_VLLM, REDIS_AWAY)
"""A full vLLM is no fault. The other two are logged elsewhere."""

_IDLE_FACTOR = 4
"""After a read of jobs that all had to wait, the next read follows this many times as long as the read took."""
_LEAST_IDLE = 0.01


def reason_of(error: RedisError | OSError) -> str:
    """The reason for a pause after an error of Redis; empty for any other refusal of a single command."""
    if is_login_refused(error):
        return REDIS_LOGIN
    if is_connection_refused(error) or is_permission_denied(error):
        return REDIS_REFUSES
    return "" if isinstance(error, ResponseError) else REDIS_AWAY


class JobIntake:
    """Fills the slots of a process with jobs. `block` is how many seconds a read waits for a job."""

    def __init__(  # noqa: PLR0913 - it takes jobs from all of these, for all of these
        self,
        settings: Settings,
        jobs: JobQueue,
        servers: ServerPool,
        running_jobs: RunningJobs,
        slots: Slots,
        *,
        parking: Parking,
        pauses: QueuePauses,
        block: float,
        pace: Pace,
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._servers = servers
        self._running_jobs = running_jobs
        self._slots = slots
        self._parking = parking
        self._lines = parking.lines
        self._admission = parking.admission
        self._pauses = pauses
        self._block_ms = int(block * 1000)
        self._pace = pace
        self._telemetry = telemetry
        self._stopping = asyncio.Event()
        self.paused = ""
        """Why no jobs are taken now; empty while jobs are taken."""
        self._logged_pause = ""
        self._logged_at: dict[str, float] = {}
        """When each reason was last logged, by the monotonic clock in seconds."""
        self._probe_at = 0.0
        """From when on the next read of jobs probes whether Redis accepts writes (monotonic clock)."""

    def stop(self) -> None:
        """Take no more jobs."""
        self._stopping.set()
        self._slots.close()

    async def take_new(self, rank: int, queue: str) -> None:
        """Take new jobs of a queue until the intake stops. A lower rank is more important.

        A read in flight is never cancelled: the jobs that it returns would wait until their lease ends.
        """
        backoff = Backoff("claim_failed", self._telemetry)
        while not self._stopping.is_set():
            if self._pauses.is_paused(queue):
                await self._pauses.wait_resumed(queue, self._stopping)
            elif not self._is_full:
                await self._read_new(rank, queue, backoff)
            elif self._parking.is_possible and self._lines.reads_ahead(queue):
                await self._read_ahead(queue, backoff)
            else:
                await self._wait_for_room(queue)

    async def fill_slots(
        self, rank: int, backoff: Backoff, fetch: Callable[[int], Awaitable[list[Delivery]]]
    ) -> int | None:
        """Wait for free slots and fetch jobs that others have begun for them, once.

        A lower rank is more important. Returns the number of jobs; None when the intake stops.
        """
        count = await self._slots.reserve(rank)
        if not count:
            return None
        deliveries: list[Delivery] = []
        failure, sent = None, 0.0
        try:
            self._pause_for(await self.reason_to_pause())
            if self.paused in ("", VLLM_FULL):
                sent = time.monotonic()
                deliveries = await fetch(count)
        except (RedisError, OSError) as error:
            failure = error
            self._note_failure(error)
        if deliveries:
            self._slots.adapt(too_slow=time.monotonic() - sent > self._settings.lease / 3)
        demands: dict[str, Demand] = {}
        for delivery in deliveries:
            outline = self._outline_of(delivery)
            if outline is not None and (demand := self._admission.admit(outline.models)) is not None:
                demands[delivery.id] = demand
        self._slots.release(count - self._running_jobs.start(deliveries, sent, demands))
        if failure is not None:
            await backoff.wait(failure)
            return 0
        backoff.reset()
        await self._wait_out_pause()
        return len(deliveries)

    async def start_or_park(self, deliveries: Sequence[Delivery], sent: float, slots: int) -> int:
        """Start the jobs that have a place at a server, in at most `slots` reserved slots, and park the others.

        A job that cannot be parked is started too: it waits in a slot. So is a job that is not valid or may be poison,
        which needs no place or must not be read here. Slots that are not needed are released. Returns the number of
        jobs that were started.
        """
        startable: list[Delivery] = []
        demands: dict[str, Demand] = {}
        waiting: list[JobToPark] = []
        for delivery in deliveries:
            outline = self._outline_of(delivery)
            if outline is None:
                startable.append(delivery)
                continue
            self._lines.on_seen(delivery.queue, outline)
            demand = self._admission.admit(outline.models) if len(startable) < slots else None
            if demand is not None:
                startable.append(delivery)
                demands[delivery.id] = demand
            elif self._parking.is_possible and may_be_valid(delivery, self._settings):
                waiting.append(JobToPark(delivery, outline))
            else:
                startable.append(delivery)
        started = self._running_jobs.start(startable, sent, demands)
        self._slots.release(slots - started)
        if waiting:
            results = await self._parking.park(waiting)
            kept = [job.delivery for job, result in zip(waiting, results, strict=True) if isinstance(result, Exception)]
            late = self._running_jobs.start(kept, sent)
            self._slots.release(-late)
            started += late
        return started

    async def reason_to_pause(self) -> str:
        """Why a job that is taken now could not be done; empty if it could. Any worker can take it from the queue."""
        if not self._servers.is_available:
            self._probe_at = 0.0
            return NO_VLLM if all(server.is_known for server in self._servers.servers) else STARTING
        return await self._refusal_of_writes() or (VLLM_FULL if self._is_full else "")

    async def _refusal_of_writes(self) -> str:
        """Why Redis refuses writes; empty if it accepts them. After a success, it is not probed again for a moment."""
        now = time.monotonic()
        if now < self._probe_at:
            return ""
        self._probe_at = 0.0
        try:
            await self._jobs.probe_writable()
        except ResponseError as error:
            if is_transient(error):
                return REDIS_FULL if isinstance(error, OutOfMemoryError) else REDIS_REFUSES
            # A missing right to the probed key alone is no reason. Other missing rights are reported by their commands.
        self._probe_at = now + self._pace.recheck_writes_after
        return ""

    @property
    def _is_full(self) -> bool:
        """Whether servers are available, but none has room for another request."""
        return self._servers.total_room() <= 0 and self._servers.is_available

    async def _read_new(self, rank: int, queue: str, backoff: Backoff) -> None:
        """Wait for free slots and read new jobs for them, once. No more are read than the servers have room for."""
        count = await self._slots.reserve(rank)
        if not count:
            return
        try:
            self._pause_for(await self.reason_to_pause())
        except (RedisError, OSError) as error:
            self._slots.release(count)
            self._note_failure(error)
            await backoff.wait(error)
            return
        wanted = 0 if self.paused or self._pauses.is_paused(queue) else min(count, self._servers.total_room())
        self._slots.release(count - wanted)
        if wanted > 0:
            self._slots.lend(wanted)
            with self._pauses.claiming(queue):
                await self._read(queue, backoff, wanted, lent=wanted)
        else:
            backoff.reset()
            await self._wait_out_pause()

    async def _read_ahead(self, queue: str, backoff: Backoff) -> None:
        """Read jobs while no server has room, so that they wait in the lines of their tenants."""
        try:
            reason = await self.reason_to_pause()
        except (RedisError, OSError) as error:
            self._note_failure(error)
            await backoff.wait(error)
            return
        self._pause_for(reason)
        if reason == VLLM_FULL and not self._pauses.is_paused(queue):
            with self._pauses.claiming(queue):
                await self._read(queue, backoff, self._slots.most_per_read, lent=0)
            await sleep_unless_set(self._stopping, self._pace.read_ahead_every)
        else:
            backoff.reset()
            await self._wait_out_pause()

    async def _read(self, queue: str, backoff: Backoff, count: int, *, lent: int) -> None:
        """Read up to `count` new jobs, and start or park them. `lent` slots are reserved and lent for the read."""
        deliveries: list[Delivery] = []
        failure, sent = None, time.monotonic()
        try:
            deliveries = await self._jobs.read_new(queue, count, block_ms=self._block_ms)
        except (RedisError, OSError) as error:
            failure = error
            self._note_failure(error)
        arrived = time.monotonic()
        slots = self._slots.take_back(lent)
        self._slots.release(lent - slots)
        if not lent:  # servers may have room by now
            slots = self._slots.reserve_now(len(deliveries))
        if deliveries:
            # A read may have waited for its first job.
            self._slots.adapt(too_slow=arrived - sent - self._block_ms / 1000 > self._settings.lease / 3)
        started = await self.start_or_park(deliveries, sent, slots)
        if started:
            # These jobs send their first commands before the next read takes its time: they run in the next step of the
            # event loop, and uvloop writes at the end of that step.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if failure is not None:
            await backoff.wait(failure)
            return
        backoff.reset()
        if deliveries and not started:  # the jobs behind these may have a place, but this process has other work too
            idle = max(_LEAST_IDLE, _IDLE_FACTOR * (time.monotonic() - arrived))
            await sleep_unless_set(self._stopping, min(idle, self._pace.scan_every))

    def _outline_of(self, delivery: Delivery) -> JobOutline | None:
        """The outline of a job; None if it is not valid, or must not be read here."""
        return None if may_be_poison(delivery, self._settings.max_deliveries) else outline_of(delivery)

    async def _wait_for_room(self, queue: str) -> None:
        """Wait until a server has room, or the queue may be read ahead."""
        self._pause_for(VLLM_FULL)
        while self._is_full and not self._stopping.is_set():
            changed = asyncio.ensure_future(self._servers.wait_changed(self._pace.scan_every))
            stopping = asyncio.ensure_future(self._stopping.wait())
            await asyncio.wait({changed, stopping}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            stopping.cancel()
            if self._parking.is_possible and self._lines.reads_ahead(queue):
                return
        if self.paused == VLLM_FULL:
            self._pause_for("")

    def _note_failure(self, error: RedisError | OSError) -> None:
        self._probe_at = 0.0
        if reason := reason_of(error):
            self._pause_for(reason)
        if isinstance(error, RedisTimeoutError):
            self._slots.adapt(too_slow=True)

    def _pause_for(self, reason: str) -> None:
        """Begin a pause for a reason. An empty reason ends the pause."""
        if reason != self.paused:
            if self.paused not in _NO_PAUSE:
                self._telemetry.emit(IntakePaused(self.paused, on=False))
            if reason not in _NO_PAUSE:
                self._telemetry.emit(IntakePaused(reason, on=True))
            self.paused = reason
        self._log_pause("" if reason in _NOT_LOGGED else reason)

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

    async def _wait_out_pause(self) -> None:
        """Wait while vLLM is away, or until Redis may accept writes again. A full vLLM is waited for elsewhere."""
        if self.paused == NO_VLLM:
            await self._wait_for_vllm()
        elif self.paused == STARTING:
            await self._servers.wait_changed(self._pace.scan_every)
        elif self.paused not in ("", VLLM_FULL):
            await sleep_unless_set(self._stopping, self._pace.recheck_writes_after)

    async def _wait_for_vllm(self) -> None:
        waiting = {
            asyncio.ensure_future(self._servers.wait_available("")),
            asyncio.ensure_future(self._stopping.wait()),
        }
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

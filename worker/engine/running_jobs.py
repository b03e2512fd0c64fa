"""The jobs that run in this process, and the renewal, loss and hand-over of their leases."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from redis.exceptions import RedisError

from ..broker.job_queue import Delivery, JobQueue
from ..redisio.errors import is_transient, redacted_message
from ..redisio.retry import Backoff
from ..telemetry.events import HandOverFailed, JobsHandedOver, Telemetry
from ..telemetry.job_events import JobBrokenOff, JobFailed, JobLeft, JobRunEnded, LeaseWasLost
from ..vllm.servers.room import Demand
from .job_context import MustWait, Stop, Stopped
from .parking import Parking


class RunJob(Protocol):
    """Runs a delivered job until it ends, its stop future is done, or it must wait. See `job_runner.run_job`."""

    def __call__(
        self,
        delivery: Delivery,
        stop: "asyncio.Future[Stop]",
        release_slot: Callable[[], None],
        demand: Demand | None,
        /,
        *,
        may_park: bool,
    ) -> Awaitable[None]: ...


_HINT_TIMEOUT = 0.5
"""Seconds that the hint about a hand-over may take: after as long, other workers search for the jobs anyway."""
_MOST_WITHOUT_SLOT = 1000
"""The most jobs that may have released their slot before their end, since each is in memory with its request."""


@dataclass(eq=False)
class RunningJob:
    """A job that runs. `renewed` is when its last renewal was sent, by the monotonic clock in seconds."""

    delivery: Delivery
    stop: "asyncio.Future[Stop]"
    renewed: float
    task: "asyncio.Task[None]"
    has_slot: bool = True
    demand: Demand | None = None

    def stop_for(self, reason: Stop) -> None:
        """Stop the job. Only the first reason counts."""
        if not self.stop.done():
            self.stop.set_result(reason)


class RunningJobs:
    """The jobs that run here. `run` runs one job, and `slot_released` is called when a job releases its slot.

    A job whose log is sealed, and that only waits for Redis, may release its slot. It keeps its lease. `lease` is in
    seconds. `parking` parks the jobs that must wait for a server.
    """

    def __init__(
        self,
        jobs: JobQueue,
        run: RunJob,
        slot_released: Callable[[], None],
        *,
        lease: float,
        telemetry: Telemetry,
        parking: Parking | None = None,
    ) -> None:
        self._jobs = jobs
        self._run = run
        self._slot_released = slot_released
        self._lease = lease
        self._telemetry = telemetry
        self._parking = parking
        self._renewing = asyncio.Lock()
        """Held while leases are renewed, and while jobs are given up: a renewal must not take such a job back."""
        self._running: dict[tuple[str, str], RunningJob] = {}
        self.finished = 0
        """How many jobs ended here. Jobs that were handed over or otherwise left do not count."""
        self.changed = asyncio.Event()
        """Set whenever a job has ended."""
        self.to_trim: set[str] = set()
        """Queues of which jobs have ended since they were last trimmed."""

    def __len__(self) -> int:
        return len(self._running)

    @property
    def with_slot(self) -> int:
        """How many jobs have a slot. Any thread may read it."""
        return sum(running.has_slot for running in self._running.copy().values())

    def ids_in(self, queue: str) -> set[str]:
        """The ids of the jobs of a queue that run here."""
        return {job for name, job in self._running if name == queue}

    def start(self, deliveries: Iterable[Delivery], sent: float, demands: Mapping[str, Demand] | None = None) -> int:
        """Start jobs that were requested from Redis at `sent`. Returns how many were started.

        If a job runs here already, as after a pause of this process, the delivery renews its lease. `demands` has the
        places at the servers that are kept for jobs, by their ids.
        """
        started = 0
        for delivery in deliveries:
            demand = demands.get(delivery.id) if demands else None
            running = self._running.get((delivery.queue, delivery.id))
            if running is not None:
                running.renewed = sent
                if demand is not None:
                    demand.end()
                continue
            stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._run_to_end(delivery, stop))
            self._running[delivery.queue, delivery.id] = RunningJob(delivery, stop, sent, task, demand=demand)
            started += 1
        return started

    async def _run_to_end(self, delivery: Delivery, stop: "asyncio.Future[Stop]") -> None:
        """Run one job. Its errors do not affect other jobs: the job stays pending, and its log has its progress."""
        queue, job = delivery.queue, delivery.id
        try:
            if await self._run_or_park(self._running[queue, job]):
                self.finished += not stop.done()
        except Stopped:  # the next worker that gets the job continues it
            self._telemetry.emit(JobLeft(stop.result().value, queue=queue, job=job))
        except RedisError as error:  # without a traceback, which would quote the command and thus the answer
            self._telemetry.emit(JobBrokenOff(queue, job, redacted_message(error)))
        except Exception as error:  # noqa: BLE001 - see above
            self._telemetry.emit(JobFailed(queue, job, error))
        finally:
            self._telemetry.emit(JobRunEnded())
            running = self._running.pop((queue, job))
            if running.demand is not None:
                running.demand.end()
            self.to_trim.add(queue)
            if running.has_slot:
                self._slot_released()
            self.changed.set()

    async def _run_or_park(self, running: RunningJob) -> bool:
        """Run one job. Returns whether it ran to its end; false if it waits in its queue.

        If Redis refuses to park the job, the job waits here for a server.
        """
        delivery, stop, demand = running.delivery, running.stop, running.demand
        release_slot = partial(self._release_slot, delivery)
        parking = self._parking
        if parking is None or not parking.is_possible:
            await self._run(delivery, stop, release_slot, demand, may_park=False)
        else:
            try:
                await self._run(delivery, stop, release_slot, demand, may_park=True)
            except MustWait as wait:
                if await self._park(running, parking, wait):
                    return False
                delivery = replace(delivery, tries=wait.tries)
                await self._run(delivery, stop, release_slot, demand, may_park=False)
        if parking is not None and demand is not None:
            parking.on_ended(demand.model)
        return True

    async def _park(self, running: RunningJob, parking: Parking, wait: MustWait) -> bool:
        """Give a job back to its queue. Returns false if Redis refuses that.

        While Redis does not answer, the job keeps its lease.

        Raises:
            Stopped: when the job must stop before.
        """
        backoff = Backoff()
        while not running.stop.done():
            async with self._renewing:
                result = await parking.park_started(running.delivery, wait)
            if not isinstance(result, Exception):  # if it is false, another worker has the job
                return True
            if not is_transient(result):
                return False
            await backoff.wait(result)
        raise Stopped

    def _release_slot(self, delivery: Delivery) -> None:
        running = self._running[delivery.queue, delivery.id]
        if running.has_slot and len(self) - self.with_slot < _MOST_WITHOUT_SLOT:
            running.has_slot = False
            self._slot_released()

    async def renew_all(self) -> bool:
        """Renew every lease, and stop the jobs that another worker has now. Returns whether there was any lease.

        A lease that expires while Redis does not answer stops no job: no other worker takes jobs over then. But a job
        whose renewal Redis refuses until its lease has expired is stopped.

        Raises:
            RedisError: when Redis does not answer, or has refused to renew some leases. The others are renewed.
        """
        async with self._renewing:
            jobs = list(self._running.values())
            if not jobs:
                return False
            sent = time.monotonic()
            replies = await self._renew(jobs, sent)
            refused = [running for running, is_ours in zip(jobs, replies, strict=True) if is_ours is False]
            if refused and (held := await self._read_leases(refused)):
                replies += await self._renew(held, time.monotonic())
        if refusal := next((reply for reply in replies if isinstance(reply, Exception)), None):
            if any(isinstance(reply, Exception) and not is_transient(reply) for reply in replies):
                self._stop_expired(jobs)
            raise refusal
        return True

    async def _renew(self, jobs: Sequence[RunningJob], sent: float) -> list[bool | Exception]:
        replies = await self._jobs.renew_leases([(running.delivery, sent - running.renewed) for running in jobs])
        for running, is_ours in zip(jobs, replies, strict=True):
            if is_ours is True:
                running.renewed = sent
        return replies

    async def _read_leases(self, jobs: Sequence[RunningJob]) -> list[RunningJob]:
        """Find out why leases could not be renewed, and return the jobs that this worker still has.

        Redis may have executed an earlier renewal whose reply was lost: the entry is then too young for the renewal.
        """
        asked = time.monotonic()
        held = []
        for running, idle in zip(jobs, await self._jobs.idle_times([job.delivery for job in jobs]), strict=True):
            if idle is not None:
                running.renewed = asked - idle
                held.append(running)
            elif await self._jobs.is_outstanding(running.delivery.queue, running.delivery.id):
                self._stop_without_lease(running)
            else:  # the job was deleted: no other worker can get it, so it runs to its end here
                running.renewed = asked
        return held

    def _stop_expired(self, jobs: Iterable[RunningJob]) -> None:
        """Stop the jobs whose lease has expired, since another worker may have them now."""
        expired_before = time.monotonic() - self._lease
        for running in jobs:
            if running.renewed < expired_before:
                self._stop_without_lease(running)

    def _stop_without_lease(self, running: RunningJob) -> None:
        if not running.stop.done():
            running.stop_for(Stop.LEASE_LOST)
            self._telemetry.emit(LeaseWasLost(running.delivery.queue, running.delivery.id))

    async def hand_over_all(self, within: float) -> None:
        """Stop all jobs, and end their leases now, so that other workers continue them at once.

        This takes at most `within` seconds: half of them for the jobs to stop, and half for Redis to answer.
        """
        stopped = list(self._running.values())
        for running in stopped:
            running.stop_for(Stop.HAND_OVER)
        if stopped:
            await asyncio.wait({running.task for running in stopped}, timeout=within / 2)
        ended = [running for running in stopped if running.stop.result() is Stop.HAND_OVER and running.task.done()]
        if not ended:
            return
        try:
            async with asyncio.timeout(within / 2), self._renewing:
                replies = await self._jobs.hand_over([running.delivery for running in ended])
        except (RedisError, OSError) as error:
            self._telemetry.emit(HandOverFailed(len(ended), type(error).__name__))
            return
        if refusals := [reply for reply in replies if isinstance(reply, Exception)]:
            self._telemetry.emit(HandOverFailed(len(refusals), redacted_message(refusals[0])))
        # The other jobs have ended, or other workers have them already.
        self._telemetry.emit(JobsHandedOver(handed_over := replies.count(True)))
        if handed_over:
            with suppress(RedisError, OSError):  # includes TimeoutError
                async with asyncio.timeout(_HINT_TIMEOUT):
                    await self._jobs.publish_hand_over()

    def cancel(self) -> None:
        """Cancel all jobs, as the process ends."""
        for running in self._running.values():
            running.task.cancel()

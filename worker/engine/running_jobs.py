"""The jobs at work in this process and their leases: renewed while they run, given up when lost, handed over."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial

import structlog
from redis.exceptions import RedisError

from ..broker.job_queue import Delivery, JobQueue
from ..redisio.errors import redacted_message
from ..telemetry.metrics import Metrics
from .job_context import Stop, Stopped

_MOST_WITHOUT_SLOT = 1000
"""Jobs that may have given their slot back before they are done with: each is in memory, with its request."""

_log = structlog.get_logger()


@dataclass(eq=False)
class RunningJob:
    """A job at work. `renewed` is when its last renewal was sent, by the monotonic clock in seconds."""

    delivery: Delivery
    stop: "asyncio.Future[Stop]"
    renewed: float
    task: "asyncio.Task[None]"
    has_slot: bool = True

    def stop_for(self, reason: Stop) -> None:
        """Tell the job to stop; the first reason holds."""
        if not self.stop.done():
            self.stop.set_result(reason)


class RunningJobs:
    """The jobs at work. `work` does one, `freed` is called after each; `lease` is in seconds.

    A job may give its slot back before its end, and keeps its lease then: its log has its end, and what is left to do
    waits for Redis.
    """

    def __init__(
        self,
        jobs: JobQueue,
        work: "Callable[[Delivery, asyncio.Future[Stop], Callable[[], None]], Awaitable[None]]",
        freed: Callable[[], None],
        *,
        lease: float,
        metrics: Metrics,
    ) -> None:
        self._jobs = jobs
        self._work = work
        self._freed = freed
        self._lease = lease
        self._metrics = metrics
        self._running: dict[tuple[str, str], RunningJob] = {}
        self.finished = 0
        """How many jobs came to their end here: none that was handed over or otherwise left."""
        self.changed = asyncio.Event()
        """Set whenever a job has ended."""
        self.to_trim: set[str] = set()
        """The queues of which jobs have ended since they were trimmed."""

    def __len__(self) -> int:
        return len(self._running)

    @property
    def at_work(self) -> int:
        """How many jobs have a slot."""
        return sum(running.has_slot for running in self._running.values())

    def running_in(self, queue: str) -> set[str]:
        """The ids of the jobs of a queue that are at work here."""
        return {job for name, job in self._running if name == queue}

    def begin(self, deliveries: Iterable[Delivery], sent: float) -> int:
        """Begin jobs that were asked for at `sent`; gives how many.

        One that is at work already, as after a pause of this process, has its lease renewed by it.
        """
        begun = 0
        for delivery in deliveries:
            running = self._running.get((delivery.queue, delivery.id))
            if running is not None:
                running.renewed = sent
                continue
            stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._run(delivery, stop))
            self._running[delivery.queue, delivery.id] = RunningJob(delivery, stop, sent, task)
            begun += 1
        return begun

    async def _run(self, delivery: Delivery, stop: "asyncio.Future[Stop]") -> None:
        try:
            await self._work(delivery, stop, partial(self._free, delivery))
            self.finished += not stop.done()
        except Stopped:  # its log has its end: the worker that gets it next does the rest
            _log.info("job_left", queue=delivery.queue, job=delivery.id, reason=stop.result().value)
        except Exception as error:  # noqa: BLE001 - one job must not end the others
            # Left pending: whoever gets it next finds in the log how far it came.
            if isinstance(error, RedisError):  # its traceback would quote the command, and so the answer
                _log.warning("job_left", queue=delivery.queue, job=delivery.id, reason=redacted_message(error))
            else:
                _log.exception("job_failed", queue=delivery.queue, job=delivery.id)
        finally:
            running = self._running.pop((delivery.queue, delivery.id))
            self.to_trim.add(delivery.queue)
            if running.has_slot:
                self._freed()
            self.changed.set()

    def _free(self, delivery: Delivery) -> None:
        running = self._running[delivery.queue, delivery.id]
        if running.has_slot and len(self) - self.at_work < _MOST_WITHOUT_SLOT:
            running.has_slot = False
            self._freed()

    async def renew(self) -> bool:
        """Renew every lease, and say whether there was any; a job that another worker has by now is told to stop.

        Raises:
            RedisError: when Redis does not answer, or refused to renew some; the others are renewed.
        """
        jobs = list(self._running.values())
        if not jobs:
            return False
        sent = time.monotonic()
        kept = await self._jobs.renew_leases([(running.delivery, sent - running.renewed) for running in jobs])
        for running, is_ours in zip(jobs, kept, strict=True):
            if is_ours is True:
                running.renewed = sent
        for running, is_ours in zip(jobs, kept, strict=True):
            if is_ours is False:
                if await self._jobs.is_outstanding(running.delivery.queue, running.delivery.id):
                    self._lose(running)
                else:  # somebody deleted the job: no other worker can have it, so it goes on to its end
                    running.renewed = sent
        if refusal := next((reply for reply in kept if isinstance(reply, Exception)), None):
            raise refusal
        return True

    def stop_expired(self) -> float:
        """Stop the jobs whose lease could not be renewed before it ended: another worker may have them by now.

        Gives the seconds until the next one may have to stop.
        """
        ended = time.monotonic() - self._lease
        for running in self._running.values():
            if running.renewed < ended:
                self._lose(running)
        left = [running.renewed - ended for running in self._running.values() if not running.stop.done()]
        return min(left, default=self._lease)

    def _lose(self, running: RunningJob) -> None:
        if not running.stop.done():
            running.stop_for(Stop.LEASE_LOST)
            self._metrics.lease_lost.inc()

    async def hand_over(self, within: float) -> None:
        """Stop what still runs, and make its lease end now, so that another worker goes on at once.

        It takes `within` seconds at most: the jobs have half of them to stop, Redis the other to answer.
        """
        left = list(self._running.values())
        for running in left:
            running.stop_for(Stop.HAND_OVER)
        if left:
            await asyncio.wait({running.task for running in left}, timeout=within / 2)
        now = time.monotonic()
        ended = [running for running in left if running.stop.result() is Stop.HAND_OVER and running.task.done()]
        if not ended:
            return
        try:
            async with asyncio.timeout(within / 2):
                went = await self._jobs.hand_over([(running.delivery, now - running.renewed) for running in ended])
        except (RedisError, OSError) as error:
            _log.warning("hand_over_failed", jobs=len(ended), error=type(error).__name__)
            return
        if refusals := [reply for reply in went if isinstance(reply, Exception)]:
            _log.warning("hand_over_failed", jobs=len(refusals), error=redacted_message(refusals[0]))
        _log.info("jobs_handed_over", jobs=went.count(True))  # the rest has ended, or is with others already

    def cancel(self) -> None:
        """End whatever is left, as the process ends."""
        for running in self._running.values():
            running.task.cancel()

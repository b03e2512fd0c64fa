"""Intake of parked jobs: takes jobs from their lines as soon as a server has room for them, and at their deadline."""

import asyncio
import random
import time
from collections.abc import Sequence

from redis.exceptions import RedisError

from ..broker.job_queue import Delivery
from ..broker.parked_jobs import ParkedJobs, ParkedLine
from ..redisio.retry import Backoff
from ..settings import Settings
from ..telemetry.events import Telemetry
from ..vllm.servers.pool import ServerPool
from ..vllm.servers.room import Demand
from .intake import VLLM_FULL, JobIntake
from .outline import outline_of
from .pace import Pace, sleep_unless_set
from .parking import Parking
from .queue_pauses import QueuePauses
from .rotation import LineRotation
from .running_jobs import RunningJobs
from .slots import MOST_PER_READ, Slots

_LISTED_EVERY = 1.5
"""Intervals of the search for lines after which the lines of a queue are listed here. The take-over lists them too."""

_MOST_SEARCHED = 64
"""The most lines that one search for overdue jobs looks at: one command for each, and all workers search."""

_BEFORE_NEW_JOBS = 0.5
"""What the rank of a queue's lines is less than that of its new jobs."""


class LineIntake:
    """Serves the lines of a worker's queues: before new jobs, in the order that `LineRotation` chooses."""

    def __init__(  # noqa: PLR0913 - it takes jobs from all of these, for all of these
        self,
        settings: Settings,
        parked: ParkedJobs,
        servers: ServerPool,
        running_jobs: RunningJobs,
        slots: Slots,
        intake: JobIntake,
        *,
        parking: Parking,
        pauses: QueuePauses,
        pace: Pace,
        telemetry: Telemetry,
    ) -> None:
        self._settings = settings
        self._parked = parked
        self._servers = servers
        self._running_jobs = running_jobs
        self._slots = slots
        self._intake = intake
        self._parking = parking
        self._lines = parking.lines
        self._admission = parking.admission
        self._pauses = pauses
        self._pace = pace
        self._telemetry = telemetry
        self._rotation: LineRotation[Demand] = LineRotation(settings.queues)
        self._searched_to = ("", "")
        """The last line that was searched for overdue jobs."""
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Take no more jobs."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve the lines until stopped."""
        backoff = Backoff("claim_failed", self._telemetry)
        scan_at = overdue_at = time.monotonic()
        while not self._stopping.is_set():
            now = time.monotonic()
            is_scan = now >= scan_at
            try:
                if is_scan:  # the next times are set first: what fails must not keep the rest from being done
                    scan_at = now + self._pace.scan_every
                    await self._scan()
                if now >= overdue_at and len(self._lines):
                    overdue_at = now + self._pace.overdue_every * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
                    await self._take_overdue()
                await self._serve_or_wait(scan_at - time.monotonic())
                if is_scan:  # else Redis may not have been asked, and be away still
                    backoff.reset()
            except (RedisError, OSError) as error:
                self._parking.refuse(error)
                await backoff.wait(error)

    async def _scan(self) -> None:
        """List the lines of the queues that the take-over has not just listed, as when it waits for a slot."""
        for queue in self._settings.queues:
            if not self._lines.are_older(queue, _LISTED_EVERY * self._pace.scan_every):
                continue
            self._lines.replace(queue, await self._parked.lines(queue))

    async def _serve_or_wait(self, within: float) -> None:
        """Serve the lines once. If no job can be taken, wait for room, slots or parked jobs."""
        self._lines.grown.clear()
        self._slots.freed.clear()
        tasks: set[asyncio.Future[object]] = {
            asyncio.ensure_future(event.wait()) for event in (self._stopping, self._lines.grown)
        }
        if len(self._lines):
            within = min(within, self._admission.next_end_of_pause)
            tasks.add(asyncio.ensure_future(self._servers.wait_changed(max(0.0, within))))
            tasks.add(asyncio.ensure_future(self._slots.freed.wait()))
        try:
            await asyncio.sleep(0)  # the tasks wait from here on, so that no change is missed
            if not await self._serve():
                await asyncio.wait(tasks, timeout=max(0.0, within), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _choose(self) -> dict[ParkedLine, list[Demand]]:
        """Choose jobs for which there is room, and reserve a slot and a place at a server for each of them."""
        lines = self._unpaused_lines()
        if not lines or self._stopping.is_set() or self._servers.total_room() <= 0:
            return {}
        slots = self._slots.reserve_now(MOST_PER_READ)
        chosen = self._rotation.choose(lines, max(1, slots), self._admit)
        if chosen and not slots:  # new jobs of less important queues wait for a slot too
            (first,) = chosen
            rank = self._settings.queues.index(first.queue) - _BEFORE_NEW_JOBS
            slots = await self._slots.reserve(rank, may_borrow=True)
            if not slots:  # the intake stops
                _end_all(chosen)
                return {}
            for line, places in self._rotation.choose(self._unpaused_lines(), slots - 1, self._admit).items():
                chosen.setdefault(line, []).extend(places)
        self._slots.give_back(slots - sum(map(len, chosen.values())))
        return chosen

    async def _serve(self) -> bool:
        """Take jobs for which there is room, once. Returns whether any were requested."""
        chosen = await self._choose()
        if not chosen:
            return False
        is_writable = False
        try:
            is_writable = await self._intake.reason_to_pause() in ("", VLLM_FULL)
        finally:
            if not is_writable:
                self._give_back(chosen)
        if not is_writable:
            await sleep_unless_set(self._stopping, self._pace.recheck_writes_after)
            return True
        for line in [line for line in chosen if self._is_paused(line)]:  # since they were chosen
            self._give_back({line: chosen.pop(line)})
        with self._pauses.claiming(*(line.queue for line in chosen if not line.is_of_begun_jobs)):
            await self._take(chosen)
        return True

    async def _take(self, chosen: dict[ParkedLine, list[Demand]]) -> None:
        sent = time.monotonic()
        taking = [self._parked.take(line, len(places)) for line, places in chosen.items()]
        replies = await asyncio.gather(*taking, return_exceptions=True)
        failure: BaseException | None = None
        for (line, places), reply in zip(chosen.items(), replies, strict=True):
            if isinstance(reply, BaseException):
                failure = failure or reply
                self._give_back({line: places})
            else:
                self._lines.on_taken(line, len(places), len(reply))
                await self._start(line, reply, places, sent)
        if failure is not None:
            raise failure

    def _is_paused(self, line: ParkedLine) -> bool:
        """Whether no job of a line may be taken, since an operator has paused its queue. Begun jobs continue."""
        return self._pauses.is_paused(line.queue) and not line.is_of_begun_jobs

    def _unpaused_lines(self) -> list[ParkedLine]:
        return [line for line in self._lines.all() if not self._is_paused(line)]

    async def _start(self, line: ParkedLine, deliveries: Sequence[Delivery], places: list[Demand], sent: float) -> None:
        """Start the jobs that were taken from a line. If the line's models were not known, the jobs have them."""
        if self._lines.models_of(line) is None:
            for place in places:
                place.end()
            for delivery in deliveries:
                if (outline := outline_of(delivery)) is not None:
                    self._lines.learn(outline)
            await self._intake.start_or_park(deliveries, sent, len(places))
            return
        demands = {delivery.id: place for delivery, place in zip(deliveries, places, strict=False)}
        for place in places[len(deliveries) :]:
            place.end()
        self._slots.release(len(places) - self._running_jobs.start(deliveries, sent, demands))

    async def _take_overdue(self) -> None:
        """Take the jobs whose deadline has passed, so that their logs are sealed, whether or not a server has room.

        A search looks at a bounded number of lines, and the next one at those that follow.
        """
        lines = sorted(self._unpaused_lines(), key=_place)
        first = next((number for number, line in enumerate(lines) if _place(line) > self._searched_to), 0)
        for line in (lines[first:] + lines[:first])[:_MOST_SEARCHED]:
            self._searched_to = _place(line)
            slots = self._slots.reserve_now(MOST_PER_READ)
            if not slots or self._stopping.is_set() or self._is_paused(line):
                self._slots.release(slots)
                return
            deliveries: list[Delivery] = []
            sent = time.monotonic()
            with self._pauses.claiming(line.queue):
                try:
                    deliveries = await self._parked.take_overdue(line, slots)
                finally:
                    self._slots.release(slots - self._running_jobs.start(deliveries, sent))

    def _admit(self, line: ParkedLine) -> Demand | None:
        models = self._lines.models_of(line)
        return self._admission.admit_once(line.model) if models is None else self._admission.admit(models)

    def _give_back(self, chosen: dict[ParkedLine, list[Demand]]) -> None:
        """Give the places and slots of jobs back that were not taken."""
        _end_all(chosen)
        self._slots.release(sum(map(len, chosen.values())))


def _place(line: ParkedLine) -> tuple[str, str]:
    return line.queue, line.consumer


def _end_all(chosen: dict[ParkedLine, list[Demand]]) -> None:
    for places in chosen.values():
        for place in places:
            place.end()

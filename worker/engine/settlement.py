"""The end of a job: seal, expiry and tombstone, feed, dead letter, lifecycle, acknowledgement.

A crash between any two of these is repaired by the worker that gets the job next and finds the seal. The
acknowledgement comes last, for it is what ends that. What is written beside the log holds nothing up before it: readers
get the end while a letter or a line still waits for Redis, and the job soon gives its slot to another.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import structlog

from ..broker.cluster_publisher import AnyPublisher
from ..broker.dead_letters import DeadLetterWriter
from ..broker.job_queue import Delivery, JobQueue
from ..broker.lifecycle import LifecycleWriter
from ..broker.log_writer import LogDiverged, LogWriter
from ..broker.ownership import LogOwnership
from ..contract.answer import Answer
from ..contract.entries import BURIED, Done, Entry, Failed, Started, Terminal, to_fields
from ..contract.ids import SEAL, EntryId
from ..contract.job import INVALID, MAX_BESIDE_BYTES, InvalidJob, Job
from ..contract.keys import Keys
from ..contract.records import Lifecycle, Tombstone
from ..redisio.clients import persist
from ..redisio.urls import database_of
from ..settings import Settings
from ..telemetry.metrics import Metrics
from .job_context import UNREAD, JobContext, Stop, Stopped, digest_of, drained, insist

_MOMENT = 0.2
"""Seconds that the rest may take, once a log has its end, until the job gives its slot back."""

_log = structlog.get_logger()


class Settlement:
    """Ends jobs; all of a process share one. `now` is Redis's clock in Unix ms."""

    def __init__(
        self,
        settings: Settings,
        *,
        jobs: JobQueue,
        owner: LogOwnership,
        lifecycle: LifecycleWriter,
        dead_letters: DeadLetterWriter,
        publisher: AnyPublisher,
        now: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._keys = Keys(settings.prefix, database_of(settings.redis_url.get_secret_value()))
        self._jobs = jobs
        self._owner = owner
        self._lifecycle_stream = lifecycle
        self._dead_letters = dead_letters
        self._publisher = publisher
        self._now = now
        self._metrics = metrics

    async def seal(self, request: JobContext, log: LogWriter, end: Terminal) -> Answer:
        """Write the terminal entry; gives what the one that stands says, which somebody else may have written.

        Raises:
            LogLost: when the log is no longer ours.
            Stopped: when the job is to stop before.
        """
        await drained(log, request.stop)
        if isinstance(end, Failed):  # vLLM gives the usage only at the end of an answer
            known = Answer(await insist(lambda: self._owner.read_entries(request.id), request.stop))
            end = msgspec.structs.replace(end, usage=known.usage, model=known.model)
        stone = self._tombstone(request, end.type)
        standing = await insist(
            lambda: self._owner.seal(log, end, stone, retention=request.retention, remember=request.remember),
            request.stop,
        )
        return await self._whole(request, standing)

    async def _whole(self, request: JobContext, end: Entry) -> Answer:
        """What the lifecycle tells of an answer: where the seal has no usage, the log shows what there was.

        A client that cancels cannot know all of it.
        """
        if isinstance(end, Done | Failed) and end.usage:
            return Answer([end])
        return Answer([*await insist(lambda: self._owner.read_entries(request.id), request.stop), end])

    async def settle_found(self, request: JobContext, *, is_repair: bool = False) -> None:
        """Finish with a request whose end somebody else has written.

        With `is_repair` it is the job of another worker, which may have come to its end, and no further, before its
        line of the start was written: that comes again then.
        """
        answer = Answer(await insist(lambda: self._owner.read_entries(request.id), request.stop))
        if is_repair and answer.started and not _is_of_another(answer, request.delivery):
            self.tell_start(request, answer.attempt)
        await self.settle(request, answer)

    async def settle(self, request: JobContext, answer: Answer) -> None:
        """After the seal: expiry and tombstone, feed, dead letter, lifecycle, acknowledgement.

        Raises:
            LogDiverged: when the seal is lost, as after a failover.
            Stopped: when the job is to stop before.
        """
        end = answer.end
        await self._confirm(request, answer.outcome or "unknown")  # of a log that has expired the tombstone is left
        with _slot_for_a_moment(request.free):
            if end is not None:
                finished = self._lifecycle(request, "finished", answer)
                self._publisher.publish(self._keys.feed(request.id), [(str(SEAL), to_fields(end))])
                if reason := _dead_for(request, answer):
                    await self._dead_letter(request.delivery, reason, request.stop)
                events: set[asyncio.Future[Any]] = {finished, request.stop}
                await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
                if not finished.done():
                    raise Stopped
            await self.done_with(request)
        if _is_of_another(answer, request.delivery):  # which has told how it ended, and was counted
            _log.info("duplicate_job", queue=request.delivery.queue, job=request.delivery.id)
            return
        code = end.code if isinstance(end, Failed) else None
        if answer.outcome:
            self._metrics.finished(answer.outcome, code or "")
        _log.info(
            "job_finished",
            outcome=answer.outcome,
            code=code,
            attempt=answer.attempt,
            queue=request.delivery.queue,
            model=answer.model,
            tokens=answer.usage.get("completion_tokens"),
            seconds=(self._now() - request.began) / 1000,
        )

    async def _confirm(self, request: JobContext, outcome: str) -> None:
        stone = self._tombstone(request, outcome)
        sealed = await insist(
            lambda: self._owner.finalize(request.id, stone, retention=request.retention, remember=request.remember),
            request.stop,
        )
        if not sealed:
            raise LogDiverged("the seal is not there any more")

    def tell_start(self, request: JobContext, attempt: int) -> None:
        """Have the lifecycle tell that a request has started. Nothing waits for it but the line of its end."""
        self._lifecycle(request, "started", Answer([Started(id=EntryId(attempt, 0))]))

    def _lifecycle(self, request: JobContext, kind: str, answer: Answer) -> "asyncio.Future[None]":
        """Add a line of the lifecycle; gives what is done once Redis has it and all that came before."""
        line = Lifecycle(
            type=kind,
            id=request.id,
            job=request.delivery.id,
            queue=request.delivery.queue,
            attempt=answer.attempt,
            time=self._now(),
            tenant=request.job.tenant if isinstance(request.job, Job) else "",
            retry_of=request.job.retry_of if isinstance(request.job, Job) else "",
            outcome=answer.outcome,
            model=answer.model,
            usage=answer.usage,
            timings=answer.end.timings if answer.end else {},
        )
        return self._lifecycle_stream.write(line)

    async def done_with(self, request: JobContext) -> None:
        """Acknowledge a job, whatever became of its log; one that does not validate is buried first."""
        if isinstance(request.job, InvalidJob) and request.job is not UNREAD:
            await self.bury(request.delivery, str(request.job), request.stop, request.job.code, free=request.free)
        else:
            await self._acknowledge(request.delivery, request.stop)

    async def bury(
        self,
        delivery: Delivery,
        reason: str,
        stop: "asyncio.Future[Stop]",
        code: str = "log_refused",
        *,
        free: Callable[[], None],
    ) -> None:
        """Put a job among the dead letters, and acknowledge it. See `JobContext` for `free`."""
        with _slot_for_a_moment(free):
            await self._dead_letter(delivery, reason, stop, code)
            await self._acknowledge(delivery, stop)

    async def _dead_letter(
        self, delivery: Delivery, reason: str, stop: "asyncio.Future[Stop]", code: str = BURIED
    ) -> None:
        # One that does not validate is of no use as it is, and anybody may add as many of these as there are.
        most = MAX_BESIDE_BYTES + (0 if code in INVALID else self._settings.max_request_bytes)
        # Without its letter a job is not acknowledged. Where Redis refuses that, it does not wait for it here, where
        # it would take a slot: it comes again once its lease has ended.
        await persist(lambda: self._dead_letters.bury(delivery, reason, self._now(), most), stop)
        _log.warning("job_buried", queue=delivery.queue, job=delivery.id, code=code)
        self._metrics.buried.inc()

    async def _acknowledge(self, delivery: Delivery, stop: "asyncio.Future[Stop]") -> None:
        await insist(lambda: self._jobs.acknowledge(delivery), stop)

    def _tombstone(self, request: JobContext, outcome: str) -> Tombstone:
        return Tombstone(outcome=outcome, time=self._now(), digest=digest_of(request.job))


@contextmanager
def _slot_for_a_moment(free: Callable[[], None]) -> Iterator[None]:
    """Have a job give its slot back where what is done here takes longer than a moment: a timer costs little."""
    timer = asyncio.get_running_loop().call_later(_MOMENT, free)
    try:
        yield
    finally:
        timer.cancel()


def _dead_for(request: JobContext, answer: Answer) -> str:
    """Why a job is a dead letter, as its seal says; nothing when it is none.

    A log that was begun for another job tells of that one, not of its duplicate. One that does not validate is
    known by itself, unless it was not read.
    """
    end = answer.end
    if not isinstance(end, Failed) or _is_of_another(answer, request.delivery):
        return ""
    return end.message or end.code if end.code == BURIED or (request.job is UNREAD and end.code in INVALID) else ""


def _is_of_another(answer: Answer, delivery: Delivery) -> bool:
    """Whether another job of the same request began the log."""
    began = answer.started
    return bool(began and began.job and (began.queue, began.job) != (delivery.queue, delivery.id))

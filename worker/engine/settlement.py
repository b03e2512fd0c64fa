"""The end of a job: seal, expiry and tombstone, feed, dead letter, lifecycle, acknowledgement, in this order.

An ordinary job ends by one script, every other job step by step. After a crash between two steps, the
next worker that gets the job finds the seal and does the remaining steps. The acknowledgement comes last, because no
worker gets the job after it. No step delays an earlier one: readers get the end of the answer while a dead letter or a
lifecycle record still waits for Redis, and a job that waits releases its slot.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from ..broker.job_queue import Delivery
from ..broker.log_writer import LogDiverged, LogWriter
from ..contract.answer import Answer
from ..contract.entries import BURIED, Done, Entry, Failed, Started, Terminal, to_fields
from ..contract.ids import SEAL, EntryId
from ..contract.job import INVALID, MAX_OTHER_FIELDS_BYTES, InvalidJob, Job
from ..contract.records import Lifecycle, Tombstone
from ..redisio.retry import RetryUntilAvailable
from ..telemetry.job_events import DuplicateFound, JobBuried, JobFinished
from .job_context import UNREAD, JobContext, JobServices

_SLOT_RELEASED_AFTER = 0.2
"""Seconds that the steps after the seal may take before the job releases its slot."""


class Settlement:
    """Ends one job."""

    def __init__(self, services: JobServices, job: JobContext) -> None:
        self._services = services
        self._job = job
        self._ownership = services.ownership
        self._start_written: asyncio.Future[None] | None = None

    def start_record(self, attempt: int) -> Lifecycle:
        """The `started` record of the lifecycle."""
        return self._lifecycle_record("started", Answer([Started(id=EntryId(attempt, 0))]))

    def record_start(self, attempt: int) -> None:
        """Add a `started` record to the lifecycle. Only the `finished` record waits for it."""
        self._start_written = self._services.lifecycle.write(self.start_record(attempt))

    async def end(self, log: LogWriter, end: Terminal) -> None:
        """Write the terminal entry and do all steps after it.

        Raises:
            LogLost: when this process no longer owns the log, or the seal is lost.
            Stopped: when the job must stop before.
        """
        job = self._job
        await job.wait_for(log.drained())
        if isinstance(end, Failed):  # vLLM sends the usage only at the end of an answer
            so_far = Answer(await job.retry(self._ownership.read_entries, job.id))
            end = msgspec.structs.replace(end, usage=so_far.usage, model=so_far.model)
        written, is_settled = await job.retry(self._seal, log, end)
        # A client that cancels does not always know the usage, which is then counted in the log.
        has_usage = isinstance(written, Done | Failed) and written.usage
        answer = Answer([*([] if has_usage else await job.retry(self._ownership.read_entries, job.id)), written])
        if is_settled:
            self._report(answer)
        else:
            await self.settle(answer)

    async def _seal(self, log: LogWriter, end: Terminal) -> tuple[Entry, bool]:
        """Seal the log, with the times of this try. See `LogOwnership.seal`."""
        job, record = self._job, tuple[str, ...]()
        # An answer ends in one step, unless its usage must be counted, or its `started` record waits for Redis.
        if isinstance(end, Done) and end.usage and (self._start_written is None or self._start_written.done()):
            record = self._services.lifecycle.words(self._lifecycle_record("finished", Answer([end])))
        return await self._ownership.seal(
            log, job.delivery, end, self._tombstone(end.type), retention=job.retention, remember=job.remember,
            finished_record=record,
        )  # fmt: skip

    async def settle_existing_end(self, *, record_missing_start: bool = False) -> None:
        """Settle a request whose terminal entry another process has written.

        `record_missing_start` writes the `started` record of the job again: another worker had the job, and may have
        died before it wrote the record.
        """
        answer = Answer(await self._job.retry(self._ownership.read_entries, self._job.id))
        if record_missing_start and answer.started and not _is_of_another_job(answer, self._job.delivery):
            self.record_start(answer.attempt)
        await self.settle(answer)

    async def settle(self, answer: Answer) -> None:
        """Do all steps after the seal, from expiry and tombstone to the acknowledgement.

        Raises:
            LogDiverged: when the seal is lost, as after a failover.
            Stopped: when the job must stop before.
        """
        job, services, end = self._job, self._services, answer.end
        # If the log has expired, only its tombstone still has the outcome, and is not changed.
        tombstone = self._tombstone(answer.outcome or "unknown")
        if not await job.retry(
            self._ownership.finalize, job.id, tombstone, retention=job.retention, remember=job.remember
        ):
            raise LogDiverged("the seal no longer exists")
        with self._slot_released_soon():
            if end is not None:
                finished = services.lifecycle.write(self._lifecycle_record("finished", answer))
                services.publisher.publish(services.keys.feed(job.id), [(str(SEAL), to_fields(end))])
                if reason := _dead_letter_reason(job, answer):
                    await self._write_dead_letter(reason, BURIED)
                await job.wait_for(finished)
            await self.acknowledge_job()
        if _is_of_another_job(answer, job.delivery):  # its own worker counts it and reports the outcome
            services.telemetry.emit(DuplicateFound(job.delivery.queue, job.delivery.id))
        else:
            self._report(answer)

    def _report(self, answer: Answer) -> None:
        services, job, end = self._services, self._job, answer.end
        services.telemetry.emit(
            JobFinished(
                outcome=answer.outcome,
                code=end.code if isinstance(end, Failed) else None,
                attempt=answer.attempt,
                queue=job.delivery.queue,
                model=answer.model,
                tokens=answer.usage.get("completion_tokens"),
                seconds=(services.now() - job.began) / 1000,
                prompt_tokens=answer.usage.get("prompt_tokens"),
                finish_reason=answer.finish_reason,
            )
        )

    async def acknowledge_job(self) -> None:
        """Acknowledge the job. A job that does not validate is buried first."""
        job = self._job
        if isinstance(job.parsed, InvalidJob) and job.parsed is not UNREAD:
            await self.bury_and_acknowledge(str(job.parsed), job.parsed.code)
        else:
            await job.retry(self._services.jobs.acknowledge, job.delivery)

    async def bury_and_acknowledge(self, reason: str, code: str) -> None:
        """Write the job's dead letter and acknowledge the job."""
        with self._slot_released_soon():
            await self._write_dead_letter(reason, code)
            await self._job.retry(self._services.jobs.acknowledge, self._job.delivery)

    async def _write_dead_letter(self, reason: str, code: str) -> None:
        services, delivery = self._services, self._job.delivery
        # A job that does not validate cannot be put back, and clients may add any number of them: less of it is kept.
        most = MAX_OTHER_FIELDS_BYTES + (0 if code in INVALID else services.settings.max_request_bytes)
        # A job is not acknowledged before its letter is written. If Redis refuses the letter, the job does not wait
        # here for an operator to grant the right, which would take a slot: it is delivered again after its lease.
        retry = RetryUntilAvailable(stop=self._job.stop, outage=services.outage)
        await retry(services.dead_letters.bury, delivery, reason, services.now(), most)
        services.telemetry.emit(JobBuried(delivery.queue, delivery.id, code))

    def _lifecycle_record(self, kind: str, answer: Answer) -> Lifecycle:
        job = self._job
        return Lifecycle(
            type=kind,
            id=job.id,
            job=job.delivery.id,
            queue=job.delivery.queue,
            attempt=answer.attempt,
            time=self._services.now(),
            worker=self._ownership.worker,
            server=job.server,
            tenant=job.parsed.tenant if isinstance(job.parsed, Job) else "",
            retry_of=job.parsed.retry_of if isinstance(job.parsed, Job) else "",
            outcome=answer.outcome,
            model=answer.model,
            usage=answer.usage,
            timings=answer.end.timings if answer.end else {},
        )

    def _tombstone(self, outcome: str) -> Tombstone:
        return Tombstone(outcome=outcome, time=self._services.now(), digest=self._job.digest)

    @contextmanager
    def _slot_released_soon(self) -> Iterator[None]:
        """Release the job's slot if the steps inside take long. A timer costs less than a task."""
        timer = asyncio.get_running_loop().call_later(_SLOT_RELEASED_AFTER, self._job.release_slot)
        try:
            yield
        finally:
            timer.cancel()


def _dead_letter_reason(job: JobContext, answer: Answer) -> str:
    """Why a sealed job gets a dead letter; empty if it gets none.

    The seal of a log that another job began does not concern this job. A job that does not validate is recognized
    without its seal, unless it was not read.
    """
    end = answer.end
    if not isinstance(end, Failed) or _is_of_another_job(answer, job.delivery):
        return ""
    is_dead = end.code == BURIED or (job.parsed is UNREAD and end.code in INVALID)
    return end.message or end.code if is_dead else ""


def _is_of_another_job(answer: Answer, delivery: Delivery) -> bool:
    """Whether another job of the same request began the log."""
    started = answer.started
    return bool(started and started.job and (started.queue, started.job) != (delivery.queue, delivery.id))

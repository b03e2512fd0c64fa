"""Runs one job from delivery to acknowledgement: acquires its log, generates the answer, seals the log, and settles.

After a crash between two steps, the next worker that gets the job reads the log and does the remaining steps.
"""

import asyncio
from collections.abc import Callable

import structlog
from redis.exceptions import RedisError

from ..broker.acquisition import Acquired, AcquireResult, AlreadyEnded, DuplicateJob, IdReused, LeaseLost
from ..broker.job_queue import Delivery
from ..broker.log_writer import (
    LogDiverged,
    LogExhausted,
    LogFenced,
    LogGone,
    LogLost,
    LogOver,
    LogRefused,
    LogSealed,
    LogWriter,
)
from ..contract.entries import BURIED, Failed
from ..contract.history import History
from ..contract.ids import SEAL
from ..contract.job import Job
from ..telemetry.job_events import (
    AttemptBegun,
    DuplicateFound,
    FencedOff,
    InternalError,
    JobLeft,
    JobStarted,
    JobTakenElsewhere,
    JobTakenOver,
    LogDisappeared,
    LogDivergence,
)
from ..telemetry.traces import TracedRun
from ..vllm.servers.room import Demand
from .generation import Generation
from .job_context import UNREAD, JobContext, JobServices, MustWait, Stop, Stopped
from .poison import WITHOUT_PROGRESS, QuarantineTurn, count_failures, needs_quarantine, progress_goal
from .settlement import Settlement

_DIVERGED = "diverged"
"""The `reason` of an attempt that became necessary because Redis has lost entries of the log."""

_REUSED = "the id of the job was used before, for another request: use a new id for each request"


async def run_job(
    services: JobServices,
    delivery: Delivery,
    stop: "asyncio.Future[Stop]",
    release_slot: Callable[[], None] = lambda: None,
    demand: Demand | None = None,
    *,
    may_park: bool = True,
) -> None:
    """Run a delivered job to its acknowledgement, unless `stop` or a fence leaves it to another worker.

    `release_slot` lets another job start. It is called when the job only waits for Redis. `demand` is the place at the
    servers that is kept for the job. Without `may_park`, the job waits here for a server until its deadline.

    Raises:
        MustWait: when no server has a place for the job.
    """
    job = JobContext(services, delivery, stop, release_slot, demand, may_park=may_park)
    settlement = Settlement(services, job)
    if not job.id:  # without an id there is no log for the error
        await settlement.acknowledge_job()
        return
    structlog.contextvars.bind_contextvars(request_id=job.id)  # each job has a task, and thus a context, of its own
    await JobRunner(services, job, settlement).run()


class JobRunner:
    """Runs one job that has a request id."""

    def __init__(self, services: JobServices, job: JobContext, settlement: Settlement) -> None:
        self._services = services
        self._job = job
        self._settlement = settlement
        self._ownership = services.ownership
        self._max_deliveries = services.settings.max_deliveries
        self._emit = services.telemetry.emit

    async def run(self) -> None:
        """Run the job, in quarantine if it may be poison. See `run_job`."""
        job = self._job
        turn = None
        try:
            if await self._needs_quarantine():
                left = (job.deadline - self._services.now()) / 1000
                turn = await self._services.quarantine.wait_turn(job.stop, left)
                if job.stop.done():
                    self._emit(JobLeft(reason=job.stop.result().value))
                    return
                # Without a turn the job's deadline has passed: it ends without a request to vLLM.
            await self._acquire_and_finish(turn)
        except LogRefused as refusal:
            await self._settlement.bury_and_acknowledge(f"Redis refuses to write the log: {refusal}", "log_refused")
        except LogExhausted as problem:
            await self._end_unrunnable_job(str(problem))
        except (RedisError, OSError, LogLost, Stopped, MustWait):  # not the job's fault
            raise
        except Exception as error:
            if job.delivery.count <= self._max_deliveries:
                raise
            self._emit(InternalError(error))
            await self._end_unrunnable_job(f"an error inside the worker at each delivery: {type(error).__name__}")
        finally:
            if turn is not None:
                turn.end()

    async def _needs_quarantine(self) -> bool:
        job = self._job
        if job.parsed is not UNREAD:
            return False
        try:
            history = await job.retry(self._ownership.read_entries, job.id)
        except LogRefused:  # acquiring the log raises it again
            return False
        return needs_quarantine(count_failures(history, job.delivery), self._max_deliveries)

    async def _acquire_and_finish(self, turn: QuarantineTurn | None) -> None:
        """Acquire the log and bring the job to its end.

        Starts over if Redis has lost an end that another process wrote and this process was settling: nobody owns that
        log, so it must be acquired again. Losses in a log that this process owns are handled in `_answer_and_settle`.
        """
        job, settlement = self._job, self._settlement
        while True:
            try:
                match await job.retry(self._acquire):
                    case Acquired() as acquired:
                        if turn is not None:
                            acquired.log.deltas_to_exceed = progress_goal(acquired.history)
                            acquired.log.progress.add_done_callback(turn.end)
                        await self._run_as_owner(acquired)
                    case AlreadyEnded():
                        await settlement.settle_existing_end(record_missing_start=True)
                    case DuplicateJob():
                        self._emit(DuplicateFound(job.delivery.queue, job.delivery.id))
                        await settlement.acknowledge_job()
                    case IdReused():
                        await settlement.bury_and_acknowledge(_REUSED, "id_reused")
                    case LeaseLost():
                        self._emit(JobTakenElsewhere(job.delivery.queue, job.delivery.id))
            except LogDiverged as loss:  # of `settle_existing_end`
                self._emit(LogDivergence(str(loss)))
            else:
                return

    async def _acquire(self) -> AcquireResult:
        job, services = self._job, self._services
        expire_at = job.expires_at(services.now())
        # The record has fields of the job. A job that must not be read yet is recorded after it was read.
        is_read = job.parsed is not UNREAD
        record = services.lifecycle.words(self._settlement.start_record(1)) if is_read else ()
        return await self._ownership.acquire(
            job.id, job.delivery, expire_at, job.digest, job.may_have_digest, started_record=record
        )

    async def _run_as_owner(self, acquired: Acquired) -> None:
        """Answer, seal and settle, as long as this process owns the log."""
        job, log = self._job, acquired.log
        burial = self._reason_to_bury(acquired)
        if not burial:
            job.parse()
            self._start_trace(log.attempt)
        if log.attempt == 1:
            self._emit(JobStarted(max(0, self._services.now() - job.delivery.enqueued) / 1000))
            self._emit(AttemptBegun("started", 1))
        else:
            self._emit(AttemptBegun("takeover", log.attempt))
            self._emit(JobTakenOver(log.attempt, job.delivery.count))
        self._services.publisher.attach(log)
        try:
            await self._answer_and_settle(acquired, burial)
        except LogSealed:
            await self._settlement.settle_existing_end()
        except LogOver:
            self._emit(LogDisappeared(log.attempt))
            await self._settlement.acknowledge_job()
        except LogFenced as loss:
            self._emit(FencedOff(str(loss)))
        except Stopped:
            self._emit(JobLeft(reason=job.stop.result().value, attempt=log.attempt))
        finally:
            self._services.publisher.detach(log)

    async def _answer_and_settle(self, acquired: Acquired, burial: str) -> None:
        """Write the end of an acquired log: an answer, or the reason of a burial. Raises no LogDiverged.

        A log that was deleted, or of which Redis has lost entries, continues under the next attempt. That attempt may
        be lost too, at any step, so one loop is around all steps. A job whose log is lost repeatedly is buried:
        otherwise vLLM would generate the answer forever.
        """
        job, log = self._job, acquired.log
        generation, losses = None, 0
        if not burial:
            if not acquired.is_start_recorded:
                self._settlement.record_start(log.attempt)
            generation = Generation(self._services, job, log, History(acquired.history, acquired.fault))
        while True:
            try:
                if losses:
                    await job.retry(self._recreate_log, log)
                    if generation is None:
                        await job.retry(self._ownership.next_attempt, log, job.delivery, _DIVERGED)
                    else:
                        await generation.restart(_DIVERGED)
                end = await generation.generate() if generation else _buried(burial, log.attempt)
                await self._settlement.end(log, end)
            except LogOver:
                raise
            except (LogDiverged, LogGone) as loss:
                self._emit(LogDivergence(str(loss)))
                losses += 1
                if losses > self._max_deliveries:
                    generation, burial = None, f"its log was deleted or lost entries {losses} times while it ran"
            else:
                return

    def _start_trace(self, attempt: int) -> None:
        """Start the span of the job. The trace of its requests to vLLM continues below the span."""
        job, traces = self._job, self._services.traces
        if traces is None:
            return
        job.traceparent = traces.start(
            TracedRun(
                request_id=job.id,
                queue=job.delivery.queue,
                job=job.delivery.id,
                attempt=attempt,
                waited_s=max(0, job.began - job.delivery.enqueued) / 1000,
                traceparent=job.traceparent,
                request=job.parsed.request if isinstance(job.parsed, Job) else {},
            )
        )

    def _reason_to_bury(self, acquired: Acquired) -> str:
        """Why a job must not run; empty if it may."""
        failed = count_failures(acquired.history, self._job.delivery)
        if failed >= self._max_deliveries:
            return f"the job was delivered {failed} times {WITHOUT_PROGRESS}"
        return acquired.unreadable

    async def _recreate_log(self, log: LogWriter) -> None:
        """Create a log again that was deleted or lost before it expired."""
        job = self._job
        expire_at = job.deadline + job.retention * 1000
        if self._services.now() >= expire_at:
            raise LogOver("the log has expired")
        await self._ownership.recreate(log, job.delivery, expire_at, job.digest)

    async def _end_unrunnable_job(self, reason: str) -> None:
        """End a job that this process cannot handle. Without an end it would be delivered forever."""
        job = self._job
        end, expire_at = _buried(reason, 0), job.expires_at(self._services.now())
        try:
            if await job.retry(self._ownership.seal_unowned, job.id, job.delivery, end, expire_at):
                await self._settlement.settle_existing_end()
        except Exception as error:
            if isinstance(error, RedisError | OSError | LogLost | Stopped) and not isinstance(error, LogRefused):
                raise
            # The job must not be delivered again because of its log, whatever the log holds.
            await self._settlement.bury_and_acknowledge(reason, BURIED)


def _buried(reason: str, attempt: int) -> Failed:
    return Failed(id=SEAL, attempt=attempt, code=BURIED, message=reason)

"""One job from claim to acknowledgement.

The way of a job: take its log, have vLLM answer into it, settle it. A crash between any two of these is repaired by
whoever gets the job next and looks at the log.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import structlog
from redis.exceptions import RedisError

from ..broker.acquisition import Acquired, AlreadyEnded, DuplicateJob, IdReused, LeaseLost
from ..broker.cluster_publisher import AnyPublisher
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
from ..broker.ownership import LogOwnership
from ..contract.answer import Answer
from ..contract.entries import BURIED, Failed, Terminal
from ..contract.history import History
from ..contract.ids import SEAL
from ..contract.job import (
    InvalidJob,
    Job,
    check_limits,
    is_digest_of,
    parse_job,
    request_id_of,
    times_of,
    with_limit,
)
from ..settings import Settings
from ..telemetry.metrics import Metrics
from ..vllm.servers.pool import ServerPool
from .generation import Generation
from .job_context import UNREAD, JobContext, Stop, Stopped, digest_of, insist
from .poison import Quarantine, QuarantineTurn, failures, goal_of, is_doubtful, is_suspect
from .settlement import Settlement

_DAY_MS = 24 * 3600 * 1000

_DIVERGED = "diverged"
"""The `reason` of an attempt that became necessary because Redis has lost something of the log."""

_REUSED = "the id of the job was used before, for another request: give each request an id of its own"

_log = structlog.get_logger()


class JobRunner:
    """Runs jobs; all of a process share one. `now` is Redis's clock in Unix ms."""

    def __init__(
        self,
        settings: Settings,
        *,
        settlement: Settlement,
        owner: LogOwnership,
        publisher: AnyPublisher,
        upstream: ServerPool,
        now: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._owner = owner
        self._settlement = settlement
        self._publisher = publisher
        self._upstream = upstream
        self._now = now
        self._turns = Quarantine(settings.first_token_timeout)
        self._metrics = metrics

    async def run(
        self, delivery: Delivery, stop: "asyncio.Future[Stop]", free: Callable[[], None] = lambda: None
    ) -> None:
        """Do a job. It ends acknowledged, or is left to another worker when `stop` or a fence says so.

        `free` gives its slot to another job: it is called where vLLM is not asked any more, and Redis is waited for.
        """
        try:
            request = self._request(delivery, stop, free)
        except InvalidJob as problem:  # without a usable id there is no log to say it in
            await self._settlement.bury(delivery, str(problem), stop, problem.code, free=free)
            return
        with structlog.contextvars.bound_contextvars(request_id=request.id):
            turn = None
            try:
                if await self._is_suspect(request):
                    turn = await self._turns.wait(stop, (request.deadline - self._now()) / 1000)
                    if stop.done():
                        _log.info("job_left", reason=stop.result().value)
                        return
                    # Without a turn its deadline has passed: it is ended, and vLLM is asked for nothing.
                await self._take(request, turn)
            except LogRefused as refusal:
                await self._settlement.bury(delivery, f"Redis refuses to write the log: {refusal}", stop, free=free)
            except LogExhausted as problem:
                await self._condemn(request, str(problem))
            except (RedisError, OSError, LogLost, Stopped):  # not the job's fault
                raise
            except Exception as error:
                if delivery.count <= self._settings.max_deliveries:
                    raise
                _log.exception("internal_error")
                await self._condemn(request, f"an error inside the worker, time and again: {type(error).__name__}")
            finally:
                if turn is not None:
                    turn.end()

    async def _is_suspect(self, request: JobContext) -> bool:
        """Whether the job may be what killed the workers that had it, and so is to run alone."""
        if request.job is not UNREAD:
            return False
        try:
            history = await insist(lambda: self._owner.read_entries(request.id), request.stop)
        except LogRefused:  # said when it is taken
            return False
        return is_suspect(failures(history, request.delivery), self._settings.max_deliveries)

    async def _take(self, request: JobContext, turn: QuarantineTurn | None) -> None:
        """Take the log and do what is to be done with it; again, where an end that was found there is lost since."""
        while True:
            try:
                await self._take_once(request, turn)
            except LogDiverged as loss:
                _log.warning("log_diverged", reason=str(loss))
            else:
                return

    async def _take_once(self, request: JobContext, turn: QuarantineTurn | None) -> None:
        """Come to own the log and answer into it, or do what is left to do where that is not ours."""
        delivery, own_digest, is_same = request.delivery, digest_of(request.job), partial(_is_same, request.job)
        taken = await insist(
            lambda: self._owner.acquire(request.id, delivery, _expiry(request, self._now()), own_digest, is_same),
            request.stop,
        )
        match taken:
            case Acquired():
                if turn is not None:
                    taken.log.deltas_to_pass = goal_of(taken.history)
                    taken.log.progress.add_done_callback(turn.end)
                await self._own(request, taken)
            case AlreadyEnded():
                await self._settlement.settle_found(request, is_repair=True)
            case DuplicateJob():
                _log.info("duplicate_job", queue=delivery.queue, job=delivery.id)
                await self._settlement.done_with(request)
            case IdReused():
                await self._settlement.bury(delivery, _REUSED, request.stop, "id_reused", free=request.free)
            case LeaseLost():
                _log.info("job_taken_elsewhere", queue=delivery.queue, job=delivery.id)

    async def _own(self, request: JobContext, owned: Acquired) -> None:
        """Answer, seal and settle, for as long as the log is ours."""
        log, stop = owned.log, request.stop
        self._publisher.attach(log)
        self._count_start(request, log.attempt)
        if log.attempt > 1:
            _log.info("job_taken_over", attempt=log.attempt, delivery=request.delivery.count)
        try:
            if reason := self._to_bury(request, owned):
                await self._finish(request, log, None, reason)
                return
            request = self._read(request)
            self._settlement.tell_start(request, log.attempt)
            await self._finish(request, log, self._generation(request, owned))
        except LogSealed:
            await self._settlement.settle_found(request)
        except LogOver:
            _log.warning("log_gone", attempt=log.attempt)
            await self._settlement.done_with(request)
        except LogFenced as loss:
            _log.warning("job_taken_elsewhere", reason=str(loss))
        except Stopped:
            _log.info("job_left", reason=stop.result().value, attempt=log.attempt)
        finally:
            self._publisher.detach(log)

    async def _finish(
        self, request: JobContext, log: LogWriter, generation: Generation | None, reason: str = ""
    ) -> None:
        """Bring a log that is ours to its end: with an answer or, where there is to be none, with a `reason`.

        A log that is deleted, or of which Redis has lost something, is gone on with under a next attempt. That may be
        lost as well, at any step: so there is one loop around all of it. Where it happens again and again, vLLM is not
        asked for the answer for ever: the job is buried.
        """
        losses, most = 0, self._settings.max_deliveries
        while True:
            try:
                if losses:
                    await self._begin_again(request, log)
                    if generation is None:
                        await insist(lambda: self._owner.next_attempt(log, request.delivery, _DIVERGED), request.stop)
                    else:
                        await generation.begin_again(_DIVERGED)
                end = _buried(reason, log.attempt) if generation is None else await _end_of(generation, log)
                answer = await self._settlement.seal(request, log, end)
                await self._settlement.settle(request, answer)
            except LogOver:
                raise
            except (LogDiverged, LogGone) as loss:
                _log.warning("log_diverged", reason=str(loss))
                losses += 1
                if losses > most:
                    generation, reason = None, f"its log was deleted or lost entries {losses} times while it ran"
            else:
                self._count_first_delta(answer)
                return

    def _generation(self, request: JobContext, owned: Acquired) -> Generation:
        return Generation(
            self._to_send(request),
            owned.log,
            History(owned.history, owned.fault),
            owner=self._owner,
            upstream=self._upstream,
            settings=self._settings,
            metrics=self._metrics,
            now=self._now,
        )

    def _to_bury(self, request: JobContext, owned: Acquired) -> str:
        """Why a job that is ours must not run, or nothing."""
        failed, most = failures(owned.history, request.delivery), self._settings.max_deliveries
        if failed >= most:
            return f"the job was delivered {failed} times without progress: whoever had it died or was cut off"
        return owned.unreadable

    async def _condemn(self, request: JobContext, reason: str) -> None:
        """End a job with which this process cannot deal, lest it come again for ever."""
        end, expire_at = _buried(reason, 0), _expiry(request, self._now())
        try:
            if await insist(
                lambda: self._owner.seal_unowned(request.id, request.delivery, end, expire_at), request.stop
            ):
                await self._settlement.settle_found(request)
        except Exception as error:
            if isinstance(error, RedisError | OSError | LogLost) and not isinstance(error, LogRefused):
                raise
            # Whatever it is that the log holds, it must not bring the job back for ever.
            await self._settlement.bury(request.delivery, reason, request.stop, BURIED, free=request.free)

    def _count_start(self, request: JobContext, attempt: int) -> None:
        if attempt == 1:
            self._metrics.waited(max(0, self._now() - request.delivery.enqueued) / 1000)
        self._metrics.attempt("started" if attempt == 1 else "takeover")

    def _count_first_delta(self, answer: Answer) -> None:
        after = answer.end.timings.get("first_delta_ms") if answer.end else None
        if isinstance(after, int):
            self._metrics.first_delta(after / 1000)

    async def _begin_again(self, request: JobContext, log: LogWriter) -> None:
        """Make a log anew that is gone before its time: it was lost with the Redis that had it, or deleted."""
        expire_at = request.deadline + request.retention * 1000
        if self._now() >= expire_at:
            raise LogOver("the log has expired")
        await insist(
            lambda: self._owner.recreate(log, request.delivery, expire_at, digest_of(request.job)), request.stop
        )

    def _request(self, delivery: Delivery, stop: "asyncio.Future[Stop]", free: Callable[[], None]) -> JobContext:
        request_id = request_id_of(delivery.fields)
        unread = is_doubtful(delivery, self._settings.max_deliveries)
        try:
            deadline, retention = times_of(delivery.fields)
        except InvalidJob:
            deadline = retention = None
        retention = retention or self._settings.retention
        return JobContext(
            began=self._now(),
            id=request_id,
            delivery=delivery,
            job=UNREAD if unread else self._job(delivery),
            deadline=deadline or delivery.enqueued + _DAY_MS,
            retention=retention,
            remember=max(self._settings.remember, retention),
            stop=stop,
            free=free,
        )

    def _read(self, request: JobContext) -> JobContext:
        return replace(request, job=self._job(request.delivery)) if request.job is UNREAD else request

    def _job(self, delivery: Delivery) -> Job | InvalidJob:
        settings = self._settings
        try:
            job = parse_job(delivery.fields, settings.max_request_bytes)
            check_limits(job.request, max_choices=settings.max_choices, max_tokens=settings.max_tokens)
        except InvalidJob as problem:
            return problem
        return job

    def _to_send(self, request: JobContext) -> JobContext:
        """The request as vLLM gets it; its digest is that of what was asked."""
        if isinstance(request.job, InvalidJob):
            return request
        return replace(request, job=with_limit(request.job, self._settings.max_tokens))


def _expiry(request: JobContext, now: int) -> int:
    """When a log that is never sealed expires, in Unix ms."""
    return max(request.deadline, now) + request.retention * 1000


def _buried(reason: str, attempt: int) -> Failed:
    return Failed(id=SEAL, attempt=attempt, code=BURIED, message=reason)


def _is_same(job: Job | InvalidJob, known: str) -> bool:
    """Whether a log with this digest may be the job's: where one of the two is not known, it may."""
    return not isinstance(job, Job) or not known or is_digest_of(known, job.request, job.fallbacks)


async def _end_of(generation: Generation, log: LogWriter) -> Terminal:
    """The terminal entry of an answer; an error of our own becomes one too, lest the job come again for ever."""
    try:
        return await generation.end()
    except Exception as error:
        if isinstance(error, LogLost | Stopped | RedisError | OSError):
            raise
        _log.exception("internal_error")
        return Failed(
            id=SEAL, attempt=log.attempt, code="internal", message="an error inside the worker: its own log says more"
        )

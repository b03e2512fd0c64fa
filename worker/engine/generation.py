"""Generates the answer to one job with vLLM: models, servers, tries, pauses and resumes, within the job's limits."""

import asyncio
import random
import time
from collections.abc import Sequence
from contextvars import Context, copy_context
from typing import cast

from redis.exceptions import RedisError

from ..broker.log_writer import LogDiverged, LogGone, LogLost, LogWriter
from ..contract.answer import Answer
from ..contract.entries import Done, Failed, Fields, Object, Restarted, Terminal, Usage, to_fields
from ..contract.history import History, fault_in
from ..contract.ids import BEFORE_ALL, SEAL
from ..contract.job import InvalidJob, Job, with_max_tokens
from ..settings import redacted_url
from ..telemetry.events import VllmRefused
from ..telemetry.job_events import (
    AnswerRestarted,
    AnswerResumed,
    AttemptBegun,
    InternalError,
    ModelGivenUp,
    ModelWaitBegan,
    ModelWaitEnded,
    RequestSent,
    UnknownFinishReason,
    UpstreamFailed,
    WaitingForModel,
)
from ..vllm.chunks.parser import ChunkParser
from ..vllm.errors import MODEL_NOT_FOUND, CannotResume, UpstreamError
from ..vllm.resume.resume import plan_resume
from ..vllm.resume.resumed_chunks import ResumedChunkParser
from ..vllm.servers.circuit import Caller, CircuitState
from ..vllm.servers.pool import CHAT
from ..vllm.servers.server import Server
from .answer_times import AnswerTimes, former_times
from .job_context import DeadlinePassed, JobContext, JobServices, MustWait, Stopped
from .request_fields import choices_of, model_of, parser_options
from .tries import FailedTry, Raise, Tries, after_failure, never_reached

_LONGEST_NAME = 200
"""Characters of a model's name or of a finish reason in the worker's log."""

_ANOTHER_MODEL_MAY_DO = frozenset({"context_length_exceeded", MODEL_NOT_FOUND})
"""Errors that another model may not have. After the last try, a retryable error moves to the next model too."""


class Generation:
    """The answer to one request, as this process generates it."""

    __slots__ = (
        "_answer", "_caller", "_context", "_emit", "_fault", "_has_extended_answer", "_job", "_log",
        "_needs_next_attempt", "_parser", "_server", "_servers", "_services", "_settings", "_times", "_tries_before",
        "_waited_for", "_waited_ms", "_was_allowed",
    )  # fmt: skip

    def __init__(self, services: JobServices, job: JobContext, log: LogWriter, history: History) -> None:
        self._services = services
        self._servers = services.servers
        self._settings = services.settings
        self._emit = services.telemetry.emit
        self._job = job
        self._log = log
        self._was_allowed = False
        """Whether a server has begun to answer with this model. A later 401 or 403 then concerns the key only."""
        self._recall(history)
        self._caller = Caller(traceparent=job.traceparent)
        self._tries_before = job.delivery.tries or 0
        """How many tries of the first model count, from before the job was parked."""
        if job.delivery.tries is not None:  # it may have failed at the servers that do not work now
            working = CircuitState.CLOSED
            self._caller.failed_at = {each.circuit for each in self._servers.servers if each.circuit.state != working}
        self._server: Server
        """The server whose stream is read."""
        self._parser: ChunkParser
        self._context: Context
        """The job's context, which has the request's id for the log. The stream arrives in its connection's context."""
        self._needs_next_attempt = False
        """Whether this attempt has written a `delta`, `resumed` or `restarted`, which another try must not repeat."""
        self._has_extended_answer = False
        """Whether this attempt has added something visible to an interrupted answer."""
        self._waited_for: tuple[str, ...] = ()
        """Models whose wait for a server is logged already."""
        self._waited_ms = max(0, services.now() - job.delivery.enqueued)
        former = former_times(
            history.entries, job.delivery, delivered=job.began, gap_timeout=self._settings.gap_timeout
        )
        self._times = AnswerTimes(services.telemetry, time.monotonic(), former, now_ms=services.now())

    async def generate(self) -> Terminal:
        """Write all deltas of the answer; returns the terminal entry that must follow them.

        Raises:
            LogLost: when this process no longer owns the log.
            MustWait: when no server has a place for the job.
            Stopped: when the job must stop here.
        """
        job, answer = self._job.parsed, self._answer
        try:
            if isinstance(job, InvalidJob):
                return self._failed(job.code, str(job))
            if not self._fault and answer.finished(choices_of(job.request)):
                # After the last finish_reason nothing is left to generate: only the seal is missing.
                return self._done(answer.finish_reason, answer.usage, answer.model)
            if answer.begun and self._settings.on_interrupt == "fail":
                return self._failed(
                    "interrupted", "the worker that wrote this answer is gone, and WORKER_ON_INTERRUPT is fail"
                )
            return await self._ask_models(with_max_tokens(job, self._settings.max_tokens))
        except DeadlinePassed:
            return self._failed("deadline", "the deadline of the job passed before its answer was complete")
        except (LogLost, Stopped, MustWait, RedisError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - without an end the job would be delivered forever
            self._emit(InternalError(error))
            message = "an error inside the worker: see the log of the worker process"
            return Failed(id=SEAL, attempt=self._log.attempt, code="internal", message=message)

    async def restart(self, reason: str) -> None:
        """Begin the answer again under the next attempt, because Redis has lost entries that it had accepted.

        Raises:
            LogLost: when this process no longer owns the log.
        """
        await self._begin_attempt(reason)
        self._begin_answer_again(reason, redis_lost_it=True)

    async def _begin_attempt(self, reason: str) -> None:
        """Continue under the next attempt of the log, from the answer as Redis holds it."""
        job, ownership = self._job, self._services.ownership
        if not isinstance(self._log.loss, LogDiverged | LogGone):
            await job.wait_for(self._log.drained())
        await job.retry(ownership.next_attempt, self._log, job.delivery, reason)
        entries = await job.retry(ownership.read_entries, job.id)
        self._recall(History(entries, fault_in(entries)))
        self._needs_next_attempt = self._has_extended_answer = False
        self._emit(AttemptBegun(reason, self._log.attempt))

    def _recall(self, history: History) -> None:
        """Set the answer so far from the entries of earlier attempts."""
        self._answer, self._fault = Answer(history.entries), history.fault
        self._was_allowed |= self._answer.begun

    def _begin_answer_again(self, reason: str, *, redis_lost_it: bool = False) -> None:
        """Write `restarted`, at which readers drop the answer so far."""
        self._emit(AnswerRestarted(self._log.attempt, reason))
        self._log.append(to_fields(Restarted(id=BEFORE_ALL)))
        self._answer, self._fault = Answer(), ""
        self._needs_next_attempt = True
        self._times.restart(redis_lost_it=redis_lost_it)

    async def _ask_models(self, job: Job) -> Terminal:
        """Try the job's model and, if no server can answer with it, its fallbacks one after another."""
        models = [model_of(job.request), *job.fallbacks]
        if self._answer.model in models:  # the model that began the answer continues it
            del models[: models.index(self._answer.model)]
        given_up = ""
        while True:
            model = models.pop(0)
            try:
                return await self._ask_model(job.request | {"model": model} if model else job.request, models)
            except UpstreamError as error:
                broke_off = self._needs_next_attempt and self._settings.on_interrupt == "fail"
                moves_on = error.retryable or error.elsewhere or error.code in _ANOTHER_MODEL_MAY_DO
                if not models or broke_off or not moves_on:
                    return self._failed(error.code, error.message + (given_up and f" (before it: {given_up})"))
                given_up += f"{'; ' if given_up else ''}{model}: {error.code}"
                self._emit(ModelGivenUp(error.code, model, models[0]))
                if self._needs_next_attempt:
                    await self._begin_attempt(error.code)
                if self._answer.begun:
                    self._begin_answer_again("another model")
                self._was_allowed = False

    async def _ask_model(self, request: Object, others: Sequence[str]) -> Done:
        """Try one model until the tries without progress are exhausted; `others` are its fallbacks.

        Raises:
            UpstreamError: the error of the last try.
        """
        model, pace, server = model_of(request), self._services.pace, None
        tries = Tries(self._settings.tries, pace.first_retry, made=self._tries_before)
        self._tries_before = 0
        self._caller.refused_at.clear()  # the servers that refused the former model may accept this one
        while True:
            await self._wait_for_server(model, others, tried=tries.made)
            server = self._servers.choose(model, self._caller, other_than=server)
            is_trial = server.circuit.state is CircuitState.HALF_OPEN
            tries = tries.with_one_more()
            try:
                with server.reserve():
                    if self._job.demand is not None:
                        self._job.demand.end()
                    answering = self._ask_server(server, request, is_last=tries.are_exhausted)
                    return await self._job.within_limits(answering, self._log)
            except UpstreamError as error:
                self._emit(
                    UpstreamFailed(  # without the message, which may quote the request
                        error.code, error.status, redacted_url(server.url), tried=tries.made, retryable=error.retryable
                    )
                )
                if error.is_busy:
                    self._emit(VllmRefused(redacted_url(server.url)))
                failed = FailedTry(
                    error=error,
                    tries=tries,
                    another_server_may_answer=self._servers.has_candidate(model, self._caller),
                    another_model_should_answer=self._servers.should_fall_back(model, others, self._caller),
                    has_room_elsewhere=self._servers.accepts(model, self._caller),
                    was_allowed=self._was_allowed,
                    was_failed_trial=is_trial and server.circuit in self._caller.failed_at,
                    needs_next_attempt=self._needs_next_attempt,
                    has_extended_answer=self._has_extended_answer,
                    fails_on_interrupt=self._settings.on_interrupt == "fail",
                )
                decision = after_failure(failed, pace, jitter=random.uniform(0.75, 1.25))  # noqa: S311 - jitter
                if isinstance(decision, Raise):
                    raise
                tries = decision.tries
                await self._job.within_limits(asyncio.sleep(decision.pause), self._log)
                if decision.needs_next_attempt:
                    await self._begin_attempt(error.code)

    async def _wait_for_server(self, model: str, others: Sequence[str], *, tried: int) -> None:
        """Wait until a server accepts a request for this model. A wait is no try, and is logged once for each model.

        The wait is short if the job may be parked. After it the job goes back to its queue, where it holds no slot and
        any worker can take it, before jobs that were not begun. A job that has failed in `tried` tries is parked only
        while every server is away. It waits here for a full server, and leaves one place there to others.

        Raises:
            MustWait: when no server accepts a request. All entries of the log are then written.
        """
        # A reader waits for the rest of an interrupted answer.
        self._caller.may_exceed_limit = self._answer.begun
        if self._servers.accepts(model, self._caller):
            return
        if model not in self._waited_for:
            self._waited_for += (model,)
            self._emit(WaitingForModel(model[:_LONGEST_NAME]))
        self._emit(ModelWaitBegan())
        longest = self._services.pace.longest_wait_here if self._job.may_park else float("inf")
        ends_at = time.monotonic() + longest
        try:
            while not self._servers.accepts(model, self._caller):
                if (left := ends_at - time.monotonic()) <= 0:
                    if not tried or self._servers.are_away(model):
                        await self._job.wait_for(self._log.drained())
                        is_begun = tried or self._answer.begun or self._caller.failed_at
                        raise MustWait(model, tried if is_begun else None)
                    left = longest
                available = self._servers.wait_available(model, others, caller=self._caller, within=left)
                await self._job.within_limits(available, self._log)
        finally:
            self._emit(ModelWaitEnded())

    async def _ask_server(self, server: Server, request: Object, *, is_last: bool) -> Done:
        """Make one try at one server: resume the answer so far or, if that is not possible, begin again."""
        if self._fault:
            self._begin_answer_again(self._fault)
        if self._answer.begun:
            try:
                return await self._resume(server, request, is_last=is_last)
            except CannotResume as reason:
                self._begin_answer_again(str(reason))
        return await self._read_stream(server, request, ChunkParser(**parser_options(request)))

    async def _resume(self, server: Server, request: Object, *, is_last: bool) -> Done:
        """Let a server continue the answer, with the first of the plan's requests that it accepts.

        Raises:
            CannotResume: when the answer must begin again.
        """
        if self._settings.on_interrupt != "resume":
            raise CannotResume("WORKER_ON_INTERRUPT")
        try:
            plan = await plan_resume(self._servers, server, request, self._answer, self._caller)
        except UpstreamError as error:
            others_remain = self._servers.has_candidate(model_of(request), self._caller)
            error.is_busy = error.is_draining  # a full vLLM answers queries, and a router may refuse them forever
            if others_remain if error.elsewhere else (not is_last or never_reached(error) or error.is_busy):
                raise
            # The server may still be able to answer from the beginning.
            self._caller.refused_at.clear()
            raise CannotResume(f"the server did not answer the queries for the plan: {error.code}") from None
        if plan.is_exhausted and not plan.withheld:
            return self._done("length", self._answer.usage, self._answer.model)
        refusal = ""
        for route, body in plan.requests:
            parser = ResumedChunkParser(plan, **parser_options(request))
            try:
                return await self._read_stream(server, body, parser, route)
            except CannotResume as reason:
                refusal = str(reason)
            except UpstreamError as error:
                if self._needs_next_attempt or error.retryable or error.elsewhere or not plan.prompt_ids:
                    raise
                refusal = f"the server refuses to continue: {error.code}"
        raise CannotResume(refusal)

    async def _read_stream(self, server: Server, body: Object, parser: ChunkParser, route: str = CHAT) -> Done:
        """Read one stream into the log. Per token only `_on_events` runs: no await and no task."""
        self._server, self._parser, self._context = server, parser, copy_context()
        self._job.server = redacted_url(server.url)
        self._emit(RequestSent(self._job.server))
        async with self._servers.stream(server, body, route, caller=self._caller) as stream:
            stream.has_output = lambda: parser.has_output
            self._times.awaits_delta = True
            try:
                while await stream.read_into(self._on_events) and not parser.done:
                    await self._log.wait_for_room()
                await stream.read_rest()
                parser.check_complete(stream.skipped)
            except UpstreamError:
                if not parser.is_complete:
                    raise
                # The stream broke after the last finish_reason: the answer is complete.
            finally:
                self._note_progress()
                self._times.on_stream_end(self._log.appended, stream.watchdog)
        if parser.unknown_reason:
            self._emit(UnknownFinishReason(parser.unknown_reason[:_LONGEST_NAME], redacted_url(server.url)))
        return self._done(parser.finish_reason, parser.usage, parser.model, parser.extra)

    def _on_events(self, events: list[bytes]) -> bool:
        """Append the entries of the stream's events to the log. Returns whether reading should pause."""
        log, parser = self._log, self._parser
        entries: list[Fields] = []
        try:
            for data in events:
                entries += parser.parse(data)
        finally:  # entries before an error are written too
            log.extend(entries)
        if not self._needs_next_attempt or self._times.awaits_delta:
            self._note_progress()
        return parser.done or log.is_full

    def _note_progress(self) -> None:
        """Update what is known of this attempt: its first delta, and whether it has written or added to the answer."""
        parser, times = self._parser, self._times
        if times.awaits_delta and parser.has_delta:
            self._context.run(times.on_first_delta, time.monotonic(), self._log.appended)
            self._was_allowed = True
        if not parser.needs_next_attempt:
            return
        if isinstance(parser, ResumedChunkParser):
            self._has_extended_answer = parser.has_extended_answer
            if not self._needs_next_attempt:  # emitted at the first entry: the end of the answer may be minutes away
                resumed = AnswerResumed(self._log.attempt, redacted_url(self._server.url))
                self._context.run(self._emit, resumed)
        self._needs_next_attempt = True

    def _done(self, finish_reason: str, usage: Usage | Object, model: str, extra: Object | None = None) -> Done:
        return Done(
            id=SEAL,
            attempt=self._log.attempt,
            finish_reason=finish_reason,
            usage=cast("Usage", usage),
            model=model,
            timings=self._timings(),
            extra=extra or {},
        )

    def _failed(self, code: str, message: str) -> Failed:
        return Failed(id=SEAL, attempt=self._log.attempt, code=code, message=message, timings=self._timings())

    def _timings(self) -> Object:
        began, first_delta = self._times.began, self._times.first_delta
        timings: Object = {"waited_ms": self._waited_ms, "total_ms": round((time.monotonic() - began) * 1000)}
        if first_delta is not None:
            timings["first_delta_ms"] = round((first_delta - began) * 1000)
        if self._times.interrupted:
            timings["interrupted_ms"] = round(self._times.interrupted * 1000)
        return timings

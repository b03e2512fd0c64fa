"""Having vLLM answer one job into its log: tries, pauses, and what makes it stop before its end."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypedDict, TypeVar, cast

import structlog

from ..broker.log_writer import LogDiverged, LogGone, LogWriter
from ..broker.ownership import LogOwnership
from ..contract.answer import Answer
from ..contract.entries import Done, Failed, Fields, Object, Restarted, Terminal, Usage, to_fields
from ..contract.history import History, fault_in
from ..contract.ids import BEFORE_ALL, SEAL
from ..contract.job import InvalidJob, Job
from ..settings import Settings, shown_url
from ..telemetry.metrics import Metrics
from ..vllm.chunks.parser import ChunkParser
from ..vllm.errors import MODEL_NOT_FOUND, UNAUTHORIZED, CannotResume, UpstreamError
from ..vllm.resume.parser import ResumedChunkParser
from ..vllm.resume.resume import plan_resume
from ..vllm.servers.circuit import Caller, CircuitState
from ..vllm.servers.pool import CHAT, ServerPool
from ..vllm.servers.server import Server
from .job_context import JobContext, Stopped, drained, insist
from .tries import Tries, was_not_let_in

_T = TypeVar("_T")
_LONGEST_NAME = 200
"""Characters of a model's name, or of a finish reason, in the worker's log."""
_MOVES_ON = frozenset({"context_length_exceeded", MODEL_NOT_FOUND})
"""Refusals that another model may not share; whatever could be tried again moves on too, once its tries are used."""

_log = structlog.get_logger()


class DeadlinePassed(Exception):
    """The job's time is over."""


class Generation:
    """The answer to one request, as this process makes it. `now` is Redis's clock in Unix ms."""

    __slots__ = (
        "_began", "_caller", "_committed", "_endpoint", "_fault", "_first_delta", "_history", "_log", "_metrics",
        "_now", "_owner", "_parser", "_request", "_settings", "_upstream", "_waited_for", "_waited_ms",
        "_was_allowed", "_went_on",
    )  # fmt: skip

    def __init__(
        self,
        request: JobContext,
        log: LogWriter,
        history: History,
        *,
        owner: LogOwnership,
        upstream: ServerPool,
        settings: Settings,
        metrics: Metrics,
        now: Callable[[], int],
    ) -> None:
        self._request = request
        self._log = log
        self._was_allowed = False
        """Whether a server has begun to answer with this model: it is not what is asked that is forbidden then."""
        self._recall(history)
        self._owner = owner
        self._upstream = upstream
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._caller = Caller()
        self._endpoint: Server
        """The server that is read from, and what reads it."""
        self._parser: ChunkParser
        self._committed = False
        """Whether this attempt has written what another try cannot just write again."""
        self._went_on = False
        """Whether it has added to an answer that had broken off."""
        self._waited_for: set[str] = set()
        self._began = time.monotonic()
        self._waited_ms = max(0, now() - request.delivery.enqueued)
        self._first_delta: float | None = None

    async def end(self) -> Terminal:
        """Write all deltas of the answer, and give the terminal entry that it deserves.

        Raises:
            LogLost: when the log is no longer ours.
            Stopped: when the job is to stop here.
        """
        job, history = self._request.job, self._history
        if isinstance(job, InvalidJob):
            return self._failed(job.code, str(job))
        if not self._fault and history.finished(choices_of(job.request)):
            # After the last finish_reason there is nothing to generate: only the seal was missing.
            return self._done(history.finish_reason, history.usage, history.model)
        if history.begun and self._settings.on_interrupt == "fail":
            return self._failed(
                "interrupted", "the worker that wrote this answer is gone, and WORKER_ON_INTERRUPT is fail"
            )
        try:
            return await self._generate(job)
        except DeadlinePassed:
            return self._failed("deadline", "the deadline of the job passed before its answer was whole")

    async def begin_again(self, reason: str) -> None:
        """Begin a next attempt of our own, in which the answer starts again: Redis has lost some of what it accepted.

        Raises:
            LogLost: when the log is no longer ours.
        """
        await self._advance(reason)
        self._restart(reason)

    async def _advance(self, reason: str) -> None:
        request = self._request
        if not isinstance(self._log.loss, LogDiverged | LogGone):
            await drained(self._log, request.stop)
        await insist(lambda: self._owner.next_attempt(self._log, request.delivery, reason), request.stop)
        entries = await insist(lambda: self._owner.read_entries(request.id), request.stop)
        self._recall(History(entries, fault_in(entries)))
        self._committed = self._went_on = False
        self._metrics.attempt(reason)

    def _recall(self, history: History) -> None:
        """What former attempts wrote is the answer so far."""
        self._history, self._fault = Answer(history.entries), history.fault
        self._was_allowed |= self._history.begun

    def _restart(self, reason: str) -> None:
        _log.info("answer_restarted", reason=reason, attempt=self._log.attempt)
        self._metrics.interrupted("restarted")
        self._log.append(to_fields(Restarted(id=BEFORE_ALL)))
        self._history, self._fault = Answer(), ""
        self._committed = True
        self._first_delta = None

    async def _generate(self, job: Job) -> Terminal:
        """Ask for the job's model and, where it cannot be had, for its fallbacks one after the other."""
        models = [model_of(job.request), *job.fallbacks]
        if self._history.model in models:  # the one that had begun goes on
            del models[: models.index(self._history.model)]
        given_up = ""
        while True:
            model = models.pop(0)
            try:
                return await self._ask(job.request | {"model": model} if model else job.request, models)
            except UpstreamError as error:
                broke_off = self._committed and self._settings.on_interrupt == "fail"
                moves_on = error.retryable or error.elsewhere or error.code in _MOVES_ON
                if not models or broke_off or not moves_on:
                    return self._failed(error.code, error.message + (given_up and f" (before it: {given_up})"))
                given_up += f"{'; ' if given_up else ''}{model}: {error.code}"
                _log.warning("model_given_up", code=error.code, model=model, next=models[0])
                if self._committed:
                    await self._advance(error.code)
                if self._history.begun:
                    self._restart("another model")
                self._was_allowed = False

    async def _ask(self, request: Object, others: Sequence[str]) -> Done:
        """Ask for one model, as often as is allowed without getting on; `others` may be asked for in its place.

        Raises:
            UpstreamError: of the last try.
        """
        model, tries, endpoint = model_of(request), Tries(self._settings.tries), None
        self._caller.refused_at.clear()  # another model may be another matter
        while True:
            await self._until_taken(model, others)
            endpoint = self._upstream.choose(model, self._caller, other_than=endpoint)
            is_trial = endpoint.circuit.state is CircuitState.HALF_OPEN
            is_last = tries.begin()
            try:
                with endpoint.reserve():
                    return await self._guarded(self._answer(endpoint, request, last=is_last))
            except UpstreamError as error:
                _warn(error, endpoint, tries.made)
                is_elsewhere = error.elsewhere and self._upstream.has_candidate(model, self._caller)
                if is_elsewhere or self._was_no_try(error, endpoint, is_trial=is_trial):
                    tries.take_back()
                if self._went_on:
                    tries.got_on()
                is_final = not (error.retryable or is_elsewhere) or tries.are_over
                if error.code == UNAUTHORIZED:  # which would be waited for
                    is_final |= self._upstream.should_fall_back(model, others, self._caller)
                if is_final or (self._committed and self._settings.on_interrupt == "fail"):
                    raise
                wait = tries.pause()
                if error.retry_after and self._upstream.all_busy(model, self._caller):
                    wait += error.retry_after  # not before it; elsewhere one need not wait
                await self._guarded(asyncio.sleep(wait))
                if self._committed:
                    await self._advance(error.code)

    def _was_no_try(self, error: UpstreamError, endpoint: Server, *, is_trial: bool) -> bool:
        """Whether a request that failed counts for nothing.

        One that was not let in goes to another server, or waits for one as any other does, and so does one that is
        forbidden what was allowed when its answer began. Nor does a trial count: others have failed there too, and
        once a job has, it gets no other.
        """
        is_forbidden = error.code == UNAUTHORIZED and self._was_allowed
        return was_not_let_in(error) or is_forbidden or (is_trial and endpoint.circuit in self._caller.failed_at)

    async def _until_taken(self, model: str, others: Sequence[str]) -> None:
        """Wait until a server can take a request for this model, which is no try; said once of each model."""
        if self._upstream.accepts(model, self._caller):
            return
        if model not in self._waited_for:
            self._waited_for.add(model)
            named = {"model": model[:_LONGEST_NAME]} if model else {}  # a job may leave the model to the server
            _log.info("waiting_for_model", **named)
        with self._metrics.waiting_for_model.track_inprogress():
            while not self._upstream.accepts(model, self._caller):
                await self._guarded(self._upstream.wait_available(model, others, caller=self._caller))

    async def _answer(self, endpoint: Server, request: Object, *, last: bool) -> Done:
        """One try at one server: it goes on from what stands of the answer or, where it cannot, begins again."""
        if self._fault:
            self._restart(self._fault)
        if self._history.begun:
            try:
                return await self._go_on(endpoint, request, last=last)
            except CannotResume as reason:
                self._restart(str(reason))
        return await self._stream(endpoint, request, ChunkParser(**_parsing(request)))

    async def _go_on(self, endpoint: Server, request: Object, *, last: bool) -> Done:
        history = self._history
        if self._settings.on_interrupt != "resume":
            raise CannotResume("WORKER_ON_INTERRUPT")
        try:
            plan = await plan_resume(self._upstream, endpoint, request, history, self._caller)
        except UpstreamError as error:
            others = self._upstream.has_candidate(model_of(request), self._caller)
            if others if error.elsewhere else (not last or was_not_let_in(error)):
                raise
            self._caller.refused_at.clear()
            raise CannotResume(f"the server does not say how: {error.code}") from None  # it may answer all the same
        if plan.is_exhausted and not plan.withheld:
            return self._done("length", history.usage, history.model)
        refusal = ""
        for route, body in plan.requests:
            parser = ResumedChunkParser(plan, **_parsing(request))
            try:
                return await self._stream(endpoint, body, parser, route)
            except CannotResume as reason:
                refusal = str(reason)
            except UpstreamError as error:
                if self._committed or error.retryable or error.elsewhere or not plan.prompt_ids:
                    raise
                refusal = f"the server refuses to go on: {error.code}"
        raise CannotResume(refusal)

    async def _stream(self, endpoint: Server, body: Object, parser: ChunkParser, route: str = CHAT) -> Done:
        """Read one stream into the log. Per token there is no more than `_take`: no await, and no task."""
        self._endpoint, self._parser = endpoint, parser
        async with self._upstream.stream(endpoint, body, route, caller=self._caller) as stream:
            stream.has_begun = lambda: parser.has_content
            try:
                while await stream.read_into(self._take) and not parser.done:
                    await self._log.wait_for_room()
                await stream.read_rest()
                parser.check_complete(stream.skipped)
            except UpstreamError:
                if not parser.is_complete:
                    raise
                # It broke after the last finish_reason: nothing of the answer is missing.
            finally:
                self._commit()
        if parser.unknown_reason:
            reason = parser.unknown_reason[:_LONGEST_NAME]
            _log.warning("unknown_finish_reason", reason=reason, endpoint=shown_url(endpoint.url))
            self._metrics.unknown_finish_reason(reason)
        return self._done(parser.finish_reason, parser.usage, parser.model, parser.extra)

    def _take(self, events: list[bytes]) -> bool:
        log, parser = self._log, self._parser
        entries: list[Fields] = []
        try:
            for data in events:
                entries += parser.parse(data)
        finally:  # what comes before an error is said
            log.extend(entries)
        if not self._committed or self._first_delta is None:
            self._commit()
        return parser.done or log.is_full

    def _commit(self) -> None:
        """Take note of what a stream has written by now."""
        parser = self._parser
        if self._first_delta is None and parser.has_delta:
            self._first_delta = time.monotonic()
            self._was_allowed = True
        if not parser.is_committed:
            return
        if isinstance(parser, ResumedChunkParser):
            self._went_on = parser.has_progressed
            if not self._committed:  # at its first entry: the end of the answer may be minutes away
                _log.info("answer_resumed", attempt=self._log.attempt, endpoint=shown_url(self._endpoint.url))
                self._metrics.interrupted("resumed")
        self._committed = True

    async def _guarded(self, work: Coroutine[object, object, _T]) -> _T:
        """Do what may take long, for as long as the log is ours, the lease holds and the deadline has not passed."""
        events: tuple[asyncio.Future[Any], ...] = (self._log.lost, self._request.stop)
        left = (self._request.deadline - self._now()) / 1000
        if left <= 0 or any(event.done() for event in events):
            work.close()  # not a step of it, lest vLLM be asked for nothing
            self._check()
            raise DeadlinePassed
        limit = asyncio.timeout(left)  # cheaper than a task that is waited for

        def interrupt(_: object) -> None:
            with suppress(RuntimeError):  # it is over, or interrupted already
                limit.reschedule(0)

        try:
            async with limit:
                for event in events:
                    event.add_done_callback(interrupt)
                result = await work
        except (TimeoutError, UpstreamError):
            self._check()
            if limit.expired():
                raise DeadlinePassed from None
            raise
        finally:
            for event in events:
                event.remove_done_callback(interrupt)
        self._check()
        return result

    def _check(self) -> None:
        if self._log.loss is not None or self._request.stop.done():
            raise self._log.loss or Stopped

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
        now = time.monotonic()
        timings: Object = {"waited_ms": self._waited_ms, "total_ms": round((now - self._began) * 1000)}
        if self._first_delta is not None:
            timings["first_delta_ms"] = round((self._first_delta - self._began) * 1000)
        return timings


def choices_of(request: Object) -> int:
    """How many choices are asked for."""
    n = request.get("n")
    return n if isinstance(n, int) else 1


def model_of(request: Object) -> str:
    """The model that is asked for; empty when that is left to the server."""
    model = request.get("model")
    return model if isinstance(model, str) else ""


def _warn(error: UpstreamError, endpoint: Server, tried: int) -> None:
    """Without the message, which may quote the request."""
    _log.warning(
        "upstream_failed",
        code=error.code,
        status=error.status,
        endpoint=shown_url(endpoint.url),
        tried=tried,
        retryable=error.retryable,
    )


class _Parsing(TypedDict):
    n: int
    keep_prompt_ids: bool
    keep_usage: bool


def _parsing(request: Object) -> _Parsing:
    """What of a request matters to who reads its answer."""
    options = request.get("stream_options")
    return {
        "n": choices_of(request),
        "keep_prompt_ids": bool(request.get("return_token_ids")),
        "keep_usage": isinstance(options, dict) and bool(options.get("continuous_usage_stats")),
    }

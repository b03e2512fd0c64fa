"""Having vLLM answer one job into its log: tries, pauses, and what makes it stop before its end."""

import asyncio
import enum
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from worker.broker.connection import persist
from worker.broker.jobs import Delivery
from worker.broker.log import LogDiverged, TokenLog
from worker.broker.owner import Owner
from worker.contract.answer import Answer
from worker.contract.entries import Done, Failed, Object, Restarted, Terminal, to_fields
from worker.contract.ids import BEFORE_ALL, SEAL
from worker.contract.job import InvalidJob, Job
from worker.settings import shown_url
from worker.vllm.chunks import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.upstream import Endpoint, Upstream

_T = TypeVar("_T")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0

_log = structlog.get_logger()


class Stop(enum.Enum):
    """Why a running job must stop before its end."""

    LEASE_LOST = "lease_lost"
    HAND_OVER = "hand_over"


class Stopped(Exception):
    """The job stops here, unacknowledged: another worker goes on."""


class DeadlinePassed(Exception):
    """The job's time is over."""


@dataclass(frozen=True, slots=True)
class Request:
    """A delivered job with what follows from it. `deadline` is Unix ms by Redis's clock, the rest seconds."""

    id: str
    delivery: Delivery
    job: Job | InvalidJob
    deadline: int
    retention: int
    remember: int
    stop: "asyncio.Future[Stop]"


class Generation:
    """The answer to one request, as this process makes it. `now` is Redis's clock in Unix ms."""

    def __init__(
        self,
        request: Request,
        log: TokenLog,
        history: Answer,
        *,
        owner: Owner,
        upstream: Upstream,
        tries: int,
        now: Callable[[], int],
    ) -> None:
        self._request = request
        self._log = log
        self._history = history
        self._owner = owner
        self._upstream = upstream
        self._tries = tries
        self._now = now
        self._began = time.monotonic()
        self._waited_ms = max(0, now() - request.delivery.enqueued)
        self._first_delta: float | None = None

    async def end(self) -> Terminal:
        """Write all deltas of the answer, and give the terminal entry that it deserves.

        Raises:
            LogLost: when the log is no longer ours.
            Stopped: when the job is to stop here.
        """
        job = self._request.job
        if isinstance(job, InvalidJob):
            return self._failed(job.code, str(job))
        if self._history.finished(choices_of(job)):
            # After the last finish_reason there is nothing to generate: only the seal was missing.
            return self._done(self._history.finish_reason, self._history.usage, self._history.model)
        if self._history.begun:
            self._restart()
        try:
            return await self._generate(job)
        except DeadlinePassed:
            return self._failed("deadline", "the deadline of the job passed before its answer was whole")

    async def advance(self, reason: str) -> None:
        """Begin a next attempt of our own, in which the answer starts again.

        Raises:
            LogLost: when the log is no longer ours.
        """
        if not isinstance(self._log.loss, LogDiverged):
            await drained(self._log, self._request.stop)
        await persist(lambda: self._owner.advance(self._log, self._request.delivery, reason), self._request.stop)
        self._restart()

    def _restart(self) -> None:
        self._log.append(to_fields(Restarted(id=BEFORE_ALL)))
        self._history = Answer()
        self._first_delta = None

    async def _generate(self, job: Job) -> Terminal:
        endpoint, pause, tried = None, _FIRST_PAUSE, 0
        while True:
            if not self._upstream.is_there:  # what no server can take waits, and is no try
                await self._guarded(self._upstream.available())
            endpoint = self._upstream.choose(other_than=endpoint)
            tried += 1
            parser = _parser_for(job)
            try:
                await self._guarded(self._pump(job, endpoint, parser))
            except UpstreamError as error:
                if not parser.complete:
                    _warn(error, endpoint, tried)
                    if not error.retryable or tried == self._tries:
                        return self._failed(error.code, error.message, parser)
                    wait = min(error.retry_after or pause, _LONGEST_PAUSE)
                    pause *= 2
                    await self._guarded(asyncio.sleep(wait * random.uniform(0.75, 1.25)))  # noqa: S311 - jitter
                    if parser.begun:
                        await self.advance(error.code)
                    continue
                # It broke after the last finish_reason: nothing of the answer is missing.
            return self._done(parser.finish_reason, parser.usage, parser.model, parser.extra)

    async def _pump(self, job: Job, endpoint: Endpoint, parser: ChunkParser) -> None:
        """Read one stream into the log: nothing in this loop is per token but the parser and the append."""
        log = self._log
        async with self._upstream.stream(endpoint, job.request) as stream:
            while not parser.done and (events := await stream.read()):
                for data in events:
                    for fields in parser.parse(data):
                        log.append(fields)
                if self._first_delta is None and parser.begun:
                    self._first_delta = time.monotonic()
                if log.is_full:
                    await log.room()
            await stream.finish()
        parser.check_complete()

    async def _guarded(self, work: Coroutine[object, object, _T]) -> _T:
        """Do what may take long, for as long as the log is ours, the lease holds and the deadline has not passed."""
        stop = self._request.stop
        left = (self._request.deadline - self._now()) / 1000
        if left <= 0:
            work.close()  # not a step of it, lest vLLM be asked for nothing
            raise DeadlinePassed
        task = asyncio.ensure_future(work)
        try:
            events: set[asyncio.Future[Any]] = {task, self._log.lost, stop}
            await asyncio.wait(events, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._log.loss is not None:
            raise self._log.loss
        if stop.done():
            raise Stopped
        if not finished:
            raise DeadlinePassed
        return task.result()

    def _done(self, finish_reason: str, usage: Object, model: str, extra: Object | None = None) -> Done:
        return Done(
            id=SEAL,
            attempt=self._log.attempt,
            finish_reason=finish_reason,
            usage=usage,
            model=model,
            timings=self._timings(),
            extra=extra or {},
        )

    def _failed(self, code: str, message: str, parser: ChunkParser | None = None) -> Failed:
        return Failed(
            id=SEAL,
            attempt=self._log.attempt,
            code=code,
            message=message,
            usage=parser.usage if parser else {},
            model=parser.model if parser else "",
            timings=self._timings(),
        )

    def _timings(self) -> Object:
        now = time.monotonic()
        timings: Object = {"waited_ms": self._waited_ms, "total_ms": round((now - self._began) * 1000)}
        if self._first_delta is not None:
            timings["first_delta_ms"] = round((self._first_delta - self._began) * 1000)
        return timings


async def drained(log: TokenLog, stop: "asyncio.Future[Stop]") -> None:
    """Wait until Redis has accepted everything of a log, which takes as long as it is full or away.

    Raises:
        LogLost: when it will not.
        Stopped: when the job is to stop before.
    """
    waiting = asyncio.ensure_future(log.drained())
    events: set[asyncio.Future[Any]] = {waiting, stop}
    await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        raise Stopped
    waiting.result()


def choices_of(job: Job) -> int:
    """How many choices the job asks for."""
    n = job.request.get("n")
    return n if isinstance(n, int) else 1


def _warn(error: UpstreamError, endpoint: Endpoint, tried: int) -> None:
    """Without the message, which may quote the request."""
    _log.warning(
        "upstream_failed",
        code=error.code,
        status=error.status,
        endpoint=shown_url(endpoint.url),
        tried=tried,
        retryable=error.retryable,
    )


def _parser_for(job: Job) -> ChunkParser:
    options = job.request.get("stream_options")
    return ChunkParser(
        n=choices_of(job),
        keep_prompt_ids=bool(job.request.get("return_token_ids")),
        keep_usage=isinstance(options, dict) and bool(options.get("continuous_usage_stats")),
    )

"""Metrics of one worker, for Prometheus: what is counted, under which names, and how it is served.

Nothing is counted per token, and no label holds what a job says.
"""

import asyncio
import math
import re
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ..version import version
from .events import (
    AnswerRestarted,
    AnswerResumed,
    AttemptBegun,
    EntriesAccepted,
    Event,
    FirstDelta,
    IntakePaused,
    JobBuried,
    JobFinished,
    JobStarted,
    LeaseWasLost,
    ModelWaitBegan,
    ModelWaitEnded,
    QueueMeasured,
    RecordRefused,
    UnknownFinishReason,
    WriteFailed,
)

_WORD = re.compile(r"[A-Za-z_]{1,40}")
_MOST_REASONS = 20
_MOST_CODES = 50
_PREFIX = "vllm_relay"
_WAITS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
"""Seconds; from a free worker to a queue that is an hour long."""


class Metrics:
    """All metrics of a process, in a registry of its own. Durations are seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._stop: Callable[[], None] | None = None
        self.slots = self._gauge("slots", "Jobs that may run at once")
        self.running = self._gauge("jobs_running", "Jobs at work")
        self.waiting_for_model = self._gauge("jobs_waiting_for_model", "Jobs at work that wait for a server")
        self.buried = self._counter("jobs_buried", "Jobs put among the dead letters")
        self.lease_lost = self._counter("lease_lost", "Jobs left because their lease could not be renewed")
        self.written = self._counter("log_entries", "Entries of logs that Redis has accepted, counted once a flush")
        self.write_failures = self._counter("redis_write_failures", "Writes to logs, and looks at them, that failed")
        self._refused = self._counter("records_refused", "Records beside the logs that Redis refused", "record")
        self._finished = self._counter("jobs_finished", "Jobs that ended here", "outcome", "code")
        self._codes: set[str] = set()
        self._attempts = self._counter("attempts", "Attempts at an answer, by what began them", "reason")
        self._interrupted = self._counter("interrupted", "Answers that broke off, by how they went on", "how")
        self._unknown_finish_reasons = self._counter(
            "unknown_finish_reasons", "Answers taken as whole whose finish reason is on no list", "reason"
        )
        self._reasons: set[str] = set()
        self._gauge("build_info", "1, with the version of this worker", "version").labels(version() or "unknown").set(1)
        self._vllm_up = self._gauge("vllm_up", "Whether a vLLM server gets requests", "endpoint")
        self._vllm_requests = self._gauge("vllm_requests", "Requests that are for a vLLM server", "endpoint")
        self._paused = self._gauge("claims_paused", "Whether no jobs are taken, by why", "reason")
        self._oldest = self._gauge("oldest_pending_seconds", "Age of the oldest job with a worker", "queue")
        self._waiting = self._gauge("queue_waiting", "Jobs that no worker has taken; from Redis 7 on", "queue")
        self._wait = self._histogram("job_wait_seconds", "From a job's entry in the queue to its start")
        self._first_delta = self._histogram("first_delta_seconds", "From a job's start to its first delta")

    def emit(self, event: Event) -> None:  # noqa: C901, PLR0912 - one row for each event that is counted
        """Count an event."""
        match event:
            case EntriesAccepted():  # the most frequent comes first
                self.written.inc(event.count)
            case AttemptBegun():
                self.attempt(event.reason)
            case JobStarted():
                self.waited(event.waited_s)
            case FirstDelta():
                self.first_delta(event.after_s)
            case JobFinished():
                if event.outcome:
                    self.finished(event.outcome, event.code or "")
            case JobBuried():
                self.buried.inc()
            case AnswerResumed():
                self.interrupted("resumed")
            case AnswerRestarted():
                self.interrupted("restarted")
            case UnknownFinishReason():
                self.unknown_finish_reason(event.reason)
            case LeaseWasLost():
                self.lease_lost.inc()
            case WriteFailed():
                self.write_failures.inc()
            case RecordRefused():
                self.refused(event.record)
            case IntakePaused():
                self.paused(event.reason, on=event.on)
            case QueueMeasured():
                self.queue(event.queue, event.waiting, event.oldest_s)
            case ModelWaitBegan():
                self.waiting_for_model.inc()
            case ModelWaitEnded():
                self.waiting_for_model.dec()
            case _:
                pass

    def finished(self, outcome: str, code: str = "") -> None:
        """A job has ended: `done`, `error` or `cancelled`; with `error` the code says why."""
        self._finished.labels(outcome, _bounded(code, self._codes, _MOST_CODES) if code else "").inc()

    def refused(self, record: str) -> None:
        """Redis refused a record beside the logs: `lifecycle`, `dead`, `workers` or `feed`."""
        self._refused.labels(record).inc()

    def attempt(self, reason: str) -> None:
        """An attempt begins: `started`, `takeover`, or the code of the fault that made another one necessary."""
        self._attempts.labels(reason).inc()

    def interrupted(self, how: str) -> None:
        """An answer broke off: `resumed` or `restarted`."""
        self._interrupted.labels(how).inc()

    def unknown_finish_reason(self, reason: str) -> None:
        """A server ended an answer for a reason that is on no list: `other`, if it is no plain word or one too many."""
        self._unknown_finish_reasons.labels(_bounded(reason, self._reasons, _MOST_REASONS)).inc()

    def waited(self, seconds: float) -> None:
        """A job has begun that waited for so long."""
        self._wait.observe(seconds)

    def first_delta(self, seconds: float) -> None:
        """An answer's first delta came after so long."""
        self._first_delta.observe(seconds)

    def server(self, endpoint: str, up: Callable[[], float], requests: Callable[[], float]) -> None:
        """What to ask about a vLLM server at each scrape: whether it gets requests, and how many are for it."""
        self._vllm_up.labels(endpoint).set_function(up)
        self._vllm_requests.labels(endpoint).set_function(requests)

    def paused(self, reason: str, *, on: bool) -> None:
        """Claiming pauses for a reason, or does so no more."""
        self._paused.labels(reason).set(on)

    def queue(self, queue: str, waiting: int | None, oldest: float | None) -> None:
        """How a queue stands. `waiting` is None where Redis cannot tell, `oldest` where nothing is pending.

        `oldest` is NaN where nobody knows.
        """
        self._waiting.labels(queue).set(math.nan if waiting is None else waiting)
        self._oldest.labels(queue).set(oldest or 0)

    def serve(self, host: str, port: int) -> int:
        """Serve them at `/metrics`, from a thread of its own; gives the port.

        Raises:
            OSError: when the address is taken, or is none.
        """
        server, thread = start_http_server(port, host, self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop = stop
        return server.server_port

    async def aclose(self) -> None:
        """Serve no more."""
        if self._stop is not None:
            await asyncio.to_thread(self._stop)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=_PREFIX, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=_PREFIX, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, (), namespace=_PREFIX, registry=self.registry, buckets=_WAITS)


def _bounded(word: str, seen: set[str], most: int) -> str:
    """A word as a label: `other`, if it is no plain word or one too many, for others choose these words."""
    if not _WORD.fullmatch(word) or (word not in seen and len(seen) >= most):
        word = "other"
    seen.add(word)
    return word

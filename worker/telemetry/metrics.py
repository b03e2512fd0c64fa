"""The Prometheus metrics of one worker: their names, how events are counted, and the server for scrapers.

To add a metric: emit an event where the thing happens (`worker.telemetry.events`), create the metric in `Metrics`,
count the event in `Metrics.emit`, and add a row to the table of metrics in deploy/monitoring.md, which a test compares
with these names. A value that is read at each scrape, not counted, goes into `observe_worker` or `observe_server`.

Nothing is counted per token, and no label holds text of a job.

Scrapes come in other threads. So what they read must not be changed by the event loop in between: copy a set or a dict
before iterating. While the loop is stuck, all gauges are NaN, because nobody updates them.
"""

import asyncio
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar, cast, get_args

from prometheus_client import Counter, Gauge, Histogram

from ..version import version
from .events import (
    EntriesAccepted,
    Event,
    GapCause,
    IntakePaused,
    QueueMeasured,
    ReaderGap,
    RecordRefused,
    RedisMeasured,
    VllmRefused,
    WriteFailed,
)
from .job_events import (
    AnswerRestarted,
    AnswerResumed,
    AnswerStreamEnded,
    AttemptBegun,
    FirstDelta,
    JobBuried,
    JobFinished,
    JobParked,
    JobStarted,
    LeaseWasLost,
    ModelWaitBegan,
    ModelWaitEnded,
    UnknownFinishReason,
)
from .live_registry import NAMESPACE, LiveRegistry
from .loop_monitor import STUCK_AFTER, LoopMonitor
from .monitoring_server import MonitoringServer

_Labelled = TypeVar("_Labelled", Counter, Histogram)

Silences = Callable[[], tuple[list[float], list[float]]]
"""Returns how long the open requests of a server are silent, in seconds: before their first token, and after it."""

SILENT_AFTER = 5.0
"""Seconds without an event after which a stream counts as silent. vLLM sends tokens ten times a second or more; long
prefills of other requests hold a stream up for a second or two."""

_WORD = re.compile(r"[A-Za-z_]{1,40}")
_MAX_REASONS = 20
_MAX_CODES = 50
# Histogram buckets in seconds: those of vLLM 0.32 (vllm/v1/metrics/buckets.py), so that both can be compared.
_WAITS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
"""vLLM's for the time to the first token. They suit the wait in a queue too: an idle worker takes a job in
milliseconds, and the smallest of `_DURATIONS`, which vLLM has for its own queue, is 0.3 s."""
_DURATIONS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
"""vLLM's for whole requests. They are the finer ones from 10 to 60 s, where answers end and leases expire."""
_GAPS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
"""vLLM's for the time between two tokens."""


class Metrics:
    """All metrics of a process, in a registry of their own: a receiver of events. Durations are seconds."""

    def __init__(self, loop: LoopMonitor | None = None) -> None:
        self._loop = loop or LoopMonitor()
        self.registry = LiveRegistry(self._loop)
        self._server: MonitoringServer | None = None
        self._with_labels: dict[tuple[Counter | Histogram, tuple[str, ...]], Counter | Histogram] = {}
        self._why_not_ready: Callable[[], str] = lambda: ""
        self._gauge("build_info", "1, with the version of this worker", "version").labels(version() or "unknown").set(1)
        loop_delay = self._gauge(
            "loop_delay_seconds", "Longest delay of the event loop of late, or since when it is stuck"
        )
        loop_delay.set_function(self._loop.delay)
        # Jobs.
        self._slots = self._gauge("slots", "Jobs that may run here at once")
        self._running = self._gauge("jobs_running", "Jobs that run here")
        self._waiting_for_model = self._gauge("jobs_waiting_for_model", "Jobs that run and wait for a server")
        self._finished = self._counter("jobs_finished", "Jobs that ended here", "outcome", "code")
        self._codes: set[str] = set()
        self._parked = self._counter("jobs_parked", "Times that a job went back to its queue to wait for a server")
        self._buried = self._counter("jobs_buried", "Dead letters that this worker wrote")
        self._lease_lost = self._counter("lease_lost", "Jobs that stopped here as their lease could not be renewed")
        self._wait = self._histogram("job_wait_seconds", "From a job's entry in the queue to its start", _WAITS)
        self._duration = self._histogram(
            "job_duration_seconds", "From a job's start in this worker to its end", _DURATIONS, "outcome"
        )
        self._first_delta = self._histogram("first_delta_seconds", "From a job's start to its first delta", _WAITS)
        self._mean_gap = self._histogram(
            "inter_delta_mean_seconds", "Mean time between two deltas, once for each stream", _GAPS
        )
        self._longest_gap = self._histogram(
            "inter_delta_max_seconds", "Longest time between two deltas, once for each stream", _GAPS
        )
        self._reader_gap = self._histogram(
            "gap_seconds", "From an answer's last delta before an interruption to its first after it", _DURATIONS,
            "cause",
        )  # fmt: skip
        for cause in get_args(GapCause):  # a series that begins with its first gap shows no increase for it
            self._reader_gap.labels(cause)
        # Attempts at an answer.
        self._attempts = self._counter("attempts", "Attempts at an answer, by what began them", "reason")
        self._interrupted = self._counter("interrupted", "Answers that broke off, by how they continued", "how")
        self._unknown_finish_reasons = self._counter(
            "unknown_finish_reasons", "Complete answers with an unknown finish reason", "reason"
        )
        self._reasons: set[str] = set()
        # Redis and the queues.
        self._written = self._counter("log_entries", "Log entries that Redis accepted")
        self._write_failures = self._counter("redis_write_failures", "Writes and reads of logs that failed")
        self._refused = self._counter("records_refused", "Records beside the logs that Redis refused", "record")
        self._paused = self._gauge("claims_paused", "1 while the worker takes no jobs, by reason", "reason")
        self._queue_paused = self._gauge("queue_paused", "1 while an operator has paused a queue", "queue")
        self._oldest = self._gauge("oldest_pending_seconds", "Age of the oldest job that a worker has", "queue")
        self._waiting = self._gauge("queue_waiting", "Jobs that no worker has taken; from Redis 7 on", "queue")
        self._memory = self._gauge("redis_memory_bytes", "Used memory of Redis; in a cluster, of its fullest master")
        self._memory_limit = self._gauge("redis_memory_limit_bytes", "Its maxmemory; 0 is no limit")
        self._memory.set(math.nan)  # unknown until measured
        self._memory_limit.set(math.nan)
        # vLLM.
        self._vllm_up = self._gauge("vllm_up", "1 while a vLLM server gets requests", "endpoint")
        self._vllm_requests = self._gauge("vllm_requests", "Requests of this worker at a vLLM server", "endpoint")
        self._vllm_limit = self._gauge(
            "vllm_limit", "Requests that this worker may have at a vLLM server, learnt from the server", "endpoint"
        )
        self._vllm_busy = self._counter("vllm_busy", "Requests that a full vLLM server refused", "endpoint")
        self._silent = self._gauge("streams_silent", "Streams without an event for 5 s", "endpoint", "phase")
        self._silence = self._gauge("longest_silence_seconds", "Longest wait for an event now", "endpoint", "phase")

    def emit(self, event: Event) -> None:  # noqa: C901, PLR0912 - one row for each event that is counted
        """Count an event. Events without a metric are ignored."""
        match event:
            case EntriesAccepted():  # the most frequent comes first
                self._written.inc(event.count)
            case JobStarted():
                self._wait.observe(event.waited_s)
            case FirstDelta():
                self._first_delta.observe(event.after_s)
            case AnswerStreamEnded():
                self._mean_gap.observe(event.mean_gap_s)
                self._longest_gap.observe(event.longest_gap_s)
            case ReaderGap():
                self._reader_gap.labels(event.cause).observe(event.seconds)
            case JobFinished():
                if event.outcome:
                    code = _bounded(event.code, self._codes, _MAX_CODES) if event.code else ""
                    self._labelled(self._finished, event.outcome, code).inc()
                    self._labelled(self._duration, event.outcome).observe(event.seconds)
            case AttemptBegun():
                self._labelled(self._attempts, event.reason).inc()
            case AnswerResumed():
                self._interrupted.labels("resumed").inc()
            case AnswerRestarted():
                self._interrupted.labels("restarted").inc()
            case UnknownFinishReason():
                self._unknown_finish_reasons.labels(_bounded(event.reason, self._reasons, _MAX_REASONS)).inc()
            case ModelWaitBegan():
                self._waiting_for_model.inc()
            case ModelWaitEnded():
                self._waiting_for_model.dec()
            case JobParked():
                self._parked.inc()
            case VllmRefused():
                self._vllm_busy.labels(event.endpoint).inc()
            case JobBuried():
                self._buried.inc()
            case LeaseWasLost():
                self._lease_lost.inc()
            case WriteFailed():
                self._write_failures.inc()
            case RecordRefused():
                self._refused.labels(event.record).inc()
            case IntakePaused():
                self._paused.labels(event.reason).set(event.on)
            case RedisMeasured():
                self._memory.set(event.used)
                self._memory_limit.set(event.limit)
            case QueueMeasured():
                self._waiting.labels(event.queue).set(math.nan if event.waiting is None else event.waiting)
                self._oldest.labels(event.queue).set(event.oldest_s or 0)

    def observe_worker(self, slots: int, running: Callable[[], float]) -> None:
        """Set the number of slots. `running` returns the number of running jobs, and is called at each scrape."""
        self._slots.set(slots)
        self._running.set_function(running)

    def observe_pauses(self, queues: Iterable[str], is_paused: Callable[[str], bool]) -> None:
        """Add the queues that the worker serves. `is_paused` is called at each scrape."""
        for queue in queues:
            self._queue_paused.labels(queue).set_function(partial(is_paused, queue))

    def observe_readiness(self, why_not: Callable[[], str]) -> None:
        """Set the function that returns why the worker takes no jobs; empty while it does. `/readyz` calls it."""
        self._why_not_ready = why_not

    def observe_server(
        self,
        endpoint: str,
        up: Callable[[], float],
        requests: Callable[[], float],
        limit: Callable[[], float],
        silences: Silences,
        probe_silence: Callable[[], float],
    ) -> None:
        """Add a vLLM server. The functions are called at each scrape.

        `up` returns 1 while the server gets requests, else 0. `requests` returns how many it has from this worker, and
        `limit` how many it may have now. `probe_silence` returns for how long an idle server has answered no probe.
        """
        self._vllm_up.labels(endpoint).set_function(up)
        self._vllm_requests.labels(endpoint).set_function(requests)
        self._vllm_limit.labels(endpoint).set_function(limit)
        self._vllm_busy.labels(endpoint)
        self._silence.labels(endpoint, "probe").set_function(probe_silence)
        for place, phase in enumerate(("first_token", "answer")):

            def silent(place: int = place) -> float:
                return sum(silence > SILENT_AFTER for silence in silences()[place])

            def longest(place: int = place) -> float:
                return max(silences()[place], default=0.0)

            self._silent.labels(endpoint, phase).set_function(silent)
            self._silence.labels(endpoint, phase).set_function(longest)

    def serve(self, host: str, port: int) -> int:
        """Serve `/metrics`, `/healthz` and `/readyz` from separate threads; returns the port.

        Raises:
            OSError: when the address is in use, or does not belong to this machine.
        """
        self._server = MonitoringServer(host, port, self.registry, self._why_not_healthy, self._problem)
        return self._server.port

    async def aclose(self) -> None:
        """Stop serving."""
        if self._server is not None:
            await asyncio.to_thread(self._server.close)

    def _why_not_healthy(self) -> str:
        age = self._loop.age()
        return f"the event loop has not run for {age:.1f} s" if age > STUCK_AFTER else ""

    def _problem(self) -> str:
        return self._why_not_healthy() or self._why_not_ready()

    def _labelled(self, metric: _Labelled, *labels: str) -> _Labelled:
        """A metric with its labels. A dict finds it in a sixth of the time that `labels` takes."""
        key = metric, labels
        if key not in self._with_labels:
            self._with_labels[key] = metric.labels(*labels)
        return cast("_Labelled", self._with_labels[key])

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace=NAMESPACE, registry=self.registry, buckets=buckets)


def _bounded(word: str, seen: set[str], limit: int) -> str:
    """A word as a label, or `other` if it is not a plain word or there are `limit` words. vLLM chooses these words."""
    if not _WORD.fullmatch(word) or (word not in seen and len(seen) >= limit):
        word = "other"
    seen.add(word)
    return word

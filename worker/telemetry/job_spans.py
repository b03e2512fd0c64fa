"""Spans of OpenTelemetry from the events of jobs. It needs the extra `otel`.

Each run of a job by a worker is one span, which begins once the worker has acquired the log and ends when it leaves the
job. A span has names, numbers and codes: no prompt, no output, and no text of an error, which may quote the request.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..version import version
from . import genai
from .events import Event, ReaderGap, Telemetry
from .job_events import (
    AnswerRestarted,
    AnswerResumed,
    AttemptBegun,
    FencedOff,
    FirstDelta,
    JobBrokenOff,
    JobFailed,
    JobFinished,
    JobLeft,
    JobParked,
    JobRunEnded,
    LogDisappeared,
    LogDivergence,
    ModelGivenUp,
    RequestSent,
    UpstreamFailed,
    WaitingForModel,
)
from .span_export import SpanExport
from .traces import TracedRun

_OWN = "vllm_relay"
ATTEMPT, CAUSE, OUTCOME, REASON = f"{_OWN}.attempt", f"{_OWN}.cause", f"{_OWN}.outcome", f"{_OWN}.reason"
SECONDS = f"{_OWN}.seconds"

_current: ContextVar["_OpenSpan | None"] = ContextVar("current_span", default=None)
"""The span of the job whose task runs. Each job has a task, and thus a context, of its own."""


@dataclass(slots=True)
class _OpenSpan:
    span: Span
    request_id: str
    outcome: str = ""

    @property
    def traceparent(self) -> str:
        context = self.span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class _TraceIds(RandomIdGenerator):
    """Makes the id of a trace from the job that begins it, so that all workers that run the job have one trace.

    Attributes:
        job: the names of the job whose span starts next.
    """

    job = ""

    def generate_trace_id(self) -> int:
        """See RandomIdGenerator. The id of a trace must not be 0."""
        return int.from_bytes(sha256(self.job.encode()).digest()[:16]) or 1


class JobSpans:
    """Makes a span of each run of a job. See `Traces`.

    The variables of OpenTelemetry's SDK apply, such as OTEL_SERVICE_NAME and OTEL_TRACES_SAMPLER. `processor` receives
    the spans in place of the exporter.
    """

    def __init__(self, worker: str, processor: SpanProcessor | None = None) -> None:
        own = {"service.name": "vllm-relay", "service.version": version(), "service.instance.id": worker}
        resource = Resource.create(own).merge(OTELResourceDetector().detect())
        self._ids = _TraceIds()
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._tracer = self._provider.get_tracer("vllm_relay", version())
        self._export: SpanExport | None = None
        self._open: dict[str, _OpenSpan] = {}
        """The open spans by request id."""
        if processor is not None:
            self._provider.add_span_processor(processor)

    def start_export(self, telemetry: Telemetry) -> None:
        """See `Traces`."""
        self._export = SpanExport(self._provider, telemetry)

    async def aclose(self) -> None:
        """See `Traces`."""
        if self._export is not None:
            await self._export.aclose()

    def start(self, run: TracedRun) -> str:
        """See `Traces`. A job that continues in its task keeps its span."""
        if (current := _current.get()) is None:
            self._ids.job = f"{run.request_id} {run.queue} {run.job}"
            span = self._tracer.start_span(
                genai.span_name(run.request),
                TraceContextTextMapPropagator().extract({"traceparent": run.traceparent}, Context()),
                SpanKind.CLIENT,
                {
                    **genai.request_attributes(run.request),
                    f"{_OWN}.request.id": run.request_id,
                    f"{_OWN}.queue": run.queue,
                    f"{_OWN}.job": run.job,
                    f"{_OWN}.waited_seconds": run.waited_s,
                    ATTEMPT: run.attempt,
                },
            )
            current = self._open[run.request_id] = _OpenSpan(span, run.request_id)
            _current.set(current)
        return current.traceparent

    def emit(self, event: Event) -> None:
        """Add an event to the span of the job in whose task it is emitted. Other events are ignored."""
        if isinstance(event, ReaderGap) and event.request_id:  # of a write, whose task is not the job's
            current = self._open.get(event.request_id)
        else:
            current = _current.get()
        if current is not None:
            self._add(current, event)

    def _add(self, current: _OpenSpan, event: Event) -> None:  # noqa: C901, PLR0912 - one row for each event
        span = current.span
        match event:
            case AttemptBegun():
                span.set_attribute(ATTEMPT, event.attempt)
                span.add_event("attempt", {ATTEMPT: event.attempt, REASON: event.reason})
            case RequestSent():
                server = genai.server_attributes(event.endpoint)
                span.set_attributes(server)
                span.add_event("request_sent", server)
            case FirstDelta():
                span.set_attribute(genai.TIME_TO_FIRST_CHUNK, event.after_s)
            case AnswerResumed():
                span.add_event("resumed", {ATTEMPT: event.attempt, **genai.server_attributes(event.endpoint)})
            case AnswerRestarted():
                span.add_event("restarted", {ATTEMPT: event.attempt, REASON: event.reason})
            case ReaderGap():
                span.add_event("gap", {CAUSE: event.cause, SECONDS: event.seconds})
            case UpstreamFailed():
                server = genai.server_attributes(event.endpoint)
                status = {} if event.status is None else {"http.response.status_code": event.status}
                span.add_event("request_failed", {genai.ERROR_TYPE: event.code, **status, **server})
            case WaitingForModel():
                span.add_event("waiting_for_server")
            case ModelGivenUp():
                span.add_event("model_given_up", {REASON: event.code, f"{_OWN}.next_model": event.next})
            case LogDivergence():
                span.add_event("log_diverged")
            case JobFinished():
                self._finish(current, event)
            case JobParked():
                current.outcome = "parked"
            case JobLeft():
                current.outcome = event.reason
            case FencedOff():
                current.outcome = "fenced"
            case LogDisappeared():
                current.outcome = "log_gone"
            case JobBrokenOff():
                current.outcome = "broken_off"
            case JobFailed():
                current.outcome = "broken_off"
                span.set_attribute(genai.ERROR_TYPE, type(event.error).__qualname__)
                span.set_status(StatusCode.ERROR)
            case JobRunEnded():
                self._end(current)

    def _finish(self, current: _OpenSpan, event: JobFinished) -> None:
        span = current.span
        current.outcome = event.outcome
        known = {genai.RESPONSE_MODEL: event.model, genai.FINISH_REASONS: event.finish_reason and [event.finish_reason]}
        tokens = {genai.INPUT_TOKENS: event.prompt_tokens, genai.OUTPUT_TOKENS: event.tokens}
        span.set_attributes({name: value for name, value in known.items() if value})
        span.set_attributes({name: value for name, value in tokens.items() if value is not None})
        if event.code:
            span.set_attribute(genai.ERROR_TYPE, event.code)
            span.set_status(StatusCode.ERROR, event.code)

    def _end(self, current: _OpenSpan) -> None:
        current.span.set_attribute(OUTCOME, current.outcome or "left")
        current.span.end()
        if self._open.get(current.request_id) is current:
            del self._open[current.request_id]
        _current.set(None)

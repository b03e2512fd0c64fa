"""Traces: one span for each run of a job, what it holds and what it never holds, and a collector that is away."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextvars import copy_context
from functools import partial

import pytest
from conftest import StartSimulator, StartWorker
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from otlp_receiver import Collector, collector
from raw_server import sending
from waits import eventually

from worker import Client
from worker.sandbox.simulator.server import Options, Scenario
from worker.telemetry.events import Event, Failing, ReaderGap, Recovered, TracesExported, TracesOff
from worker.telemetry.job_events import (
    AnswerResumed,
    AttemptBegun,
    FirstDelta,
    JobFinished,
    JobLeft,
    JobRunEnded,
    RequestSent,
    UpstreamFailed,
)
from worker.telemetry.job_spans import JobSpans
from worker.telemetry.trace_environment import open_traces
from worker.telemetry.traces import TracedRun, Traces

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SECRET = "the secret of the prompt"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
END = JobFinished("done", None, 1, "default", "m-4bit", 7, 1.5, prompt_tokens=3, finish_reason="stop")


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


class Spans:
    """Makes spans in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.traces = JobSpans("w1", SimpleSpanProcessor(self._exporter))

    def run(self, *events: Event, traceparent: str = "", request_id: str = "r", **request: object) -> str:
        """Emit the events of a job's run, in a context of its own, as a task has it. Returns its `traceparent`."""
        job = TracedRun(
            request_id=request_id, queue="default", job="5-0", attempt=1, waited_s=0.5, traceparent=traceparent,
            request=request,
        )  # fmt: skip

        def in_task() -> str:
            sent = self.traces.start(job)
            for event in (*events, JobRunEnded()):
                self.traces.emit(event)
            return sent

        return copy_context().run(in_task)

    @property
    def finished(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()


def test_a_job_is_a_span_with_the_names_of_the_conventions() -> None:
    spans = Spans()
    sent = spans.run(
        AttemptBegun("started", 1), RequestSent("http://vllm:8000"), FirstDelta(0.25), END, traceparent=TRACEPARENT,
        model="m", temperature=0.5, max_tokens=9, n=1, seed=True, stop=[SECRET], messages=[{"content": SECRET}],
    )  # fmt: skip
    (span,) = spans.finished
    assert (span.name, span.kind, span.status.status_code) == ("chat m", SpanKind.CLIENT, StatusCode.UNSET)
    assert span.context is not None
    assert span.parent is not None
    assert sent == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert f"{span.parent.span_id:016x}" == PARENT
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "vllm", "gen_ai.request.stream": True,
        "gen_ai.request.model": "m", "gen_ai.request.temperature": 0.5, "gen_ai.request.max_tokens": 9,
        "gen_ai.response.model": "m-4bit", "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.25, "gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 7,
        "server.address": "vllm", "server.port": 8000,
        "vllm_relay.request.id": "r", "vllm_relay.queue": "default", "vllm_relay.job": "5-0",
        "vllm_relay.waited_seconds": 0.5, "vllm_relay.attempt": 1, "vllm_relay.outcome": "done",
    }  # fmt: skip
    assert [event.name for event in span.events] == ["attempt", "request_sent"]
    assert span.resource.attributes["service.name"] == "vllm-relay"
    assert span.resource.attributes["service.instance.id"] == "w1"


def test_the_error_of_a_job_is_in_its_span_by_code_alone() -> None:
    spans = Spans()
    failed = JobFinished("error", "upstream_error", 1, "default", "", None, 1.5)
    spans.run(UpstreamFailed("gap_timeout", 200, "https://vllm", 1, retryable=True), failed)
    (span,) = spans.finished
    assert (span.name, span.status.status_code, span.status.description) == ("chat", StatusCode.ERROR, "upstream_error")
    assert dict(span.events[0].attributes or {}) == {
        "error.type": "gap_timeout", "http.response.status_code": 200, "server.address": "vllm", "server.port": 443,
    }  # fmt: skip


def test_two_workers_have_one_trace_for_a_job_without_a_trace() -> None:
    one, two = Spans(), Spans()
    one.run(JobLeft("hand_over"))
    two.run(AttemptBegun("takeover", 2), AnswerResumed(2, "http://vllm:8000"), ReaderGap("takeover", 2.5), END)
    two.run(END, request_id="another")
    spans = [*one.finished, *two.finished]
    first, second, another = (span.context.trace_id for span in spans if span.context is not None)
    assert first == second != another
    assert [(span.attributes or {})["vllm_relay.outcome"] for span in spans] == ["hand_over", "done", "done"]
    assert [event.name for event in spans[1].events] == ["attempt", "resumed", "gap"]


def test_a_trace_that_its_caller_does_not_record_is_not_recorded_here() -> None:
    spans = Spans()
    sent = spans.run(END, traceparent=f"00-{TRACE}-{PARENT}-00")
    assert sent.startswith(f"00-{TRACE}-")
    assert sent.endswith("-00")
    assert not spans.finished


def test_events_outside_of_a_job_change_no_span() -> None:
    spans = Spans()
    spans.traces.emit(JobRunEnded())
    spans.traces.emit(ReaderGap("redis", 2.0, "unknown"))
    assert not spans.finished


async def test_a_gap_by_redis_belongs_to_the_request_whose_log_it_was() -> None:
    spans = Spans()

    async def run(request_id: str) -> None:
        spans.traces.start(TracedRun(request_id=request_id, queue="q", job="1-0", attempt=1, waited_s=0))
        if request_id == "b":
            spans.traces.emit(ReaderGap("redis", 2.0, "a"))
        await asyncio.sleep(0)
        spans.traces.emit(JobRunEnded())

    await asyncio.gather(run("a"), run("b"))
    found = {(span.attributes or {})["vllm_relay.request.id"]: len(span.events) for span in spans.finished}
    assert found == {"a": 1, "b": 0}


def end_at_once(traces: Traces) -> None:
    """A run of a job that ends at once."""
    traces.start(TracedRun(request_id="r", queue="q", job="1-0", attempt=1, waited_s=0))
    traces.emit(JobRunEnded())


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, ""),
        ({ENDPOINT: ""}, ""),
        ({ENDPOINT: "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, ""),
        ({ENDPOINT: "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"}, ""),
        (
            {ENDPOINT: "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf, with an endpoint for it such as http://127.0.0.1:4318",
        ),
    ],
)
def test_without_an_endpoint_that_can_be_used_there_are_no_traces(environment: dict[str, str], reason: str) -> None:
    log = Recorder()
    assert open_traces("w1", log, environment) is None
    assert log.events == ([TracesOff(reason)] if reason else [])


def test_a_worker_without_an_endpoint_loads_no_exporter() -> None:
    """redis-py 8 loads the package `opentelemetry` by itself, wherever it is installed."""
    ours = "'span' in name and 'worker' in name or 'opentelemetry.exporter' in name"
    code = f"import sys, worker.engine.application; print([name for name in sys.modules if {ours}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "worker.telemetry.job_spans")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    log = Recorder()
    assert open_traces("w1", log, {ENDPOINT: "http://127.0.0.1:4318"}) is None
    (event,) = log.events
    assert isinstance(event, TracesOff)
    assert event.reason.startswith(f"{ENDPOINT} is set, and opentelemetry")
    assert event.reason.endswith("is missing: install the extra `otel`, with pip install '.[otel]'")


async def test_a_collector_that_does_not_answer_is_reported_and_delays_the_end_by_two_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The port is open and nobody answers."""
    async with sending(then_close=False) as url:
        monkeypatch.setenv(ENDPOINT, url)
        log = Recorder()
        traces = open_traces("w1", log)
        assert traces is not None
        traces.start_export(log)
        copy_context().run(end_at_once, traces)
        before = time.monotonic()
        await traces.aclose()
        assert time.monotonic() - before < 5
    assert log.events[0] == TracesExported()
    assert isinstance(log.events[-1], Failing)


async def test_a_collector_that_is_away_is_reported_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setenv(ENDPOINT, f"http://user:password@127.0.0.1:{unused_tcp_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    log = Recorder()
    traces = open_traces("w1", log)
    assert traces is not None
    traces.start_export(log)

    async def reported(kind: type[Event]) -> bool:
        return any(isinstance(event, kind) for event in log.events)

    copy_context().run(end_at_once, traces)
    await eventually(partial(reported, Failing))
    with collector(unused_tcp_port) as found:
        await eventually(partial(reported, Recovered))
        assert len(found.of("r")) == 1
        await traces.aclose()
    failing = next(event for event in log.events if isinstance(event, Failing))
    assert failing.error.startswith("Transient error ConnectionError encountered while exporting spans batch")
    assert "password" not in str(log.events)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector to which workers export that start now."""
    with collector() as found:
        monkeypatch.setenv(ENDPOINT, found.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=relay-eu,deployment.environment.name=test")
        yield found


async def test_a_stream_that_breaks_is_one_span_with_two_attempts_and_vllms_spans_are_its_children(
    client: Client, start_simulator: StartSimulator, start_worker: StartWorker, traced: Collector
) -> None:
    broken = await start_simulator(Options(scenario=Scenario(fault="cut", after=8)))
    well = await start_simulator()
    await start_worker(broken, well)
    request = {"model": "reciter", "messages": [{"role": "user", "content": SECRET}], "stop": [SECRET]}
    request_id = await client.enqueue(request, traceparent=TRACEPARENT)
    answer = await client.result(request_id)

    async def arrived() -> bool:
        return bool(traced.of(request_id))

    await eventually(arrived)
    (span,) = traced.of(request_id)
    assert (span.trace, span.parent, span.name) == (TRACE, PARENT, "chat reciter")
    assert [served.traceparent for served in (*broken.served, *well.served)] == [f"00-{TRACE}-{span.span}-01"] * 2
    began = ["attempt", "request_sent"]
    assert [name for name, _ in span.events[:5]] == [*began, "request_failed", *began]
    assert {name for name, _ in span.events[5:]} == {"gap", "resumed"}  # `resumed` may come before the first delta
    assert span.attributes["gen_ai.usage.output_tokens"] == answer.usage["completion_tokens"]
    assert span.attributes["gen_ai.usage.input_tokens"] == answer.usage["prompt_tokens"]
    assert span.resource["service.name"] == "relay-eu"
    text = answer.text.encode()
    for body in traced.bodies:
        assert SECRET.encode() not in body
        assert text[:20] not in body

"""The export of spans by OTLP over HTTP, in a thread of its own. It needs the extra `otel`.

A collector that is away delays no job: spans that cannot be sent are dropped, and the worker logs the problem.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from typing import TypeAlias

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from .events import Event, Failing, Recovered, Telemetry, TracesExported, TracesOff

_FLUSH_LIMIT = 2.0
"""Seconds for the last spans of a process."""

_WHAT = "traces_failed"
_ADVICE = "check OTEL_EXPORTER_OTLP_ENDPOINT, and whether the collector runs"
_LIBRARY = logging.getLogger("opentelemetry")
_Report: TypeAlias = Callable[[Event], None]


class SpanExport:
    """Exports the spans of a provider, until `aclose`. Create it in the event loop.

    The environment states where to, and how: OTEL_EXPORTER_OTLP_…, OTEL_BSP_….
    """

    def __init__(self, provider: TracerProvider, telemetry: Telemetry) -> None:
        self._provider = provider
        self._telemetry = telemetry
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()
        self._handler = _LibraryWarnings(self._report)
        self._propagated, _LIBRARY.propagate = _LIBRARY.propagate, False
        _LIBRARY.addHandler(self._handler)
        try:
            processor = BatchSpanProcessor(_ReportingExporter(OTLPSpanExporter(), self._report))
        except Exception as error:  # noqa: BLE001 - such as a certificate that cannot be read: tracing stops no worker
            telemetry.emit(TracesOff(f"{type(error).__name__} when the exporter was made from OTEL_EXPORTER_OTLP_…"))
        else:
            provider.add_span_processor(processor)
            telemetry.emit(TracesExported())

    async def aclose(self) -> None:
        """Export what is left. A collector that does not answer delays the end of the process by two seconds."""
        done = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(done.set)

        # `asyncio.to_thread` has threads for which the process waits at its end.
        threading.Thread(target=shut_down, name="flush of spans", daemon=True).start()
        try:
            async with asyncio.timeout(_FLUSH_LIMIT):
                await done.wait()
        except TimeoutError:
            self._telemetry.emit(Failing(_WHAT, "the last spans were not exported in time", _ADVICE))
        else:
            _LIBRARY.removeHandler(self._handler)
            _LIBRARY.propagate = self._propagated

    def _report(self, event: Event) -> None:
        """Emit an event from any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._telemetry.emit, event, context=self._context)


class _ReportingExporter(SpanExporter):
    """An exporter that also reports its successes. Failures are in the log of the library."""

    def __init__(self, exporter: SpanExporter, report: _Report) -> None:
        self._exporter = exporter
        self._report = report

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self._report(Recovered(_WHAT))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _LibraryWarnings(logging.Handler):
    """Reports the warnings of the library, with the arguments of the exporter's alone: others may quote a secret."""

    def __init__(self, report: _Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        message = str(record.msg)
        if record.name.startswith("opentelemetry.exporter.") and isinstance(record.args, tuple):
            # An error of a connection quotes the URL.
            message %= tuple(type(arg).__name__ if isinstance(arg, Exception) else arg for arg in record.args)
        self._report(Failing(_WHAT, message, _ADVICE))

"""Whether a worker exports traces, as the environment variables of OpenTelemetry state (OTEL_…).

OpenTelemetry is the extra `otel`. Without an endpoint in the environment, nothing of it is imported.
"""

import os
from collections.abc import Mapping

from .events import Telemetry, TracesOff
from .traces import Traces

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


def open_traces(worker: str, telemetry: Telemetry, environment: Mapping[str, str] = os.environ) -> Traces | None:
    """The traces of a worker of this name; None if the environment has no endpoint for them, or they cannot be made.

    A problem is emitted as `TracesOff`: it stops no worker.
    """
    endpoint = next((name for name in _ENDPOINTS if environment.get(name)), "")
    exporters = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if not endpoint or exporters == "none" or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = next((name for name in _PROTOCOLS if environment.get(name)), "")
    if protocol and environment[protocol] != _PROTOCOL:
        telemetry.emit(
            TracesOff(f"{protocol} must be {_PROTOCOL}, with an endpoint for it such as http://127.0.0.1:4318")
        )
        return None
    try:
        from .job_spans import JobSpans  # noqa: PLC0415 - the extra `otel`
    except ImportError as error:
        reason = f"{endpoint} is set, and {error.name} is missing: install the extra `otel`, with pip install '.[otel]'"
        telemetry.emit(TracesOff(reason))
        return None
    try:
        return JobSpans(worker)
    except ValueError as error:  # of a variable for the limits of spans
        telemetry.emit(TracesOff(str(error)))
        return None

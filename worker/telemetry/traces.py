"""What a worker gives to its traces, and how it calls them. Nothing of OpenTelemetry is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .events import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRun:
    """The run of a job by a worker. `request` is the body of a chat completion; a span has its model and its
    numbers alone.

    `traceparent` is a valid trace context, or empty. `waited_s` is how long the job was in its queue before this run.
    """

    request_id: str
    queue: str
    job: str
    attempt: int
    waited_s: float
    traceparent: str = ""
    request: Mapping[str, object] = field(default_factory=dict)


class Traces(Telemetry, Protocol):
    """Makes a span of each run of a job, with the events that are emitted in the job's task."""

    def start(self, run: TracedRun) -> str:
        """Start the span of the job that runs in this task; returns the `traceparent` for its requests to vLLM."""

    def start_export(self, telemetry: Telemetry) -> None:
        """Begin to export spans. Problems of the export are emitted to `telemetry`, in the context of the caller."""

    async def aclose(self) -> None:
        """Export what is left, for at most two seconds."""

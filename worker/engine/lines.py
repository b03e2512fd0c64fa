"""The lines of parked jobs that this process knows, and whether their queues are read ahead. No I/O."""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..broker.parked_jobs import ParkedJob, ParkedLine, model_of_line
from .outline import JobOutline, line_name, models_of_line

_MOST_AHEAD = 10_000
"""The most parked jobs of a queue up to which the queue is read ahead."""

_MOST_LINES = 1000
"""The most lines of a queue up to which the queue is read ahead. Each worker lists them twice a second, and jobs may
name any number of models."""

_TENANTS_LAST = 600.0
"""Seconds since the last job with a tenant for which tenants count as in use."""

_MOST_NAMES = 1000
"""The most hashes of which a process remembers the models."""


class KnownLines:
    """The lines of all queues of a worker, as last listed, with the jobs that this process has parked since."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines: dict[tuple[str, str], ParkedLine] = {}
        self._listed_at: dict[str, float] = {}
        self._tenants_seen: dict[str, float] = {}
        self._models: dict[str, tuple[str, ...]] = {}
        """The models of lines whose names are hashes."""
        self.grown = asyncio.Event()
        """Set when this process has parked a job."""

    def __len__(self) -> int:
        return len(self._lines)

    def all(self) -> list[ParkedLine]:
        """All lines with jobs."""
        return list(self._lines.values())

    def are_older(self, queue: str, seconds: float) -> bool:
        """Whether the lines of a queue were not listed within the last `seconds`."""
        return self._clock() - self._listed_at.get(queue, float("-inf")) > seconds

    def replace(self, queue: str, lines: Iterable[ParkedLine]) -> None:
        """Replace the lines of a queue with those that Redis has listed."""
        self._listed_at[queue] = self._clock()
        self._lines = {key: line for key, line in self._lines.items() if key[0] != queue}
        self._lines |= {(queue, line.consumer): line for line in lines}

    def on_parked(self, job: ParkedJob, outline: JobOutline) -> None:
        """Record that this process has parked a job."""
        queue, consumer, model = job.delivery.queue, job.line, model_of_line(job.model)
        known = self._lines.get((queue, consumer))
        self._lines[queue, consumer] = ParkedLine(queue, consumer, job.bucket, model, 1 + (known.jobs if known else 0))
        self.learn(outline)
        self.grown.set()

    def on_taken(self, line: ParkedLine, asked: int, got: int) -> None:
        """Record that `asked` jobs were requested from a line, and `got` were taken. A line that gave less is empty."""
        known = self._lines.pop((line.queue, line.consumer), None)
        if known is not None and got == asked and known.jobs > got:
            self._lines[line.queue, line.consumer] = replace(known, jobs=known.jobs - got)

    def on_seen(self, queue: str, outline: JobOutline) -> None:
        """Record a job that was read from a queue."""
        if outline.tenant:
            self._tenants_seen[queue] = self._clock()

    def learn(self, outline: JobOutline) -> None:
        """Learn the models of the line in which a job waits, if the line's name does not have them."""
        name = line_name(outline.models)
        if (known := model_of_line(name)) != name and known not in self._models:
            while len(self._models) >= _MOST_NAMES:
                self._models.pop(next(iter(self._models)))
            self._models[known] = outline.models

    def models_of(self, line: ParkedLine) -> tuple[str, ...] | None:
        """The model and the fallbacks of the jobs in a line; None if they are not known."""
        return self._models.get(line.model) if line.model.startswith("#") else models_of_line(line.model)

    def reads_ahead(self, queue: str) -> bool:
        """Whether jobs of a queue should be read and parked while no server has room.

        In the stream of a queue, jobs behind others are not seen. So a flood of one tenant, or of another queue that
        has jobs in lines, would come first.
        """
        lines = [line for line in self._lines.values() if line.queue == queue]
        if sum(line.jobs for line in lines) >= _MOST_AHEAD or len(lines) >= _MOST_LINES:
            return False
        seen = self._tenants_seen.get(queue)
        return (
            (seen is not None and self._clock() - seen < _TENANTS_LAST)
            or any(line.has_tenant for line in lines)
            or len(lines) < len(self._lines)
        )

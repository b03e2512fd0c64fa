"""Counts of what a process has done, for its record."""

import time
from collections import deque
from collections.abc import Callable

from ..telemetry.events import EntriesAccepted, Event
from ..telemetry.job_events import JobFinished


class Tally:
    """Counts the ends of jobs and the log entries of a process: a receiver of events.

    Rates are over the last two to three intervals of `interval` seconds.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.failed = self.cancelled = self.entries = 0
        self._interval = interval
        self._clock = clock
        self._samples: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)], maxlen=3)
        """At most one for each interval: the time, the finished jobs and the entries."""

    def emit(self, event: Event) -> None:
        """Count an event."""
        match event:
            case EntriesAccepted():
                self.entries += event.count
            case JobFinished(outcome="error"):
                self.failed += 1
            case JobFinished(outcome="cancelled"):
                self.cancelled += 1

    def rates(self, finished: int) -> tuple[float, float]:
        """Finished jobs and log entries a second. `finished` is how many jobs have finished by now."""
        now = self._clock()
        if now - self._samples[-1][0] >= self._interval:
            self._samples.append((now, finished, self.entries))
        then, *counts = self._samples[0]
        seconds = max(now - then, self._interval)
        return round((finished - counts[0]) / seconds, 3), round((self.entries - counts[1]) / seconds, 1)

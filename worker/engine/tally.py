"""Counts of what a process has done, for its record."""

import time
from collections import Counter, deque
from collections.abc import Callable

from ..contract.records import QueueCounts
from ..telemetry.events import EntriesAccepted, Event
from ..telemetry.job_events import JobFinished


class Tally:
    """Counts the ends of jobs and the log entries of a process: a receiver of events.

    Rates are over the last two to three intervals of `interval` seconds.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.failed = self.cancelled = self.entries = 0
        self._ended = Counter[str]()
        """The jobs of each queue that have ended here; `_failed` those of them that failed."""
        self._failed = Counter[str]()
        self._interval = interval
        self._clock = clock
        self._samples: deque[tuple[float, int, int, Counter[str]]] = deque([(clock(), 0, 0, Counter())], maxlen=3)
        """At most one for each interval: the time, the finished jobs, the entries, and the ended jobs of each queue."""

    def emit(self, event: Event) -> None:
        """Count an event."""
        match event:
            case EntriesAccepted():
                self.entries += event.count
            case JobFinished():
                self._ended[event.queue] += 1
                if event.outcome == "error":
                    self.failed += 1
                    self._failed[event.queue] += 1
                self.cancelled += event.outcome == "cancelled"

    def rates(self, finished: int) -> tuple[float, float]:
        """Finished jobs and log entries a second. `finished` is how many jobs have finished by now."""
        now = self._clock()
        if now - self._samples[-1][0] >= self._interval:
            self._samples.append((now, finished, self.entries, self._ended.copy()))
        then, finished_then, entries_then, _ = self._samples[0]
        seconds = max(now - then, self._interval)
        return round((finished - finished_then) / seconds, 3), round((self.entries - entries_then) / seconds, 1)

    def by_queue(self) -> dict[str, QueueCounts]:
        """The jobs of each queue that ended here: how many do in a second, as in `rates`, and how many failed."""
        then, _, _, ended_then = self._samples[0]
        seconds = max(self._clock() - then, self._interval)
        return {
            queue: QueueCounts(
                finished_per_s=round((ended - ended_then[queue]) / seconds, 3), failed=self._failed[queue]
            )
            for queue, ended in self._ended.items()
        }

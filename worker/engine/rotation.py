"""The rotation of lines: which parked jobs are taken next, by the priority of queues and tenant by tenant. No I/O."""

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from ..broker.parked_jobs import ParkedLine

_LONGEST_WAIT_EVERY = 8
"""One of this many jobs comes from the queue that has waited longest, so that less important queues do not starve."""

_BEGUN = "!"
"""Stands for the lines of begun jobs of all queues. It is no name of a queue."""

_MOST_BUCKETS = 10_000

_Place = TypeVar("_Place")


class LineRotation(Generic[_Place]):
    """Chooses jobs from lines.

    Begun jobs of all queues come first: readers wait for the rest of their answers. Then the queues are in order of
    priority. Within a queue, the bucket of tenants that was served least recently is next;
    within a bucket, the line that was served least recently.
    """

    def __init__(self, queues: Sequence[str]) -> None:
        self._queues = list(queues)
        self._turn = 0
        self._served: dict[tuple[str, ...], int] = {}
        """The turn in which each queue, bucket and line was last served."""

    def choose(
        self, lines: Iterable[ParkedLine], most: int, admit: Callable[[ParkedLine], _Place | None]
    ) -> dict[ParkedLine, list[_Place]]:
        """Choose up to `most` jobs. `admit` keeps a place for a job of a line, and returns None if there is none.

        Returns the lines with the places of the jobs to take. A line gives no more jobs than it has.
        """
        waiting: dict[str, list[ParkedLine]] = {}
        for line in lines:
            waiting.setdefault(_BEGUN if line.is_of_begun_jobs else line.queue, []).append(line)
        chosen: dict[ParkedLine, list[_Place]] = {}
        full: set[str] = set()
        while sum(map(len, chosen.values())) < most:
            for queue in self._order(waiting):
                if found := self._next(waiting[queue], chosen, full, admit):
                    line, place = found
                    chosen.setdefault(line, []).append(place)
                    self._note(line)
                    break
            else:
                break
        return chosen

    def _order(self, waiting: dict[str, list[ParkedLine]]) -> list[str]:
        queues = [queue for queue in self._queues if queue in waiting]
        if (self._turn + 1) % _LONGEST_WAIT_EVERY == 0:
            queues.sort(key=lambda queue: self._served.get((queue,), -1))
        return [_BEGUN, *queues] if _BEGUN in waiting else queues

    def _next(
        self,
        lines: list[ParkedLine],
        chosen: dict[ParkedLine, list[_Place]],
        full: set[str],
        admit: Callable[[ParkedLine], _Place | None],
    ) -> tuple[ParkedLine, _Place] | None:
        served = self._served

        def waited(line: ParkedLine) -> tuple[int, int]:
            return served.get((line.queue, line.bucket), -1), served.get((line.queue, line.consumer), -1)

        for line in sorted(lines, key=waited):
            if line.model in full or len(chosen.get(line, ())) >= line.jobs:
                continue
            place = admit(line)
            if place is not None:
                return line, place
            full.add(line.model)
        return None

    def _note(self, line: ParkedLine) -> None:
        self._turn += 1
        for key in ((line.queue,), (line.queue, line.bucket), (line.queue, line.consumer)):
            self._served.pop(key, None)
            self._served[key] = self._turn
        while len(self._served) > _MOST_BUCKETS:
            self._served.pop(next(iter(self._served)))

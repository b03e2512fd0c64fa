"""Which queues of this worker operators have paused, and whether the pause is in effect here. No I/O."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..contract.records import ControlEntry
from ..telemetry.events import QueuePaused, QueueResumed, Telemetry


class QueuePauses:
    """The pauses of a worker's queues, as last read. `now` is Redis's time in Unix ms.

    A caller that claims jobs of a queue checks `is_paused` and enters `claiming` in one step of the event loop. So no
    job of a queue in `in_effect` starts here, except jobs that other workers have begun.
    """

    def __init__(self, queues: Sequence[str], now: Callable[[], int], telemetry: Telemetry) -> None:
        self._queues = queues
        self._now = now
        self._telemetry = telemetry
        self._pauses: Mapping[str, ControlEntry] = {}
        self._changed = asyncio.Event()
        self._claiming: Counter[str] = Counter()
        """The claims of each queue that are under way."""

    def replace(self, pauses: Mapping[str, ControlEntry]) -> None:
        """Replace the pauses with those that were read now. Each change is reported once."""
        former, self._pauses = self._pauses, {queue: pauses[queue] for queue in self._queues if queue in pauses}
        for queue in self._queues:
            pause = self._pauses.get(queue)
            if pause == former.get(queue):
                continue
            self._changed.set()
            if pause is None:
                self._telemetry.emit(QueueResumed(queue))
            else:
                self._telemetry.emit(QueuePaused(queue, by=pause.by, why=pause.why, until=pause.until))

    def is_paused(self, queue: str) -> bool:
        """Whether no jobs of a queue may be claimed. Any thread may call it."""
        pause = self._pauses.get(queue)
        return pause is not None and not pause.has_ended(self._now())

    @property
    def next_end(self) -> float:
        """In how many seconds the next pause ends, if nobody changes it; infinite if none has an end."""
        ends = [pause.until for pause in self._pauses.values() if pause.until]
        return max(0, min(ends) - self._now()) / 1000 if ends else float("inf")

    @property
    def in_effect(self) -> tuple[str, ...]:
        """The paused queues of which no claim is under way."""
        return tuple(queue for queue in self._queues if self.is_paused(queue) and not self._claiming[queue])

    @contextmanager
    def claiming(self, *queues: str) -> Iterator[None]:
        """The time from a claim of jobs to their start."""
        self._claiming.update(queues)
        try:
            yield
        finally:
            self._claiming.subtract(queues)

    async def wait_resumed(self, queue: str, stopping: asyncio.Event) -> None:
        """Wait until a queue is not paused, or until stopped."""
        while self.is_paused(queue) and not stopping.is_set():
            self._changed.clear()
            waiting = {asyncio.ensure_future(event.wait()) for event in (self._changed, stopping)}
            await asyncio.wait(waiting, timeout=self._left(queue), return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()

    def _left(self, queue: str) -> float | None:
        """Seconds until the pause of a queue ends by itself; None if it does not."""
        pause = self._pauses[queue]
        return max(0.001, (pause.until - self._now()) / 1000) if pause.until else None

"""The count of accepted log entries, reported as one event for many flushes."""

import asyncio

from ..telemetry.events import EntriesAccepted, Telemetry


class AcceptedEntries:
    """Counts the entries that Redis accepted, and emits their number each `every` seconds.

    A flush of a slow stream has one entry. An event for each flush would be an event for each token.
    """

    def __init__(self, telemetry: Telemetry, every: float) -> None:
        self._telemetry = telemetry
        self._every = every
        self._count = 0
        """Entries since the last report."""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, count: int) -> None:
        """Count entries."""
        self._count += count
        if self._count and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._every, self.report)

    def report(self) -> None:
        """Report the entries that were counted since the last report."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._count:
            self._telemetry.emit(EntriesAccepted(self._count))
            self._count = 0

"""Adds up what was delivered, so that metrics get a few events a second instead of one for each frame."""

from ..telemetry.events import Telemetry
from ..telemetry.stream_events import EntriesDelivered

_SAMPLE = 16
"""How many delays a report has at most."""


class DeliveryMeter:
    """Entries and bytes that were written to the readers of one process since the last report."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._entries = 0
        self._bytes = 0
        self._delays: list[float] = []

    def add(self, entries: int, size: int, delay: float | None = None) -> None:
        """Count entries that were written, and their bytes. `delay` is the time in seconds that a live entry took."""
        self._entries += entries
        self._bytes += size
        if delay is not None and len(self._delays) < _SAMPLE:
            self._delays.append(delay)

    def report(self) -> None:
        """Emit what was counted since the last call."""
        if self._entries:
            self._telemetry.emit(EntriesDelivered(self._entries, self._bytes, tuple(self._delays)))
            self._entries = self._bytes = 0
            self._delays.clear()

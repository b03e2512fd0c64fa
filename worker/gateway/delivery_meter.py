"""Adds up what was delivered, so that metrics get a few events a second instead of one for each frame."""

from ..telemetry.events import Telemetry
from ..telemetry.stream_events import EntriesDelivered


class DeliveryMeter:
    """Entries and bytes that were written to the readers of one process since the last report."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._entries = 0
        self._bytes = 0

    def add(self, entries: int, size: int) -> None:
        """Count entries that were written, and their bytes."""
        self._entries += entries
        self._bytes += size

    def report(self) -> None:
        """Emit what was counted since the last call."""
        if self._entries:
            self._telemetry.emit(EntriesDelivered(self._entries, self._bytes))
            self._entries = self._bytes = 0

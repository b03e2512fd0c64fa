"""Adds up what was delivered, so that metrics get a few events a second instead of one for each frame."""

import asyncio
from time import perf_counter

from ..telemetry.events import Telemetry
from ..telemetry.stream_events import EntriesDelivered

_PAUSE = 0.05
"""Seconds between two samples. To know when each step of the event loop ends would cost a call in each."""


class DeliveryMeter:
    """Entries and bytes that were written to the readers of one process since the last report."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._entries = 0
        self._bytes = 0
        self._delays: list[float] = []
        self._is_sample_due = True
        self._arrived_at = 0.0
        """When the live entries of the sample arrived; 0 outside of a sample."""

    def note_arrival(self) -> None:
        """Note that a live entry has arrived, before anything is done with it.

        A sample is all entries of one step of the event loop: they have arrived together, and wait for each other.
        """
        if self._is_sample_due:
            self._is_sample_due = False
            self._arrived_at = perf_counter()
            asyncio.get_running_loop().call_soon(self._end_sample)

    def add_live(self, readers: int, size: int) -> None:
        """Count a live entry that was written to so many readers, and its bytes for each."""
        self.add(readers, readers * size)
        if self._arrived_at:
            self._delays.append(perf_counter() - self._arrived_at)

    def add(self, entries: int, size: int) -> None:
        """Count entries that were written, and their bytes."""
        self._entries += entries
        self._bytes += size

    def report(self) -> None:
        """Emit what was counted since the last call."""
        if self._entries:
            self._telemetry.emit(EntriesDelivered(self._entries, self._bytes, tuple(self._delays)))
            self._entries = self._bytes = 0
            self._delays.clear()

    def _end_sample(self) -> None:
        self._arrived_at = 0.0
        asyncio.get_running_loop().call_later(_PAUSE, self._begin_sample)

    def _begin_sample(self) -> None:
        self._is_sample_due = True

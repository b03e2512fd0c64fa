"""The monitor of the event loop: a timer that ticks on the loop, and how late it is, as other threads see it."""

import asyncio
import time
from collections.abc import Callable

STUCK_AFTER = 2.0
"""Seconds without a tick after which the event loop counts as stuck."""

_EVERY = 0.25
"""Seconds between two ticks. A tick costs some microseconds."""

_WINDOW = 15.0
"""Seconds for which a delay is remembered at least, so that a scrape does not miss it; at most twice as long."""


class LoopMonitor:
    """Measures the delays of the event loop. `start` and `stop` run on the loop; any thread may call the rest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0
        self._longest = self._longest_before = 0.0
        """The longest delay in the present window, and in the one before."""
        self._window_ends = 0.0

    def start(self) -> None:
        """Begin to tick."""
        self._last = self._clock()
        self._window_ends = self._last + _WINDOW
        self._timer = asyncio.get_running_loop().call_later(_EVERY, self._tick)

    def stop(self) -> None:
        """Tick no more. A loop without ticks does not count as stuck then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def last_tick(self) -> float:
        """When the loop last ticked, by the monotonic clock."""
        return self._last

    def age(self) -> float:
        """Seconds since the last tick; 0 while the loop is not monitored."""
        return 0.0 if self._timer is None else max(0.0, self._clock() - self._last)

    def is_stuck(self) -> bool:
        """Whether the loop has not ticked for `STUCK_AFTER` seconds."""
        return self.age() > STUCK_AFTER

    def delay(self) -> float:
        """The longest delay of a tick in the last 15 to 30 s; while the loop is stuck, the time since its last tick."""
        age = self.age()
        overdue = age if age > STUCK_AFTER else age - _EVERY
        return max(self._longest, self._longest_before, overdue)

    def _tick(self) -> None:
        now = self._clock()
        delay = now - self._last - _EVERY
        if now >= self._window_ends:
            missed = now - self._window_ends >= _WINDOW
            self._longest_before = 0.0 if missed else self._longest
            self._longest = 0.0
            self._window_ends = now + _WINDOW
        self._longest = max(self._longest, delay)
        self._last = now
        self._timer = asyncio.get_running_loop().call_later(_EVERY, self._tick)

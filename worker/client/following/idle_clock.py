"""Measures how long a follower has had no entry."""

import asyncio
from collections.abc import Callable


class IdleClock:
    """The time that may pass without an entry. One timer serves many waits, since a timer for each entry is slow.

    Args:
        on_idle: is called when the time is over, if `wake_at_end` was called before.
    """

    def __init__(self, on_idle: Callable[[], object]) -> None:
        self._on_idle = on_idle
        self._loop = asyncio.get_running_loop()
        self._ends_at = 0.0
        """By the event loop's clock; 0 before the first wait."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self._loop.time() >= self._ends_at

    @property
    def seconds_left(self) -> float:
        """Seconds until the time is over. Negative after that."""
        return self._ends_at - self._loop.time()

    def restart(self, seconds: float) -> None:
        """Begin the time again: it is over in so many seconds."""
        self._ends_at = self._loop.time() + seconds

    def start(self, seconds: float) -> None:
        """Begin the time, unless it has begun."""
        self._ends_at = self._ends_at or self._loop.time() + seconds

    def wake_at_end(self) -> None:
        """Have `on_idle` called when the time is over."""
        if self._timer is None:
            self._timer = self._loop.call_at(self._ends_at, self._on_timer)

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _on_timer(self) -> None:
        self._timer = None
        if self.is_over:
            self._on_idle()
        else:  # the time has begun again since the timer was set
            self.wake_at_end()

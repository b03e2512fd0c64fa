"""How a publisher paces its writes: the sizes and times, all measured, that suit one worker process."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..contract.feed import MAX_SILENCE


@dataclass(frozen=True, slots=True)
class FlushPace:
    """How often a publisher writes, and how much at once. Times are seconds."""

    max_entries: int = 2048
    """Entries in a flush, or a few more: a batch is not divided."""
    busy_rate: float = 10_000
    """Entries a second, since the last flush, above which the process pauses between flushes."""
    interval: float = 0.0007
    """From one flush to the next of a busy process. Waking for each token, where many come, costs a seventh more CPU
    than reading at once what has arrived."""
    sleep: Callable[[float], None] = time.sleep
    """How the process pauses."""
    feed_delay: float = 0.001
    """Until entries are published that no flush has taken along: a MULTI for the feed alone costs as much as one for
    log entries."""
    feed_idle_for: float = MAX_SILENCE
    """For which a log is not published that had no listeners."""

"""The pace of a publisher's writes: sizes and times, all measured for one worker process."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..contract.feed import MAX_SILENCE


@dataclass(frozen=True, slots=True)
class FlushPace:
    """How often a publisher writes, and how much at once. Times are seconds."""

    max_entries: int = 2048
    """Entries in a flush. A flush may have a few more, since a batch is not divided."""
    busy_rate: float = 10_000
    """Entries a second, since the last flush, above which the process pauses between flushes."""
    interval: float = 0.0007
    """The time between two flushes of a busy process. Waking for each of many tokens costs a seventh more CPU than
    reading at once all that have arrived."""
    sleep: Callable[[float], None] = time.sleep
    """How the process pauses."""
    feed_delay: float = 0.001
    """The time after which entries are published without a flush of log entries. A MULTI for the feed alone costs as
    much as one for log entries."""
    feed_idle_for: float = MAX_SILENCE
    """The time for which a log without listeners is not published."""
    report_every: float = 0.25
    """The time between two reports of accepted entries."""

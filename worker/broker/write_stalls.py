"""Stalls of Redis, as readers notice them: how long it accepted no entries of a log."""

import time
from collections.abc import Iterable

from ..contract.ids import EntryId
from ..telemetry.events import ReaderGap, Telemetry
from .log_writer import LogWriter

_LATE_AFTER = 1.0
"""Seconds after which a write that Redis accepts in the end was a stall."""


class WriteStalls:
    """Finds the logs of which Redis accepted nothing for a while, and emits for how long. Times are monotonic seconds.

    Only logs that have accepted deltas count, and among them those with entries to write.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._stalled: dict[LogWriter, tuple[float, EntryId]] = {}
        """Since when each log is stalled, and its last accepted entry."""

    def on_reply(self, logs: Iterable[LogWriter], sent: float) -> None:
        """Begin the stalls of a write whose reply came late. Call `end` once the reply has been applied."""
        if time.monotonic() - sent > _LATE_AFTER:
            self.begin(logs, sent)

    def begin(self, logs: Iterable[LogWriter], since: float) -> None:
        """Record that a write failed. It was sent at `since`."""
        for log in logs:
            if log.pending_bytes and log.progress.done() and log not in self._stalled:
                self._stalled[log] = since, log.accepted

    def end(self, attached: set[LogWriter]) -> None:
        """Emit the stalls that are over by now. A log that is lost or no longer attached is dropped."""
        if not self._stalled:
            return
        now = time.monotonic()
        for log, (since, accepted) in list(self._stalled.items()):
            if log.loss is not None or log not in attached or log.accepted.attempt != accepted.attempt:
                del self._stalled[log]
            elif log.accepted != accepted:
                del self._stalled[log]
                self._telemetry.emit(ReaderGap("redis", now - since))

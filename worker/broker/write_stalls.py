"""Stalls of Redis, as readers notice them: how long it accepted no entries of a log."""

import asyncio
import time
from collections.abc import Iterable

from ..contract.ids import EntryId
from ..telemetry.events import ReaderGap, Telemetry
from .log_writer import LogWriter

_LOOK_EVERY = 0.5
_LOOKS = 3
"""How many looks in a row must find the same write without a reply. So it has been late for a second, while the event
loop ran: a reply that comes late because this process got no CPU is no stall of Redis."""


class WriteStalls:
    """Finds the logs of which Redis accepted nothing for a while, and emits for how long. Times are monotonic seconds.

    Only logs that have accepted deltas count, and among them those with entries to write.

    Attributes:
        sent: when the last write was sent.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.sent = 0.0
        self._in_flight = False
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0
        """The write that the last look found."""
        self._looks = 0
        """How many looks in a row have found that write."""
        self._stalled: dict[LogWriter, tuple[float, EntryId]] = {}
        """Since when each log is stalled, and its last accepted entry."""

    def on_sent(self, now: float) -> None:
        """Record that a write is sent."""
        self.sent, self._in_flight = now, True
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)

    def on_reply(self, logs: Iterable[LogWriter]) -> None:
        """Begin a stall if the reply came late. Call `end` once the reply has been applied."""
        if self._looks >= _LOOKS and self._looked_at == self.sent:
            self.begin(logs)
        self._in_flight = False

    def begin(self, logs: Iterable[LogWriter]) -> None:
        """Record that the last write failed."""
        self._in_flight = False
        for log in logs:
            if log.pending_bytes and log.progress.done() and log not in self._stalled:
                self._stalled[log] = self.sent, log.accepted

    def end(self, attached: set[LogWriter]) -> None:
        """Emit the stalls that are over by now. A log that is lost or no longer attached is dropped."""
        self._in_flight = False
        if not self._stalled:
            return
        now = time.monotonic()
        for log, (since, accepted) in list(self._stalled.items()):
            if log.loss is not None or log not in attached or log.accepted.attempt != accepted.attempt:
                del self._stalled[log]
            elif log.accepted != accepted:
                del self._stalled[log]
                self._telemetry.emit(ReaderGap("redis", now - since, log.request_id))

    def _look(self) -> None:
        if not self._in_flight:
            self._timer = None
            return
        self._looks = self._looks + 1 if self._looked_at == self.sent else 1
        self._looked_at = self.sent
        self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)

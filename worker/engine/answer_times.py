"""The times of one answer in this process: its first delta, its gaps, and the gaps that interruptions leave. No I/O.

All times are seconds of the monotonic clock. Nothing here runs per token: only at a stream's first delta and its end.
"""

from ..broker.job_queue import Delivery
from ..telemetry.events import GapCause, ReaderGap, Telemetry
from ..telemetry.job_events import AnswerStreamEnded, FirstDelta
from ..vllm.stream.watchdog import StreamWatchdog


class AnswerTimes:
    """Emits when the deltas of an answer came.

    An answer has several streams if it was interrupted. Its former owner in another process had the earlier ones.

    Attributes:
        began: when the job started in this process.
        first_delta: when the answer's first delta came here; None before that, and again once the answer has restarted.
        awaits_delta: whether the present stream has not had a delta yet.
    """

    __slots__ = (
        "_cause", "_emit", "_entries", "_has_first_delta", "_last_delta", "_stream_began", "awaits_delta", "began",
        "first_delta",
    )  # fmt: skip

    def __init__(self, telemetry: Telemetry, began: float) -> None:
        self._emit = telemetry.emit
        self.began = began
        self.first_delta: float | None = None
        self.awaits_delta = False
        self._has_first_delta = False
        """Whether the job has had a first delta, in this process or another."""
        self._last_delta: float | None = None
        """When a reader got the last delta before the present stream; None if there was none, or nobody knows."""
        self._cause: GapCause = "vllm"
        self._stream_began = 0.0
        self._entries = 0

    def continue_from(self, delivery: Delivery, delivered: float) -> None:
        """Continue an answer that had begun with its former owner. The job was delivered here at `delivered`."""
        self._has_first_delta = True
        if delivery.left_for is not None:
            self._last_delta = delivered - delivery.left_for
            self._cause = "handover" if delivery.handed_over else "takeover"

    def restart(self, *, redis_lost_it: bool) -> None:
        """Begin the answer again. `redis_lost_it` is whether Redis has lost entries that it had accepted."""
        self.first_delta = None
        if redis_lost_it:
            self._cause = "redis"

    def on_first_delta(self, now: float, entries: int) -> None:
        """Record the first delta of a stream, with which the log has `entries` entries of this attempt."""
        self.awaits_delta = False
        self._stream_began, self._entries = now, entries
        if self.first_delta is None:
            self.first_delta = now
        if not self._has_first_delta:
            self._has_first_delta = True
            self._emit(FirstDelta(now - self.began))
        if self._last_delta is not None:
            self._emit(ReaderGap(self._cause, max(0.0, now - self._last_delta)))
            self._last_delta = None
        self._cause = "vllm"

    def on_stream_end(self, entries: int, watchdog: StreamWatchdog) -> None:
        """Record the end of a stream, for whatever reason."""
        if self.awaits_delta:
            return
        self._last_delta = watchdog.last_event
        if entries > self._entries:
            mean = (watchdog.last_event - self._stream_began) / (entries - self._entries)
            self._emit(AnswerStreamEnded(mean, watchdog.longest_gap))

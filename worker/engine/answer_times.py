"""The times of one answer in this process: its first delta, its gaps, and the gaps that interruptions leave. No I/O.

Nothing here runs per token: only at a stream's first delta and its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..broker.job_queue import Delivery
from ..contract.entries import Claimed, Delta, Entry, Started
from ..telemetry.events import GapCause, ReaderGap, Telemetry
from ..telemetry.job_events import AnswerStreamEnded, FirstDelta
from ..vllm.stream.watchdog import StreamWatchdog

_OF_OTHER_OWNERS = frozenset({"takeover", "diverged"})
"""Reasons of an attempt that are no fault of vLLM."""


@dataclass(frozen=True, slots=True)
class FormerTimes:
    """What is known of an answer when its job is delivered, from its log and its delivery. Times are Unix ms.

    Attributes:
        started: when the job was first started; 0 if it was not.
        has_begun: whether the answer has a delta.
        interrupted: when the last delta came, or somewhat later; 0 if that is unknown.
        cause: what interrupted the answer.
    """

    started: int = 0
    has_begun: bool = False
    interrupted: int = 0
    cause: GapCause = "vllm"


def former_times(entries: Sequence[Entry], delivery: Delivery, *, delivered: int, gap_timeout: float) -> FormerTimes:
    """The times of an answer before this delivery of its job, which came at `delivered`.

    The last delta came before the former owner let go of the job. If the former owner, or this process, has begun
    another attempt after a fault of vLLM and has written nothing since, as for a job that waited in its queue for a
    server, then the last delta came shortly before that attempt.
    """
    started = next((entry.time for entry in entries if isinstance(entry, Started)), 0)
    last_claim = max((n for n, entry in enumerate(entries) if isinstance(entry, Started | Claimed)), default=-1)
    has_begun = any(isinstance(entry, Delta) for entry in entries)
    let_go = 0 if delivery.left_for is None else delivered - round(delivery.left_for * 1000)
    claim = entries[last_claim] if last_claim >= 0 else None
    is_idle = not any(isinstance(entry, Delta) for entry in entries[last_claim + 1 :])
    if isinstance(claim, Claimed) and is_idle and claim.reason not in _OF_OTHER_OWNERS:
        silence = round(gap_timeout * 1000) if claim.reason == "gap_timeout" else 0
        if (failed := claim.time - silence) > let_go:
            return FormerTimes(started, has_begun, failed, "vllm")
    return FormerTimes(started, has_begun, let_go, "handover" if delivery.handed_over else "takeover")


class AnswerTimes:
    """Emits when the deltas of an answer came. Times are seconds of the monotonic clock, if nothing else is said.

    An answer has several streams if it was interrupted. Its former owner in another process had the earlier ones.

    Attributes:
        began: when the job started in this process.
        first_delta: when the answer's first delta came here; None before that, and again once the answer has restarted.
        awaits_delta: whether the present stream has not had a delta yet.
        interrupted: for how many seconds interruptions that ended here have kept readers waiting.
    """

    __slots__ = (
        "_cause", "_emit", "_entries", "_has_first_delta", "_last_delta", "_started", "_stream_began", "awaits_delta",
        "began", "first_delta", "interrupted",
    )  # fmt: skip

    def __init__(self, telemetry: Telemetry, began: float, former: FormerTimes, *, now_ms: int) -> None:
        """`now_ms` is the time `began` by Redis's clock, in Unix ms."""
        self._emit = telemetry.emit
        self.began = began
        self._started = began - max(0, now_ms - former.started) / 1000 if former.started else began
        """When the job was first started, by any worker."""
        self.first_delta: float | None = None
        self.awaits_delta = False
        self.interrupted = 0.0
        self._has_first_delta = former.has_begun
        """Whether the job has had a first delta, in this process or another."""
        self._last_delta: float | None = None
        """When a reader got the last delta before the present stream; None if there was none, or nobody knows."""
        if former.has_begun and former.interrupted:
            self._last_delta = began - (now_ms - former.interrupted) / 1000
        self._cause: GapCause = former.cause
        self._stream_began = 0.0
        self._entries = 0

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
            self._emit(FirstDelta(now - self._started))
        if self._last_delta is not None:
            gap = max(0.0, now - self._last_delta)
            self.interrupted += gap
            self._emit(ReaderGap(self._cause, gap))
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

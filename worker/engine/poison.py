"""Poison jobs: counts the failures of a job that may kill its worker, and runs such jobs alone, in quarantine.

The death of a process is a failure of all jobs that run there, including the harmless ones. So a job that has failed
twice is put into quarantine: a process runs such jobs one at a time, and the next death counts only against that job.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from ..broker.job_queue import Delivery
from ..contract.answer import Answer
from ..contract.entries import TAKEOVER, Claimed, Entry, Restarted, Started

_QUARANTINE_FROM = 2
"""The number of failures from which a job runs in quarantine."""

SUSPECT_FROM = _QUARANTINE_FROM + 1
"""The number of deliveries from which a job may be poison, if nothing else is known of it."""

WITHOUT_PROGRESS = "without progress: its workers died or were cut off"
"""The end of the reason for which a poison job is buried."""

_PROGRESS_FACTOR = 2
"""An answer that begins again has made progress once it is this many times as long as the longest one before."""


def count_failures(history: Iterable[Entry], delivery: Delivery) -> int:
    """How many owners of this job in a row were lost without progress, up to this delivery.

    The failures are counted in the log, because Redis's own delivery count also increases if the reply of a claim is
    lost and no worker runs the job. A claim with the same `delivery` as the claim before it was a hand-over, which
    is no failure. A claim with a greater `delivery` is one failure, whatever the difference. An attempt that an owner
    claims for its own retry is no delivery.

    An owner has made progress if it added a delta to the answer. An owner that had to begin the answer again must have
    written twice as much as any owner before, since a job may kill its workers at different places.
    """
    count, last = 0, None
    answer, longest, goal = Answer(), 0, 0
    for entry in history:
        if isinstance(entry, Restarted):
            goal = _PROGRESS_FACTOR * longest
        elif isinstance(entry, Started | Claimed):
            if len(answer.deltas) > goal:
                count, last = 0, None
            goal = longest = max(longest, len(answer.deltas))
            if (entry.queue, entry.job) != (delivery.queue, delivery.id):
                count, last = 0, None  # another job of the same request, which has deliveries of its own
            elif isinstance(entry, Started) or entry.reason == TAKEOVER:
                count += last is not None and entry.delivery > last
                last = entry.delivery
        answer.add(entry)
    if len(answer.deltas) > goal:
        return 0
    return count + (last is not None and delivery.count > last)


def progress_goal(history: Iterable[Entry]) -> int:
    """How many deltas an answer that begins again must exceed to count as progress."""
    answer, longest = Answer(), 0
    for entry in history:
        if isinstance(entry, Claimed):
            longest = max(longest, len(answer.deltas))
        answer.add(entry)
    return _PROGRESS_FACTOR * max(longest, len(answer.deltas))


def needs_quarantine(failed: int, max_deliveries: int) -> bool:
    """Whether a job with `failed` failures runs alone. At `max_deliveries` failures it is buried instead."""
    return _quarantine_from(max_deliveries) <= failed < max_deliveries


def may_be_poison(delivery: Delivery, max_deliveries: int) -> bool:
    """Whether the delivery count allows enough failures for quarantine; the log then has the exact number.

    The job is not parsed before that, because parsing it may kill the worker.
    """
    return delivery.redelivered and delivery.count > _quarantine_from(max_deliveries)


def _quarantine_from(max_deliveries: int) -> int:
    return max(1, min(_QUARANTINE_FROM, max_deliveries - 1))


class Quarantine:
    """Runs one possible poison job at a time.

    A turn lasts at most `longest` seconds: if the job's vLLM server is away, the other jobs would otherwise wait too.
    """

    def __init__(self, longest: float) -> None:
        self._lock = asyncio.Lock()
        self._longest = longest

    async def wait_turn(self, stop: asyncio.Future[Any], within: float) -> "QuarantineTurn | None":
        """Wait for a turn. Returns None if `stop` is done or `within` seconds have passed before."""
        waiting = asyncio.ensure_future(self._lock.acquire())
        events: set[asyncio.Future[Any]] = {waiting, stop}
        try:
            await asyncio.wait(events, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        return QuarantineTurn(self._lock, self._longest) if waiting.done() else None


class QuarantineTurn:
    """A job's time alone: from before its claim until it makes progress, ends, or reaches the time limit."""

    def __init__(self, lock: asyncio.Lock, longest: float) -> None:
        self._lock: asyncio.Lock | None = lock
        self._timer = asyncio.get_running_loop().call_later(longest, self.end)

    def end(self, *_: object) -> None:
        """Let the next job run. Calling this again has no effect."""
        self._timer.cancel()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

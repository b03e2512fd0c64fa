"""Jobs that may be what kills their worker: how often one has failed so far, and how such jobs run one at a time.

A process that dies takes all of its jobs along, the innocent with the guilty. From the second failure on a job is a
suspect; of these a process runs one at a time, so that a further death counts against that one only.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from ..broker.job_queue import Delivery
from ..contract.answer import Answer
from ..contract.entries import TAKEOVER, Claimed, Entry, Restarted, Started

_SUSPECT = 2
_AGAIN = 2


def failures(history: Iterable[Entry], delivery: Delivery) -> int:
    """How often owners of this job were lost one after another and got no further, up to this delivery.

    It is read from the log, since Redis's own count also rises when the reply of an XAUTOCLAIM is lost and nobody
    has run the job. A claim with the `delivery` of the one before it was a hand-over, which is no failure; one with a
    greater is one failure, whatever the difference. What an owner claims for its own retry is no delivery.

    An owner got further when it added a delta to what stood. One that had to begin the answer again must have come
    twice as far as any before it: where a job kills its worker is not quite the same place each time.
    """
    count, last = 0, None
    answer, most, goal = Answer(), 0, 0
    for entry in history:
        if isinstance(entry, Restarted):
            goal = _AGAIN * most
        elif isinstance(entry, Started | Claimed):
            if len(answer.deltas) > goal:
                count, last = 0, None
            goal = most = max(most, len(answer.deltas))
            if (entry.queue, entry.job) != (delivery.queue, delivery.id):
                count, last = 0, None  # another job of the same request, whose deliveries are its own
            elif isinstance(entry, Started) or entry.reason == TAKEOVER:
                count += _rises(last, entry.delivery)
                last = entry.delivery
        answer.add(entry)
    return 0 if len(answer.deltas) > goal else count + _rises(last, delivery.count)


def goal_of(history: Iterable[Entry]) -> int:
    """How many deltas an answer that begins again must surpass to have got further than before."""
    answer, most = Answer(), 0
    for entry in history:
        if isinstance(entry, Claimed):
            most = max(most, len(answer.deltas))
        answer.add(entry)
    return _AGAIN * max(most, len(answer.deltas))


def is_suspect(failed: int, most: int) -> bool:
    """Whether a job is to run alone; `most` is the number of failures that bury it."""
    return _suspect_from(most) <= failed < most


def is_doubtful(delivery: Delivery, most: int) -> bool:
    """Whether a job may be a suspect, as far as its delivery tells: then its log is looked at before it is read."""
    return delivery.again and delivery.count > _suspect_from(most)


class Quarantine:
    """Lets one suspect run at a time, for at most `longest` seconds: the server that it waits for may be away."""

    def __init__(self, longest: float) -> None:
        self._lock = asyncio.Lock()
        self._longest = longest

    async def wait(self, stop: asyncio.Future[Any], left: float) -> "QuarantineTurn | None":
        """Wait for a turn; nothing when the job is to stop, or its `left` seconds are over, before it comes."""
        waiting = asyncio.ensure_future(self._lock.acquire())
        events: set[asyncio.Future[Any]] = {waiting, stop}
        try:
            await asyncio.wait(events, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        return QuarantineTurn(self._lock, self._longest) if waiting.done() else None


class QuarantineTurn:
    """A suspect's time alone, from before its claim until it has got further or has ended, or had its time."""

    def __init__(self, lock: asyncio.Lock, longest: float) -> None:
        self._lock: asyncio.Lock | None = lock
        self._timer = asyncio.get_running_loop().call_later(longest, self.end)

    def end(self, *_: object) -> None:
        """Let the next one run. May be called again."""
        self._timer.cancel()
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _rises(last: int | None, delivery: int) -> int:
    return int(last is not None and delivery > last)


def _suspect_from(most: int) -> int:
    return max(1, min(_SUSPECT, most - 1))

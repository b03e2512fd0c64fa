"""The writing side of one token log: what its owner has appended, what Redis has accepted, and how it was lost."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from worker.contract.entries import Delta, Fields
from worker.contract.ids import SEAL, EntryId

HIGH_WATER_BYTES = 256 * 1024
"""Above this much that Redis has not accepted, reading from vLLM pauses."""


class LogLost(Exception):
    """The owner may write no more."""


class LogSealed(LogLost):
    """The log has a terminal entry: it was cancelled, or somebody else finished it."""


class LogFenced(LogLost):
    """A later attempt has begun: another owner has taken the request over."""


class LogGone(LogLost):
    """The log is not there: it has expired or was deleted."""


class LogDiverged(LogLost):
    """Redis does not hold what it has acknowledged, as after a failover: the owner must begin a new attempt."""


class LogRefused(LogLost):
    """Redis refuses to write this log for another reason, such as a key of another type."""


class Sink(Protocol):
    """What a log hands its entries to."""

    def wake(self, log: "TokenLog") -> None:
        """The log has entries to write."""


@dataclass(eq=False)
class TokenLog:
    """One owner's end of a log. Appending never waits; `room` and `drained` do."""

    request_id: str
    key: str
    feed: str
    attempt: int
    sink: Sink
    accepted: EntryId = field(init=False)
    lost: asyncio.Future[LogLost] = field(init=False)
    progress: asyncio.Future[None] = field(init=False)
    """Done once Redis has accepted a delta of this owner."""
    _pending: deque[tuple[EntryId, Fields]] = field(init=False, default_factory=deque)
    _bytes: int = field(init=False, default=0)
    _next: int = field(init=False, default=1)
    _waiting: list[asyncio.Future[None]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.accepted = EntryId(self.attempt, 0)
        self.lost = asyncio.get_running_loop().create_future()
        self.progress = asyncio.get_running_loop().create_future()

    def append(self, fields: Fields) -> None:
        """Add an entry with the next id; it goes out with the next flush. Nothing is added to a log that is lost."""
        if self.lost.done():
            return
        self._pending.append((EntryId(self.attempt, self._next), fields))
        self._next += 1
        self._bytes += _size(fields)
        self.sink.wake(self)

    def begin_attempt(self, attempt: int) -> None:
        """Go on under a later attempt, whose first entry Redis has accepted."""
        self.attempt, self.accepted, self._next = attempt, EntryId(attempt, 0), 1
        self._pending.clear()
        self._bytes = 0
        if self.lost.done():
            self.lost = asyncio.get_running_loop().create_future()

    def batch(self, most: int) -> list[tuple[EntryId, Fields]]:
        """Up to `most` entries that Redis has not accepted, oldest first. They stay until `take_accepted`."""
        return [entry for entry, _ in zip(self._pending, range(most), strict=False)]

    def take_accepted(self, upto: EntryId) -> list[tuple[EntryId, Fields]]:
        """Redis holds the log up to this id; gives what is newly accepted."""
        taken = []
        while self._pending and self._pending[0][0] <= upto:
            entry = self._pending.popleft()
            self._bytes -= _size(entry[1])
            taken.append(entry)
        if not self.progress.done() and any(fields["type"] == Delta.type for _, fields in taken):
            self.progress.set_result(None)
        self.accepted = max(self.accepted, upto)
        if not self._pending or self._bytes < HIGH_WATER_BYTES:
            self._release()
        return taken

    def reconcile(self, tail: EntryId | None) -> list[tuple[EntryId, Fields]]:
        """Compare with the last id that Redis has, none in flight; gives what turns out to be accepted."""
        lost = judge(tail, self.attempt, self.accepted)
        if lost is None and tail is not None:
            return self.take_accepted(tail)
        if lost is not None:
            self.lose(lost)
        return []

    def lose(self, reason: LogLost) -> None:
        """The owner writes no more."""
        if not self.lost.done():
            self.lost.set_result(reason)
        self._pending.clear()
        self._bytes = 0
        self._release()

    @property
    def loss(self) -> LogLost | None:
        """Why the owner may write no more, or nothing while it may."""
        return self.lost.result() if self.lost.done() else None

    @property
    def is_full(self) -> bool:
        """Whether reading from vLLM should pause."""
        return self._bytes >= HIGH_WATER_BYTES

    async def room(self) -> None:
        """Wait until there is room for more, or the log is lost."""
        while self.is_full:
            await self._changed()

    async def drained(self) -> None:
        """Wait until Redis has accepted everything.

        Raises:
            LogLost: when it will not.
        """
        while self._pending:
            await self._changed()
        if self.loss is not None:
            raise self.loss

    async def _changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def _release(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()


def judge(tail: EntryId | None, attempt: int, accepted: EntryId) -> LogLost | None:
    """What a log's last id says to an owner of `attempt` that has `accepted` acknowledged; nothing when all is well."""
    if tail is None:
        return LogGone("the log is not there any more")
    if tail == SEAL:
        return LogSealed("the log has its terminal entry")
    if tail.attempt > attempt:
        return LogFenced(f"attempt {tail.attempt} has begun")
    if tail < accepted:
        return LogDiverged(f"Redis holds the log up to {tail}, but has acknowledged {accepted}")
    return None


def _size(fields: Fields) -> int:
    return sum(map(len, fields.values())) + 64

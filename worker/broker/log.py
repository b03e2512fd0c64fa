"""The writing side of one token log: what its owner has appended, what Redis has accepted, and how it was lost."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from worker.contract.entries import Delta, Fields, Restarted
from worker.contract.ids import SEAL, EntryId

Pending: TypeAlias = tuple["TokenLog", int, str, Fields, bytes]
"""An entry on its way: its log, `n` and the whole of its id, its fields, and the command that writes it."""

HIGH_WATER_BYTES = 256 * 1024
"""Above this much of one log that Redis has not accepted, reading its answer from vLLM pauses."""


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

    is_full: bool
    """Whether all its logs together have so much to write that none may read on."""

    def take(self, entries: Sequence[Pending], size: int) -> None:
        """Entries to write, of so many bytes, after all others of their log."""

    def drop(self, log: "TokenLog") -> None:
        """What it has taken of a log need not be written."""

    def relieve(self, size: int) -> None:
        """So many bytes need not be written any more."""


@dataclass(eq=False)
class TokenLog:
    """One owner's end of a log. Appending never waits; `room` and `drained` do."""

    request_id: str
    key: str
    feed: str
    attempt: int
    sink: Sink
    goal: int = 0
    """How many deltas it must surpass to have got on, where the answer begins again."""
    seen: EntryId | None = field(init=False, default=None)
    """What was accepted when the publisher last went through all logs."""
    untold_until: float = field(init=False, default=0.0)
    """Until when the feed is not told of it, since nobody listened; of the monotonic clock, and 0 if somebody may."""
    lost: asyncio.Future[LogLost] = field(init=False)
    progress: asyncio.Future[None] = field(init=False)
    """Done once Redis has accepted a delta of this owner; where the answer began again, more than `goal`."""
    _behind: int = field(init=False, default=0)
    _key: bytes = field(init=False)
    _pending: deque[Pending] = field(init=False, default_factory=deque)
    _bytes: int = field(init=False, default=0)
    _next: int = field(init=False, default=1)
    _accepted: int = field(init=False, default=0)
    _waiting: list[asyncio.Future[None]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()
        self.progress = asyncio.get_running_loop().create_future()
        self._key = b"$%d\r\n%b\r\n" % (len(self.key), self.key.encode())

    def append(self, fields: Fields) -> None:
        """Add an entry with the next id; it goes out with the next flush. Nothing is added to a log that is lost."""
        self.extend([fields])

    def extend(self, entries: Sequence[Fields]) -> None:
        """Add some at once, in this order."""
        if self.lost.done() or not entries:
            return
        attempt, key, size = self.attempt, self._key, 0
        added: list[Pending] = []
        for n, fields in enumerate(entries, self._next):
            entry_id = f"{attempt}-{n}"
            packed = _xadd(key, entry_id, fields)
            added.append((self, n, entry_id, fields, packed))
            size += len(packed)
        self._next += len(added)
        self._pending += added
        self._bytes += size
        self.sink.take(added, size)

    def begin_attempt(self, attempt: int) -> None:
        """Go on under a later attempt, whose first entry Redis has accepted."""
        self.forget()
        self.attempt, self._accepted, self._next = attempt, 0, 1
        self.untold_until = 0.0  # whoever has heard of the attempt by now relies on hearing the rest
        if self.lost.done():
            self.lost = asyncio.get_running_loop().create_future()

    @property
    def accepted(self) -> EntryId:
        """The last entry of this owner that Redis has accepted."""
        return EntryId(self.attempt, self._accepted)

    @property
    def pending(self) -> list[Pending]:
        """What Redis has not accepted, oldest first."""
        return list(self._pending)

    def accept(self, entry: Pending) -> bool:
        """Redis holds an entry, and those before it; false for one that was forgotten meanwhile."""
        pending = self._pending
        if not pending or pending[0] is not entry:
            return False
        pending.popleft()
        size = len(entry[4])
        self._bytes -= size
        self.sink.relieve(size)
        self._accepted = entry[1]
        if not self.progress.done():
            self._look_for_progress(entry[3])
        if self._waiting and (not pending or self._bytes < HIGH_WATER_BYTES):
            self.release()
        return True

    def _look_for_progress(self, fields: Fields) -> None:
        if fields["type"] == Restarted.type:
            self._behind = self.goal
        elif fields["type"] == Delta.type:
            self._behind -= 1
        if self._behind < 0:
            self.progress.set_result(None)

    def reconcile(self, tail: EntryId | None) -> list[Pending]:
        """Compare with the last id that Redis has, none in flight; gives what turns out to be accepted."""
        lost = judge(tail, self.attempt, self.accepted)
        if lost is not None:
            self.lose(lost)
            return []
        return [entry for entry in self.pending if tail is not None and entry[1] <= tail.n and self.accept(entry)]

    def lose(self, reason: LogLost) -> None:
        """The owner writes no more."""
        if not self.lost.done():
            self.lost.set_result(reason)
        self.forget()
        self.release()

    @property
    def loss(self) -> LogLost | None:
        """Why the owner may write no more, or nothing while it may."""
        return self.lost.result() if self.lost.done() else None

    @property
    def is_full(self) -> bool:
        """Whether reading from vLLM should pause."""
        return self._bytes >= HIGH_WATER_BYTES or self.sink.is_full

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

    def forget(self) -> None:
        """Drop what Redis has not accepted."""
        if self._pending:
            self._pending.clear()
            self.sink.drop(self)
        size, self._bytes = self._bytes, 0
        self.sink.relieve(size)

    def release(self) -> None:
        """Have those look again who wait for room, or for the end."""
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


_SHAPES: dict[tuple[str, ...], bytes] = {}


def _xadd(key: bytes, entry_id: str, fields: Fields) -> bytes:
    """The command that adds an entry, as Redis reads it; the key is packed already.

    The names of fields are few, and all our own: what they make of the command is kept.
    """
    names = tuple(fields)
    shape = _SHAPES.get(names)
    if shape is None:
        head = b"*%d\r\n$4\r\nXADD\r\n%%b$10\r\nNOMKSTREAM\r\n$%%d\r\n%%b\r\n" % (4 + 2 * len(names))
        shape = head + b"".join(b"$%d\r\n%b\r\n$%%d\r\n%%b\r\n" % (len(name), name.encode()) for name in names)
        _SHAPES[names] = shape
    parts: list[bytes | int] = [key, len(entry_id), entry_id.encode()]
    for value in fields.values():
        raw = value.encode()
        parts += len(raw), raw
    return shape % tuple(parts)

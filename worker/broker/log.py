"""The writing side of one token log: what its owner has appended, what Redis has accepted, and how it was lost."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TypeAlias

from worker.contract.entries import Delta, Fields, Restarted
from worker.contract.ids import SEAL, EntryId

Pending: TypeAlias = tuple[int, str, Fields, bytes]
"""An entry on its way: `n` and the whole of its id, its fields, and the command that writes it."""

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

    def wake(self, log: "TokenLog", size: int) -> None:
        """The log has an entry of so many bytes to write."""

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
    accepted: EntryId = field(init=False)
    lost: asyncio.Future[LogLost] = field(init=False)
    progress: asyncio.Future[None] = field(init=False)
    """Done once Redis has accepted a delta of this owner; where the answer began again, more than `goal`."""
    _behind: int = field(init=False, default=0)
    _key: bytes = field(init=False)
    _pending: deque[Pending] = field(init=False, default_factory=deque)
    _bytes: int = field(init=False, default=0)
    _next: int = field(init=False, default=1)
    _waiting: list[asyncio.Future[None]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.accepted = EntryId(self.attempt, 0)
        self.lost = asyncio.get_running_loop().create_future()
        self.progress = asyncio.get_running_loop().create_future()
        self._key = b"$%d\r\n%b\r\n" % (len(self.key), self.key.encode())

    def append(self, fields: Fields) -> None:
        """Add an entry with the next id; it goes out with the next flush. Nothing is added to a log that is lost."""
        if self.lost.done():
            return
        entry_id = f"{self.attempt}-{self._next}"
        packed = _xadd(self._key, entry_id, fields)
        self._pending.append((self._next, entry_id, fields, packed))
        self._next += 1
        self._bytes += len(packed)
        self.sink.wake(self, len(packed))

    def begin_attempt(self, attempt: int) -> None:
        """Go on under a later attempt, whose first entry Redis has accepted."""
        self.attempt, self.accepted, self._next = attempt, EntryId(attempt, 0), 1
        self.forget()
        if self.lost.done():
            self.lost = asyncio.get_running_loop().create_future()

    def batch(self, most: int) -> list[Pending]:
        """Up to `most` entries that Redis has not accepted, oldest first. They stay until `take_accepted`."""
        return list(islice(self._pending, most))

    @property
    def has_more(self) -> bool:
        """Whether there is something that Redis has not accepted."""
        return bool(self._pending)

    def take_accepted(self, upto: int) -> list[Pending]:
        """Redis holds the attempt up to this `n`; gives what is newly accepted."""
        pending, taken, size = self._pending, [], 0
        while pending and pending[0][0] <= upto:
            entry = pending.popleft()
            size += len(entry[-1])
            taken.append(entry)
        self._bytes -= size
        self.sink.relieve(size)
        if not self.progress.done():
            self._look_for_progress(taken)
        self.accepted = max(self.accepted, EntryId(self.attempt, upto))
        if self._waiting and (not pending or self._bytes < HIGH_WATER_BYTES):
            self.release()
        return taken

    def _look_for_progress(self, taken: list[Pending]) -> None:
        for _, _, fields, _ in taken:
            if fields["type"] == Restarted.type:
                self._behind = self.goal
            elif fields["type"] == Delta.type:
                self._behind -= 1
        if self._behind < 0:
            self.progress.set_result(None)

    def reconcile(self, tail: EntryId | None) -> list[Pending]:
        """Compare with the last id that Redis has, none in flight; gives what turns out to be accepted."""
        lost = judge(tail, self.attempt, self.accepted)
        if lost is None and tail is not None:
            return self.take_accepted(tail.n)
        if lost is not None:
            self.lose(lost)
        return []

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
        self._pending.clear()
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

"""The writing side of one token log: what its owner has appended, what Redis has accepted, and how it was lost."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TypeAlias

from ..contract.entries import Delta, Fields, Restarted
from ..contract.ids import SEAL, EntryId
from ..redisio.errors import redacted_message

AppendBatch: TypeAlias = tuple["LogWriter", int, list[Fields], bytes]
"""Entries that were appended together: their log, `n` of the first, their fields, and the commands that write them."""

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


class LogOver(LogGone):
    """The log is not there and is not to be made anew: its request has ended, or its time is over."""


class LogDiverged(LogLost):
    """Redis does not hold what it has acknowledged, as after a failover: the owner must begin a new attempt."""


class LogExhausted(LogLost):
    """No attempt can follow the last one of the log: somebody has written an id of the greatest there are."""


class LogRefused(LogLost):
    """A key of another type stands in the log's place: the only refusal of Redis that is of one log alone."""


class EntrySink(Protocol):
    """What a log hands its entries to."""

    is_full: bool
    """Whether all its logs together have so much to write that none may read on."""

    def enqueue(self, run: AppendBatch) -> None:
        """Entries to write, after all others of their log."""

    def dequeue(self, log: "LogWriter") -> None:
        """What it has taken of a log need not be written."""

    def release_bytes(self, size: int) -> None:
        """So many bytes need not be written any more."""


@dataclass(eq=False, slots=True)
class LogWriter:
    """One owner's end of a log. Appending never waits; `room` and `drained` do."""

    request_id: str
    key: str
    feed: str
    attempt: int
    sink: EntrySink
    entries_before: int = 0
    """How many entries Redis had of the log when the attempt began."""
    deltas_to_pass: int = 0
    """How many deltas it must surpass to have got on, where the answer begins again."""
    accepted_at_check: EntryId | None = field(init=False, default=None)
    """What was accepted when the publisher last went through all logs."""
    feed_idle_until: float = field(init=False, default=0.0)
    """Until when the feed is not told of it, since nobody listened; of the monotonic clock, and 0 if somebody may."""
    lost: asyncio.Future[LogLost] = field(init=False)
    loss: LogLost | None = field(init=False, default=None)
    """Why the owner may write no more, or nothing while it may."""
    progress: asyncio.Future[None] = field(init=False)
    """Done once Redis has accepted a delta of this owner; where the answer began again, more than `goal`."""
    _behind: int = field(init=False, default=0)
    """Deltas that Redis had accepted before, and more; below 0 once there is progress."""
    _key: str = field(init=False)
    _pending: deque[AppendBatch] = field(init=False, default_factory=deque)
    _bytes: int = field(init=False, default=0)
    _next: int = field(init=False, default=1)
    _accepted: int = field(init=False, default=0)
    _waiting: tuple[asyncio.Future[None], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()
        self.progress = asyncio.get_running_loop().create_future()
        self._key = f"${len(self.key.encode())}\r\n{self.key}\r\n$10\r\nNOMKSTREAM\r\n$"

    def append(self, fields: Fields) -> None:
        """Add an entry with the next id; it goes out with the next flush. Nothing is added to a log that is lost."""
        self.extend([fields])

    def extend(self, entries: list[Fields]) -> None:
        """Add some at once, in this order. The list is the log's from now on."""
        if self.loss is not None or not entries:
            return
        run = self._run(self._next, entries)
        self._next += len(entries)
        self._pending.append(run)
        self._bytes += len(run[3])
        self.sink.enqueue(run)

    def _run(self, first: int, entries: list[Fields]) -> AppendBatch:
        return self, first, entries, _xadds(self._key, self.attempt, first, entries)

    def begin_attempt(self, attempt: int, before: int) -> None:
        """Go on under a later attempt, whose first entry Redis has accepted, after so many others."""
        self.discard_pending()
        self.attempt, self.entries_before, self._accepted, self._next = attempt, before, 0, 1
        self.feed_idle_until = 0.0  # whoever has heard of the attempt by now relies on hearing the rest
        if self.loss is not None:
            self.loss = None
            self.lost = asyncio.get_running_loop().create_future()

    @property
    def accepted(self) -> EntryId:
        """The last entry of this owner that Redis has accepted."""
        return EntryId(self.attempt, self._accepted)

    @property
    def length(self) -> int:
        """How many entries Redis must have of the log."""
        return self.entries_before + 1 + self._accepted

    @property
    def pending(self) -> list[AppendBatch]:
        """What Redis has not accepted, oldest first."""
        return list(self._pending)

    @property
    def pending_bytes(self) -> int:
        """Bytes of what Redis has not accepted, as commands."""
        return self._bytes

    def accept(self, run: AppendBatch) -> bool:
        """Redis holds these entries, and those before them; false where they were forgotten meanwhile."""
        pending = self._pending
        if not pending or pending[0] is not run:
            return False
        pending.popleft()
        _, first, entries, packed = run
        size = len(packed)
        self._bytes -= size
        self.sink.release_bytes(size)
        self._accepted = first + len(entries) - 1
        if self._behind >= 0:
            self._look_for_progress(entries)
        if self._waiting and (not pending or self._bytes < HIGH_WATER_BYTES):
            self.wake_waiters()
        return True

    def _look_for_progress(self, entries: list[Fields]) -> None:
        for fields in entries:
            if fields["type"] == Restarted.type:
                self._behind = self.deltas_to_pass
            elif fields["type"] == Delta.type:
                self._behind -= 1
            if self._behind < 0:
                self.progress.set_result(None)
                break

    def reconcile(self, tail: EntryId | None) -> list[AppendBatch]:
        """Compare with the last id that Redis has, none in flight; gives what turns out to be accepted."""
        lost = judge(tail, self.attempt, self.accepted)
        if lost is None and tail is not None and tail.n >= self._next:
            lost = LogDiverged(f"Redis holds the log up to {tail}, which its owner has not written")
        if lost is not None:
            self.mark_lost(lost)
            return []
        accepted: list[AppendBatch] = []
        while tail is not None and self._pending and self._pending[0][1] <= tail.n:
            self._part(tail.n)
            accepted.append(self._pending[0])
            self.accept(self._pending[0])
        return accepted

    def _part(self, n: int) -> None:
        """Make two of the first run where it goes on after `n`."""
        _, first, entries, _ = self._pending[0]
        there = n + 1 - first
        if there < len(entries):
            self._pending[0] = self._run(n + 1, entries[there:])
            self._pending.appendleft(self._run(first, entries[:there]))

    def mark_lost(self, reason: LogLost) -> None:
        """The owner writes no more."""
        if self.loss is None:
            self.loss = reason
            self.lost.set_result(reason)
        self.discard_pending()
        self.wake_waiters()

    @property
    def is_full(self) -> bool:
        """Whether reading from vLLM should pause."""
        return self._bytes >= HIGH_WATER_BYTES or self.sink.is_full

    async def wait_for_room(self) -> None:
        """Wait until there is room for more, or the log is lost."""
        while self.is_full:
            await self._changed()

    async def wait_drained(self) -> None:
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
        self._waiting += (waiter,)
        await waiter

    def discard_pending(self) -> None:
        """Drop what Redis has not accepted."""
        if self._pending:
            self._pending.clear()
            self.sink.dequeue(self)
        size, self._bytes = self._bytes, 0
        self.sink.release_bytes(size)

    def wake_waiters(self) -> None:
        """Have those look again who wait for room, or for the end."""
        waiting, self._waiting = self._waiting, ()
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)


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


def refusal_of(error: BaseException) -> LogRefused | None:
    """What an error of Redis says of the log that was asked for; nothing when it says nothing of that log.

    All else that Redis refuses (a right, a write, a command) is no job's fault, and may pass.
    """
    said = redacted_message(error)
    return LogRefused(said) if said.startswith("WRONGTYPE") else None


def refused_in(batch: list[AppendBatch], verdicts: list[object]) -> dict[LogWriter, list[object]]:
    """What Redis said to each log of which it refused an entry, from that one on.

    Of such a log nothing counts as accepted that was in the same MULTI: if there is any, its end will show it.
    """
    refused: dict[LogWriter, list[object]] = {}
    said = iter(verdicts)
    for log, _, entries, _ in batch:
        for verdict in islice(said, len(entries)):
            if log in refused:
                refused[log].append(verdict)
            elif not isinstance(verdict, bytes):
                refused[log] = [verdict]
    return refused


_HEADS = [f"*{4 + 2 * count}\r\n$4\r\nXADD\r\n" for count in range(32)]
"""By the number of fields; no entry has half as many."""
_SIZES = [f"{size}\r\n" for size in range(256)]
_NAMES: dict[str, str] = {}
"""Names of fields, packed. They are few, and all our own."""


def _xadds(key: str, attempt: int, first: int, entries: list[Fields]) -> bytes:
    """The commands that add entries, as Redis reads them; the key is packed already.

    Joined from pieces of text that are there, and encoded once: at four fifths of the price of a format, at half that
    of hiredis's `pack_command`.
    """
    parts: list[str] = []
    for n, fields in enumerate(entries, first):
        entry_id = f"{attempt}-{n}"
        parts += _HEADS[len(fields)], key, _SIZES[len(entry_id)], entry_id
        for name, value in fields.items():
            length = len(value) if value.isascii() else len(value.encode())
            size = _SIZES[length] if length < len(_SIZES) else f"{length}\r\n"
            parts += _NAMES.get(name) or _packed_name(name), size, value
        parts.append("\r\n")
    return "".join(parts).encode()


def _packed_name(name: str) -> str:
    packed = _NAMES[name] = f"\r\n${len(name)}\r\n{name}\r\n$"
    return packed

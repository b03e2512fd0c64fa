"""Reads logs from any entry on: for many followers in one write, or for one follower with a blocking XREAD.

The bytes of a page are limited by an estimate, since Redis limits only the number of entries. `holes.py` finds missing
entries.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeAlias, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..broker.client_seals import end_overdue
from ..broker.log_pages import PageSize
from ..contract.entries import AnyEntry, BadEntry, Queued, Restarted, Resumed, parse, parse_leniently
from ..contract.ids import BEFORE_ALL, QUEUED, SEAL, EntryId, follows
from ..contract.keys import Keys
from ..contract.records import Lifecycle
from ..redisio.batching import CommandBatcher
from ..redisio.errors import is_transient
from ..redisio.pipelined import pack
from .errors import (
    MAPPED,
    ClientError,
    IncompleteLog,
    MappedRetry,
    Refused,
    Unavailable,
    UnknownRequest,
    mapped,
    missing_log_error,
)
from .following.machine import Page
from .holes import find_hole
from .timings import Timings

_T = TypeVar("_T")
_Raw: TypeAlias = tuple[bytes, list[bytes]]
"""An entry as Redis sends it: its id, and the names and values of its fields in turn."""
_Streams: TypeAlias = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]
"""The reply to an XREAD, as redis-py returns it."""


class LogReader:
    """Reads the logs of one prefix. Every read is retried until Redis answers or `retry` gives up.

    One connection of `commands` to each server is used for all reads together. `blocking` has one connection for each
    XREAD that waits.
    """

    def __init__(self, commands: Redis, blocking: Redis, keys: Keys, retry: MappedRetry, timings: Timings) -> None:
        self.is_closed = False
        self.timings = timings
        self._keys = keys
        self._retry = retry
        self._batcher = CommandBatcher(commands)
        self._blocking = blocking

    async def read(
        self, request_id: str, after: EntryId, size: PageSize, *, must_exist: bool = False, is_first: bool = False
    ) -> Page | None:
        """Read the entries of a log after the entry `after`. Returns None if there are none.

        With `must_exist` the log must exist; with `is_first` the log and the entry `after` must. If entries or `after`
        are missing, and the log has no seal yet, the page ends before the hole: a worker that notices the hole restarts
        the answer, or resumes it from before the hole.

        Raises:
            UnknownRequest: when the log must exist and the request is unknown.
            Expired: when the log must exist, but the request has ended and its log has expired.
            IncompleteLog: when `after` must exist and does not, and the log has ended.
            Unavailable: when Redis does not answer, or the reader is closed.
        """
        is_cursor = is_first and after != BEFORE_ALL
        if must_exist or is_first:
            tombstone, raw, exists = await self._retry(self._read_checked, request_id, after, size, inclusive=is_cursor)
            if not raw and not exists:
                raise missing_log_error(request_id, tombstone)
        else:
            raw = await self._retry(self._read_entries, request_id, after, size)
        is_full = len(raw) == size.entries
        if is_full:
            size.learn(len(raw), sum([sum(map(len, flat)) for _, flat in raw]))
        if is_cursor:
            if raw and EntryId.parse(raw[0][0]) == after:
                if len(raw) == 1:
                    return Page((), after, is_full, _queued(raw[0][0], _fields(raw[0][1])))
                del raw[0]
            else:
                # A follower whose entry is missing can continue if the log has the very next entry, or if all entries
                # after the missing one are void.
                found = EntryId.parse(raw[0][0]) if raw else None
                is_next = found and found.attempt <= max(1, after.attempt) and follows(found, after)
                if not is_next and not (await self._is_void(request_id, after, is_cursor=True) and found):
                    return Page((), after, is_full=False, is_at_hole=True)
        elif not raw and (must_exist or is_first) and after == BEFORE_ALL:  # the log exists and is empty
            await self._is_void(request_id, after)
            return Page((), after, is_full=False, is_at_hole=True)
        return await self._page(request_id, after, raw, _fields, is_full=is_full) if raw else None

    async def poll(self, request_id: str, after: EntryId, size: PageSize) -> Page | None:
        """Wait some seconds for entries after the entry `after`, with a blocking XREAD. Returns None if none came.

        Raises the errors of `read` with `must_exist`.
        """
        streams = await self._retry(self._xread, self._keys.tokens(request_id), after, size)
        if not streams:
            return await self.read(request_id, after, size, must_exist=True)
        raw = streams[0][1]
        is_full = len(raw) == size.entries
        if is_full:
            size.learn(len(raw), sum([sum(map(len, chain(*fields.items()))) for _, fields in raw]))
        return await self._page(request_id, after, raw, _unchanged, is_full=is_full)

    async def check(self, request_id: str, after: EntryId, wait: float = 0.0) -> None:
        """Check that a log can be read after the entry `after`. A log that does not exist has `wait` seconds to appear.

        Raises the errors of `read` with `is_first`, and `Unreadable` when the next entry cannot be read.
        """
        until, pause = asyncio.get_running_loop().time() + wait, self.timings.first_pause
        while True:
            try:
                page = await self.read(request_id, after, PageSize(1), is_first=True)
            except UnknownRequest:
                left = until - asyncio.get_running_loop().time()
                if left <= 0:
                    raise
                await asyncio.sleep(min(pause, left))
                pause = min(2 * pause, self.timings.longest_pause)
            else:
                next(iter(page.entries if page else ()), None)
                return

    async def end_overdue(self, request_id: str) -> bool:
        """Seal a log that holds only `queued` and whose deadline has passed. Returns whether it did.

        There is only one try: while Redis is full or unavailable, the log can still be followed, and a follower tries
        again later.

        Raises:
            Refused: when the deadline has passed and this user may not write the end.
            Unavailable: when the reader is closed.
        """
        self._check_open()
        try:
            return await end_overdue(self._blocking, self._keys, request_id)
        except MAPPED as error:
            if is_transient(error):
                return False
            if isinstance(reason := mapped(error), Refused):
                raise Refused(
                    f"the deadline of request {request_id} passed before a worker took it, and this user may not write "
                    f"that end to its log. {reason}"
                ) from error
            raise reason from error

    async def lifecycle(self, after: EntryId) -> AsyncGenerator[Lifecycle]:
        """Yield every record of the lifecycle after an id, and those that are added later.

        Raises:
            Unavailable: when Redis does not answer, or the reader is closed.
        """
        size = PageSize()
        try:
            while True:
                for _, records in await self._retry(self._xread, self._keys.lifecycle, after, size):
                    if len(records) == size.entries:
                        size.learn(len(records), sum([sum(map(len, chain(*fields.items()))) for _, fields in records]))
                    for record_id, fields in records:
                        yield Lifecycle.read(record_id.decode(), fields)
                    after = EntryId.parse(records[-1][0])
        finally:
            if self.is_closed:  # the read may have connected while the reader was closed
                await self._blocking.aclose()

    async def aclose(self) -> None:
        """Close the connections. Every current and later read raises `Unavailable`."""
        self.is_closed = True
        await self._batcher.aclose()
        await self._blocking.aclose()

    async def _page(
        self, request_id: str, after: EntryId, raw: "Sequence[tuple[bytes, _T]]",
        fields_of: "Callable[[_T], Mapping[bytes, bytes]]", *, is_full: bool,
    ) -> Page:  # fmt: skip
        """Return a page of entries. It ends before the first hole, unless later entries make the missing ones void.

        If the log has ended, iterating over the page raises `IncompleteLog` at the hole.
        """
        last = EntryId.parse(raw[-1][0])
        if (hole := find_hole(after, raw, fields_of)) is not None:
            number, before = hole
            entries = _parsed(raw[:number], fields_of)
            try:
                if not await self._is_void(request_id, before):
                    return Page(entries, before, is_full=False, is_at_hole=True)
            except IncompleteLog as error:
                return Page(chain(entries, _raise(error)), last, is_full)
        return Page(_parsed(raw, fields_of), last, is_full, _queued(raw[-1][0], fields_of(raw[-1][1])))

    async def _is_void(self, request_id: str, before: EntryId, *, is_cursor: bool = False) -> bool:
        """Whether a later entry (`restarted` or `resumed`) makes the entries void that are missing after `before`.

        Such an entry is one of the first two of an attempt, so two entries of each attempt are read.

        Raises:
            IncompleteLog: when no entry does, and the request has ended.
            UnknownRequest, Expired: when the log is gone.
        """
        place, count = before, 2
        while place != SEAL:  # Redis refuses a range that begins after the greatest id
            tombstone, raw, exists = await self._retry(self._read_all, request_id, place, count, inclusive=False)
            if not raw and not exists:
                raise missing_log_error(request_id, tombstone)
            for entry_id, flat in raw:
                entry = parse_leniently(entry_id, _fields(flat))
                if isinstance(entry, Restarted) or (
                    isinstance(entry, Resumed) and EntryId.parse(entry.after) <= before
                ):
                    return True
                if entry.id == SEAL:
                    raise IncompleteLog(request_id, before, is_cursor=is_cursor)
            if len(raw) < count:
                if tombstone is not None:  # the tombstone is written with the seal, which was deleted
                    break
                return False
            attempt = EntryId.parse(raw[0][0]).attempt
            place = EntryId(attempt, SEAL.n - (attempt == SEAL.attempt))
        raise IncompleteLog(request_id, before, is_cursor=is_cursor)

    async def _read_entries(self, request_id: str, after: EntryId, size: PageSize) -> list[_Raw]:
        self._check_open()
        key = self._keys.tokens(request_id)
        with _shrinking_on_timeout(size):
            (raw,) = await self._batcher.execute(key, _xrange(key, after, size.entries, inclusive=False), 1)
        return cast("list[_Raw]", raw)

    async def _read_checked(
        self, request_id: str, after: EntryId, size: PageSize, *, inclusive: bool
    ) -> tuple[bytes | None, list[_Raw], bool]:
        with _shrinking_on_timeout(size):
            return await self._read_all(request_id, after, size.entries, inclusive=inclusive)

    async def _read_all(
        self, request_id: str, after: EntryId, count: int, *, inclusive: bool
    ) -> tuple[bytes | None, list[_Raw], bool]:
        """Read the tombstone, up to `count` entries after the entry `after`, and whether the log exists.

        The tombstone is read first. It is written with the seal, so a request without a tombstone has a log to read
        afterwards, unless the request is unknown.
        """
        self._check_open()
        key = self._keys.tokens(request_id)
        get = pack(b"GET", self._keys.ended(request_id).encode())
        xrange = _xrange(key, after, count, inclusive=inclusive)
        packed = get + xrange + pack(b"EXISTS", key.encode())
        tombstone, raw, exists = await self._batcher.execute(key, packed, 3)
        return tombstone, cast("list[_Raw]", raw), bool(exists)

    async def _xread(self, key: str, after: EntryId, size: PageSize) -> _Streams:
        self._check_open()
        with _shrinking_on_timeout(size):
            block = int(self.timings.block * 1000)
            streams = await self._blocking.xread({key: str(after)}, count=size.entries, block=block)
        return cast("_Streams", streams)

    def _check_open(self) -> None:
        if self.is_closed:
            raise Unavailable("the client is closed")


@contextmanager
def _shrinking_on_timeout(size: PageSize) -> Iterator[None]:
    """Make the next page smaller if this one does not arrive in time."""
    try:
        yield
    except RedisTimeoutError:
        size.shrink()
        raise


def _xrange(key: str, after: EntryId, count: int, *, inclusive: bool) -> bytes:
    start = b"%d-%d" if inclusive else b"(%d-%d"
    return pack(b"XRANGE", key.encode(), start % after, b"+", b"COUNT", b"%d" % count)


def _parsed(raw: Sequence[tuple[bytes, _T]], fields_of: Callable[[_T], Mapping[bytes, bytes]]) -> Iterator[AnyEntry]:
    try:
        for entry_id, fields in raw:
            yield parse(entry_id, fields_of(fields))
    except BadEntry as error:
        raise mapped(error) from error


def _queued(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Queued | None:
    entry = parse_leniently(entry_id, fields) if EntryId.parse(entry_id) == QUEUED else None
    return entry if isinstance(entry, Queued) else None


def _fields(flat: list[bytes]) -> dict[bytes, bytes]:
    each = iter(flat)
    return dict(zip(each, each, strict=True))


def _unchanged(fields: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return fields


def _raise(error: ClientError) -> Iterator[AnyEntry]:
    yield from ()
    raise error

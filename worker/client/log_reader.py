"""Reading requests' logs on from a place: as many as want to at once, together, or by an XREAD that waits.

Logs are read in pages of so many bytes, as far as that can be known: Redis counts entries. What entries a page lacks
shows in their ids.
"""

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from ..redisio.clients import blocking_client
from ..redisio.errors import is_transient
from ..redisio.pipelined import pack
from .errors import MAPPED, ClientError, IncompleteLog, Refused, Unavailable, UnknownRequest, gone, mapped
from .patience import Patience

_BLOCK = 5.0
"""Seconds that a blocking XREAD waits."""

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5
"""Seconds from one look for a log that is not there yet, or for the end of a hole, to the next."""

_T = TypeVar("_T")
_Raw: TypeAlias = tuple[bytes, list[bytes]]
_Streams: TypeAlias = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]


@dataclass(frozen=True, slots=True)
class Page:
    """What came next in a log."""

    entries: Iterable[AnyEntry]
    """They are parsed while they are taken, which raises `Unreadable` where one cannot be."""
    last: EntryId
    is_full: bool
    """Whether there may be more already."""
    queued: Queued | None = None
    """Where that is all there is so far."""
    is_at_hole: bool = False
    """Whether entries are missing after `last` that a log without a seal may still call void."""


class LogReader:
    """The logs of one namespace. Every question is repeated until Redis answers or patience ends."""

    def __init__(self, url: str, redis: Redis, keys: Keys, patience: Patience) -> None:
        self.is_closed = False
        self._keys = keys
        self._patience = patience
        self._together = CommandBatcher(redis)
        self._reader = blocking_client(url, _BLOCK)

    async def read(
        self, request_id: str, after: EntryId, size: PageSize, *, alive: bool = False, first: bool = False
    ) -> Page | None:
        """What a log has after a place, if anything; if `alive`, the log has to be there.

        If this is the `first` reading, both the log and the place have to be there. Where entries are missing, or the
        place is, and the log has no seal yet, the page ends before the hole: a worker that notices it begins again.

        Raises:
            UnknownRequest: when it has to be and nothing is known of the request.
            Expired: when it has to be, but the request has ended and its log is gone.
            IncompleteLog: when the place has to be there, is not, and the log has ended.
            Unavailable: when Redis does not answer, or this is closed.
        """
        is_cursor = first and after != BEFORE_ALL
        ask = partial(self._ask, request_id, after, size, alive=alive or first, inclusive=is_cursor)
        raw = await self._patience.retry(partial(_shrinking, size, ask))
        is_full = len(raw) == size.entries
        if is_full:
            size.learn(len(raw), sum([sum(map(len, flat)) for _, flat in raw]))
        if is_cursor:
            if raw and EntryId.parse(raw[0][0]) == after:
                if len(raw) == 1:
                    return Page((), after, is_full, _queued(raw[0][0], _fields(raw[0][1])))
                del raw[0]
            elif not (await self._goes_on(request_id, after, EntryId.parse(raw[0][0]) if raw else None)):
                return Page((), after, is_full=False, is_at_hole=True)
        elif not raw and (alive or first) and after == BEFORE_ALL:  # the log is there, and empty
            await self._is_void(request_id, after)
            return Page((), after, is_full=False, is_at_hole=True)
        return await self._page(request_id, after, raw, _fields, is_full=is_full) if raw else None

    async def wait(self, request_id: str, after: EntryId, size: PageSize) -> Page | None:
        """Wait some seconds for what comes after a place, as anybody can: with an XREAD of one's own.

        Raises what `read` does, where the log has to be there.
        """
        ask = partial(self._xread, self._keys.tokens(request_id), after, size)
        streams = await self._patience.retry(partial(_shrinking, size, ask))
        if not streams:
            return await self.read(request_id, after, size, alive=True)
        raw = streams[0][1]
        is_full = len(raw) == size.entries
        if is_full:
            size.learn(len(raw), sum([sum(map(len, chain(*fields.items()))) for _, fields in raw]))
        return await self._page(request_id, after, raw, _as_it_is, is_full=is_full)

    async def check(self, request_id: str, after: EntryId, wait: float = 0.0) -> None:
        """See whether a log can be read on from a place; one that is not there yet has `wait` seconds to appear.

        Raises what `read` does, where it is the first reading, and `BadEntry` when the next entry cannot be read.
        """
        until, pause = asyncio.get_running_loop().time() + wait, FIRST_PAUSE
        while True:
            try:
                page = await self.read(request_id, after, PageSize(1), first=True)
            except UnknownRequest:
                left = until - asyncio.get_running_loop().time()
                if left <= 0:
                    raise
                await asyncio.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                next(iter(page.entries if page else ()), None)
                return

    async def _page(
        self, request_id: str, after: EntryId, raw: "Sequence[tuple[bytes, _T]]",
        fields_of: "Callable[[_T], Mapping[bytes, bytes]]", *, is_full: bool,
    ) -> Page:  # fmt: skip
        """A page of these entries; where some are missing among them that count, it ends before the hole.

        If the log has ended, an `IncompleteLog` comes there.
        """
        last = EntryId.parse(raw[-1][0])
        if (gap := _gap(after, raw, fields_of)) is not None:
            number, before = gap
            entries = _parsed(raw[:number], fields_of)
            try:
                if not await self._is_void(request_id, before):
                    return Page(entries, before, is_full=False, is_at_hole=True)
            except IncompleteLog as error:
                return Page(chain(entries, _raise(error)), last, is_full)
        return Page(_parsed(raw, fields_of), last, is_full, _queued(raw[-1][0], fields_of(raw[-1][1])))

    async def end_overdue(self, request_id: str) -> bool:
        """Seal a log that holds nothing but `queued` and whose deadline has passed; whether it was.

        It is tried once: a Redis that is full or away is no reason not to read on, and a follower looks again.

        Raises:
            Refused: when it is overdue and this user may not write the end.
            Unavailable: when this is closed.
        """
        self._check_open()
        try:
            return await end_overdue(self._reader, self._keys, request_id)
        except MAPPED as error:
            if is_transient(error):
                return False
            if isinstance(reason := mapped(error), Refused):
                raise Refused(
                    f"the deadline of request {request_id} passed before a worker took it, and this user may not write "
                    f"that end to its log. {reason}"
                ) from error
            raise reason from error

    async def _goes_on(self, request_id: str, after: EntryId, found: EntryId | None) -> bool:
        """Whether somebody who has a log up to a place that is not there can go on with what is found behind it.

        Raises what `_is_void` does.
        """
        is_next = found is not None and found.attempt <= max(1, after.attempt) and follows(found, after)
        return is_next or (await self._is_void(request_id, after, is_cursor=True) and found is not None)

    async def _is_void(self, request_id: str, before: EntryId, *, is_cursor: bool = False) -> bool:
        """Whether nothing of what is missing after an entry counts: the log says later that it is void.

        That stands at the beginning of an attempt, and so two entries of each are read.

        Raises:
            IncompleteLog: when it does not say so and never will, for the request has ended.
            UnknownRequest, Expired: when the log is gone.
        """
        place, size = before, PageSize(2)
        while place != SEAL:  # Redis refuses to be asked for what comes after it
            look = partial(self._look, request_id, place, size, inclusive=False)
            stone, raw, is_there = await self._patience.retry(look)
            if not raw and not is_there:
                raise gone(request_id, stone)
            for entry_id, flat in raw:
                entry = parse_leniently(entry_id, _fields(flat))
                if isinstance(entry, Restarted) or (
                    isinstance(entry, Resumed) and EntryId.parse(entry.after) <= before
                ):
                    return True
                if entry.id == SEAL:
                    raise IncompleteLog(request_id, before, is_cursor=is_cursor)
            if len(raw) < size.entries:
                if stone is not None:  # it is written with the seal, which somebody has deleted
                    break
                return False
            attempt = EntryId.parse(raw[0][0]).attempt
            place = EntryId(attempt, SEAL.n - (attempt == SEAL.attempt))
        raise IncompleteLog(request_id, before, is_cursor=is_cursor)

    async def lifecycle(self, after: EntryId) -> AsyncGenerator[Lifecycle]:
        """Every line of the lifecycle after a place, and those that come.

        Raises:
            Unavailable: when Redis does not answer, or this is closed.
        """
        size = PageSize()
        while True:
            ask = partial(self._xread, self._keys.lifecycle, after, size)
            for _, lines in await self._patience.retry(partial(_shrinking, size, ask)):
                if len(lines) == size.entries:
                    size.learn(len(lines), sum([sum(map(len, chain(*fields.items()))) for _, fields in lines]))
                for line, fields in lines:
                    yield Lifecycle.read(line.decode(), fields)
                after = EntryId.parse(lines[-1][0])

    async def aclose(self) -> None:
        """Close the connections; whoever reads, or will, gets `Unavailable`."""
        self.is_closed = True
        await self._together.aclose()
        await self._reader.aclose()

    async def _ask(
        self, request_id: str, after: EntryId, size: PageSize, *, alive: bool, inclusive: bool
    ) -> list[_Raw]:
        if alive:
            stone, raw, is_there = await self._look(request_id, after, size, inclusive=inclusive)
            if not raw and not is_there:
                raise gone(request_id, stone)
            return raw
        self._check_open()
        key = self._keys.tokens(request_id)
        (raw,) = await self._together.execute(key, _xrange(key, after, size, inclusive=inclusive), 1)
        return cast("list[_Raw]", raw)

    async def _look(
        self, request_id: str, after: EntryId, size: PageSize, *, inclusive: bool
    ) -> tuple[bytes | None, list[_Raw], bool]:
        """The tombstone, what the log has after a place, and whether the log is there.

        The tombstone is read first: it is written with the seal, and so a request without one has a log to be read
        after it, unless nothing is known of it.
        """
        self._check_open()
        key = self._keys.tokens(request_id)
        ended = pack(b"GET", self._keys.ended(request_id).encode())
        read = _xrange(key, after, size, inclusive=inclusive)
        stone, raw, is_there = await self._together.execute(key, ended + read + pack(b"EXISTS", key.encode()), 3)
        return stone, cast("list[_Raw]", raw), bool(is_there)

    async def _xread(self, key: str, after: EntryId, size: PageSize) -> _Streams:
        self._check_open()
        streams = await self._reader.xread({key: str(after)}, count=size.entries, block=int(_BLOCK * 1000))
        return cast("_Streams", streams)

    def _check_open(self) -> None:
        if self.is_closed:
            raise Unavailable("the client is closed")


def _xrange(key: str, after: EntryId, size: PageSize, *, inclusive: bool) -> bytes:
    since = b"%d-%d" if inclusive else b"(%d-%d"
    return pack(b"XRANGE", key.encode(), since % after, b"+", b"COUNT", b"%d" % size.entries)


def _parsed(raw: Sequence[tuple[bytes, _T]], fields_of: Callable[[_T], Mapping[bytes, bytes]]) -> Iterator[AnyEntry]:
    try:
        for entry_id, told in raw:
            yield parse(entry_id, fields_of(told))
    except BadEntry as error:
        raise mapped(error) from error


def _queued(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Queued | None:
    entry = parse_leniently(entry_id, fields) if EntryId.parse(entry_id) == QUEUED else None
    return entry if isinstance(entry, Queued) else None


def _fields(flat: list[bytes]) -> dict[bytes, bytes]:
    each = iter(flat)
    return dict(zip(each, each, strict=True))


def _as_it_is(fields: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return fields


async def _shrinking(size: PageSize, ask: Callable[[], Awaitable[_T]]) -> _T:
    try:
        return await ask()
    except RedisTimeoutError:
        size.shrink()
        raise


def _raise(error: ClientError) -> Iterator[AnyEntry]:
    yield from ()
    raise error


def _gap(
    after: EntryId, raw: Sequence[tuple[bytes, _T]], fields_of: Callable[[_T], Mapping[bytes, bytes]]
) -> tuple[int, EntryId] | None:
    """The number of the first entry before which others are missing, and the id of the entry before these.

    Ids go up, so it is enough to look where each attempt begins and ends.
    """
    number, before = 0, after
    while number < len(raw):
        first = EntryId.parse(raw[number][0])
        if not follows(first, before) or (first == SEAL and _knows_more(fields_of(raw[number][1]), before)):
            return number, before
        end = bisect_right(raw, first.attempt, lo=number, key=lambda entry: EntryId.parse(entry[0]).attempt)
        if first != SEAL and EntryId.parse(raw[end - 1][0]) == SEAL:  # which is in no attempt, whatever its number
            end -= 1
        before = EntryId.parse(raw[end - 1][0])
        if before.n - first.n != end - 1 - number:
            ids = [EntryId.parse(entry_id) for entry_id, _ in raw[number:end]]
            at = next(at for at, entry_id in enumerate(ids) if entry_id.n != first.n + at)
            return number + at, ids[at - 1]
        number = end
    return None


def _knows_more(seal: Mapping[bytes, bytes], before: EntryId) -> bool:
    """Whether a seal is of an answer that has begun, or has had another attempt, after the last entry before it."""
    attempt = seal.get(b"attempt", b"0")
    if before.attempt:
        return attempt.isdigit() and int(attempt) > before.attempt
    return seal.get(b"type") == b"done" or attempt != b"0" or seal.get(b"usage", b"{}") != b"{}"

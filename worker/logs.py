"""Reading requests' logs on from a place: as many as want to at once, together, or by an XREAD that waits."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

from redis.asyncio import Redis

from worker.broker.connection import blocking_client
from worker.broker.together import Together
from worker.broker.wire import pack
from worker.client_errors import Unavailable, gone
from worker.contract.entries import Entry, parse
from worker.contract.ids import EntryId
from worker.contract.keys import Keys
from worker.patience import Patience

_BATCH = 1000
"""Entries that are read from a log at once."""

_BLOCK = 5.0
"""Seconds that a blocking XREAD waits."""

_Raw: TypeAlias = tuple[bytes, list[bytes]]
_Streams: TypeAlias = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]


@dataclass(frozen=True, slots=True)
class Page:
    """What came next in a log."""

    entries: Iterable[Entry]
    """They are parsed while they are taken, which raises `BadEntry` where one cannot be."""
    last: EntryId
    is_full: bool
    """Whether there may be more already."""


class Logs:
    """The logs of one namespace. Every question is repeated until Redis answers or patience ends."""

    def __init__(self, url: str, redis: Redis, keys: Keys, patience: Patience) -> None:
        self.is_closed = False
        self._keys = keys
        self._patience = patience
        self._together = Together(redis)
        self._reader = blocking_client(url, _BLOCK)

    async def read(self, request_id: str, after: EntryId, *, alive: bool = False) -> Page | None:
        """What a log has after a place, if anything; if `alive`, the log has to be there.

        Raises:
            UnknownRequest: when it has to be and nothing is known of the request.
            Expired: when it has to be, but the request has ended and its log is gone.
            Unavailable: when Redis does not answer, or this is closed.
        """
        raw = await self._patience.retry(partial(self._ask, request_id, after, alive=alive))
        if not raw:
            return None
        entries = (parse(entry_id, _fields(flat)) for entry_id, flat in raw)
        return Page(entries, EntryId.parse(raw[-1][0]), len(raw) == _BATCH)

    async def wait(self, request_id: str, after: EntryId) -> Page | None:
        """Wait some seconds for what comes after a place, as anybody can: with an XREAD of one's own.

        Raises what `read` does, where the log has to be there.
        """
        streams = await self._patience.retry(partial(self._xread, self._keys.tokens(request_id), after))
        if not streams:
            return await self.read(request_id, after, alive=True)
        raw = streams[0][1]
        entries = (parse(entry_id, fields) for entry_id, fields in raw)
        return Page(entries, EntryId.parse(raw[-1][0]), len(raw) == _BATCH)

    async def aclose(self) -> None:
        """Close the connections; whoever reads, or will, gets `Unavailable`."""
        self.is_closed = True
        await self._together.aclose()
        await self._reader.aclose()

    async def _ask(self, request_id: str, after: EntryId, *, alive: bool) -> list[_Raw]:
        self._check_open()
        ask, key = self._together.ask, self._keys.tokens(request_id)
        read = pack(b"XRANGE", key.encode(), b"(%d-%d" % after, b"+", b"COUNT", b"%d" % _BATCH)
        if not alive:
            (raw,) = await ask(key, read, 1)
            return cast("list[_Raw]", raw)
        # The tombstone is read first: it is written with the seal, and so a request without one has a log to be read
        # after it, unless nothing is known of it.
        ended = pack(b"GET", self._keys.ended(request_id).encode())
        stone, raw, is_there = await ask(key, ended + read + pack(b"EXISTS", key.encode()), 3)
        if not raw and not is_there:
            raise gone(request_id, stone)
        return cast("list[_Raw]", raw)

    async def _xread(self, key: str, after: EntryId) -> _Streams:
        self._check_open()
        streams = await self._reader.xread({key: str(after)}, count=_BATCH, block=int(_BLOCK * 1000))
        return cast("_Streams", streams)

    def _check_open(self) -> None:
        if self.is_closed:
            raise Unavailable("the client is closed")


def _fields(flat: list[bytes]) -> dict[bytes, bytes]:
    each = iter(flat)
    return dict(zip(each, each, strict=True))

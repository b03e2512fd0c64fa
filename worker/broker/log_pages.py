"""Reads a log in pages of about the same number of bytes.

Redis limits a page by its number of entries, so the number is estimated from the pages before. A reply with a whole log
could exceed the buffer of a connection (`client-output-buffer-limit`): Redis would close the connection at each retry.
"""

from dataclasses import dataclass
from typing import TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisConnectionError

from ..contract.ids import SEAL

RawEntry: TypeAlias = tuple[bytes, dict[bytes, bytes]]
"""An entry as redis-py returns it: its id and its fields."""

_MAX_ENTRIES, _FIRST_ENTRIES = 1000, 200
"""The most entries in a page, and the entries in the first page of a log."""

_SEAL = str(SEAL).encode()

_PAGE_BYTES = 256 * 1024
"""The target size of a page. A page has this size if its entries are as large as those of the page before."""


@dataclass(slots=True)
class PageSize:
    """The number of entries in the next page of one log."""

    entries: int = _FIRST_ENTRIES

    def learn(self, entries: int, size: int) -> None:
        """Adapt to a page that had `entries` entries and `size` bytes. The number of entries grows at most fourfold."""
        self.entries = max(1, min(_PAGE_BYTES * entries // max(1, size), 4 * self.entries, _MAX_ENTRIES))

    def shrink(self) -> None:
        """Adapt to a page that did not arrive in time."""
        self.entries = max(1, self.entries // 4)


async def read_raw_entries(redis: Redis, key: str) -> list[RawEntry]:
    """All entries of a stream, oldest first.

    Raises:
        RedisError: when Redis returns an error or is unreachable.
    """
    entries: list[RawEntry] = []
    size, after = PageSize(), "-"
    while True:
        try:
            page = cast("list[RawEntry]", await redis.xrange(key, min=after, count=size.entries))
        except RedisConnectionError as error:
            if isinstance(error, AuthenticationError) or size.entries == 1:
                raise
            size.shrink()
            continue
        entries += page
        if len(page) < size.entries or page[-1][0] == _SEAL:  # Redis refuses a range that begins after it
            return entries
        size.learn(len(page), sum([len(name) + len(value) for _, fields in page for name, value in fields.items()]))
        after = f"({page[-1][0].decode()}"

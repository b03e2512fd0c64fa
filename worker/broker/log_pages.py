"""Reading a log in pages of so many bytes, as far as that can be known: Redis counts entries.

A reply of a whole log may be larger than what Redis keeps for a connection (`client-output-buffer-limit`): it then
closes the connection, each time it is asked again.
"""

from dataclasses import dataclass
from typing import TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisConnectionError

from ..contract.ids import SEAL

RawEntry: TypeAlias = tuple[bytes, dict[bytes, bytes]]
"""An entry as redis-py gives it: its id, and its fields."""

_MOST_ENTRIES, _FIRST_ENTRIES = 1000, 200
"""Entries in a page at most, and in the first one of a log, of whose entries nothing is known."""

_SEAL = str(SEAL).encode()

_PAGE_BYTES = 256 * 1024
"""What the entries of a page amount to, if they are as large as those of the page before."""


@dataclass(slots=True)
class PageSize:
    """How many entries of one log are read at once."""

    entries: int = _FIRST_ENTRIES

    def learn(self, entries: int, size: int) -> None:
        """So many entries were of so many bytes. What has shrunk grows slowly again."""
        self.entries = max(1, min(_PAGE_BYTES * entries // max(1, size), 4 * self.entries, _MOST_ENTRIES))

    def shrink(self) -> None:
        """The last page did not come in time."""
        self.entries = max(1, self.entries // 4)


async def read_all(redis: Redis, key: str) -> list[RawEntry]:
    """All entries of a stream, oldest first.

    Raises:
        RedisError: what Redis says, or that it cannot be reached.
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
        if len(page) < size.entries or page[-1][0] == _SEAL:  # Redis refuses to be asked for what comes after it
            return entries
        size.learn(len(page), sum([len(name) + len(value) for _, fields in page for name, value in fields.items()]))
        after = f"({page[-1][0].decode()}"

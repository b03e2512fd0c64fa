"""The places from which a reader of the native API goes on: what clients send, and what it means."""

import re
from typing import cast

from redis.asyncio import Redis
from starlette.requests import HTTPConnection

from ..client.errors import MappedRetry
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .problems import Problem
from .services import Services

_ENTRY_ID = re.compile(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})")
_STARTS = frozenset({"", "-1", "0", "0-0"})
"""What clients send that have nothing yet."""


def cursor_text(connection: HTTPConnection) -> str:
    """What a request states as its cursor. The header goes first: an EventSource keeps its URL when it reconnects."""
    header = connection.headers.get("last-event-id")
    return header if header is not None else connection.query_params.get("after", "")


def parse_cursor(text: str) -> EntryId:
    """Read the id of the last entry that a reader has; `BEFORE_ALL` if it has none.

    Raises:
        Problem: when the text is no id of an entry (400).
    """
    if text in _STARTS:
        return BEFORE_ALL
    found = _ENTRY_ID.fullmatch(text)
    entry_id = EntryId(int(found[1]), int(found[2])) if found else None
    if entry_id is None or entry_id.attempt > SEAL.attempt or entry_id.n > SEAL.n:
        raise _invalid("the cursor is not the id of an entry: give an id of this stream, such as 1-0")
    return entry_id


async def check_place(services: Services, request_id: str, position: EntryId) -> None:
    """Refuse a place that a log which has not ended cannot have had.

    A failover may lose the end of a log, in which one attempt at most has begun. A reader that has an entry of a lost
    end is not refused: a worker repairs the log, or the log ends and the reader learns that its entry is missing.

    Raises:
        Problem: when the place is at least two attempts after the last entry (400).
        Unavailable: when Redis does not answer.
    """
    if position == SEAL or position.attempt <= 1:
        return
    key = services.keys.tokens(request_id)
    last = await MappedRetry(services.settings.patience)(_last_attempt, services.redis, key)
    if last is not None and position.attempt > last + 1:
        raise _invalid("the log has no such entry, and never had: follow it from its start")


async def _last_attempt(redis: Redis, key: str) -> int | None:
    """The attempt of the last entry of a log; None if there is no log."""
    found = cast("list[tuple[bytes, object]]", await redis.xrevrange(key, count=1))
    return EntryId.parse(found[0][0]).attempt if found else None


def _invalid(message: str) -> Problem:
    return Problem(400, "invalid_cursor", message, param="after")

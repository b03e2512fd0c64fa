"""The places from which a reader of the native API goes on: what clients send, and what it means."""

import re

from starlette.requests import HTTPConnection

from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .problems import Problem

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
        raise Problem(
            400, "invalid_cursor", "the cursor is not the id of an entry: give an id of this stream, such as 1-0",
            param="after",
        )  # fmt: skip
    return entry_id

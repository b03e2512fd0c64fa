"""The ids of log entries, `<attempt>-<n>`, ordered as in Redis, the ids of requests, and those of traces."""

import re
import uuid
from typing import NamedTuple, Self

VERSION = 1
"""The version of the wire contract that this package supports."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]+)?")
_LAST = 2**64 - 1
_new = tuple.__new__
"""Creates an `EntryId` in half the time that a call of the class takes: every token has an id."""


class EntryId(NamedTuple):
    """The id of an entry. Attempts count from 1, `n` from 0 within the attempt; ids order as in Redis."""

    attempt: int
    n: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.n}"

    @classmethod
    def parse(cls, raw: str | bytes) -> Self:
        """Read an id as Redis writes it. A number without `-<n>` has n = 0, as in Redis.

        Raises:
            ValueError: when the text is not a stream id.
        """
        text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else raw
        first, _, second = text.partition("-")
        if not (text.isascii() and first.isdecimal() and (not second or second.isdecimal())):
            raise ValueError(f"{text!r} is not the id of a log entry: give an id from the log, such as 1-0")
        return _new(cls, (int(first), int(second or 0)))


BEFORE_ALL = EntryId(0, 0)
"""Less than every entry's id: a read after it returns the whole log."""

QUEUED = EntryId(0, 1)
"""The entry that the client writes before the job."""

SEAL = EntryId(_LAST, _LAST)
"""The id of the terminal entry. It is the greatest id there is, so Redis refuses every entry after it."""

LAST_ATTEMPT = SEAL.attempt - 1
"""The greatest number that an attempt can have: the next number belongs to the seal."""


def follows(entry: EntryId, before: EntryId) -> bool:
    """Whether no entry is missing between two entries, judged by their ids; `before` may be `BEFORE_ALL`.

    A log begins with `0-1`, with `1-0`, or with its seal. Within an attempt `n` increases by one, and the next attempt
    begins with 0. The attempt number may increase by more than one, since a log that was lost and recreated continues
    under a later attempt. The seal's id does not depend on the entry before it, so the seal follows every entry.
    """
    if entry == SEAL:
        return True
    if before.attempt == 0:
        return entry in (QUEUED, (1, 0))
    same = entry.attempt == before.attempt
    return entry.n == before.n + 1 if same else entry.attempt > before.attempt and entry.n == 0


def is_request_id(text: object) -> bool:
    """Whether a value is a valid request id: text of 1 to 128 characters of `A-Za-z0-9_-`."""
    return isinstance(text, str) and _REQUEST_ID.fullmatch(text) is not None


def is_traceparent(text: str) -> bool:
    """Whether a text is a valid `traceparent` of W3C trace context. Versions after 00 may add fields at the end."""
    return _TRACEPARENT.fullmatch(text) is not None and (len(text) == 55 or not text.startswith("00"))


def new_request_id() -> str:
    """A new random request id: 32 hexadecimal digits."""
    return uuid.uuid4().hex

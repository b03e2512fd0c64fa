"""What the client raises: each error says what could not be done, and why.

`mapped` is the one place where errors of Redis, and of what stands in it, become these.
"""

import msgspec
from redis.exceptions import RedisError, ResponseError

from ..contract.entries import BadEntry
from ..contract.ids import BEFORE_ALL, SEAL, EntryId, is_request_id
from ..contract.records import Tombstone
from ..redisio.errors import is_transient, redacted_message


class ClientError(Exception):
    """What the client could not do, and why."""


class UnknownRequest(ClientError):
    """Nothing is known of the id: no log, and no tombstone of one."""


class Expired(ClientError):
    """The request has ended and its log has expired; `outcome` and `time` (Unix ms) are what is left."""

    def __init__(self, request_id: str, stone: Tombstone) -> None:
        super().__init__(f"request {request_id} ended ({stone.outcome}) and its log has expired")
        self.outcome = stone.outcome
        self.time = stone.time


class Conflict(ClientError):
    """The id is taken by another request."""


class QueueFull(ClientError):
    """As many jobs wait as may; nothing was written. `waiting` and `limit` are numbers of jobs."""

    def __init__(self, queue: str, waiting: int, limit: int) -> None:
        super().__init__(
            f"the queue {queue} is full: {waiting} jobs wait in it, and the limit is {limit}. "
            "Try again later, start more workers, or raise the limit"
        )
        self.waiting = waiting
        self.limit = limit


class IncompleteLog(ClientError):
    """The log lacks entries that were there: somebody trimmed or deleted them, or a failover lost them.

    `after` is the last entry before what is missing, `0-0` where the beginning is; or the place from which somebody
    wanted to read on, where that is not there. What the log itself calls void later (`restarted`) is not missed.
    """

    def __init__(self, request_id: str, after: EntryId, *, is_cursor: bool = False) -> None:
        log = f"the log of request {request_id}"
        super().__init__(
            f"{log} has no entry {after}, from which to go on: follow it from its start"
            if is_cursor
            else f"{log} lacks its beginning: somebody has trimmed it"
            if after == BEFORE_ALL
            else f"{log} lacks entries after {after}: somebody has deleted them"
        )
        self.after = after


class Unavailable(ClientError):
    """Redis does not answer, or refuses for now, as while it is full; or the client is closed."""


class Refused(ClientError):
    """Redis refuses, and trying again does not help: a password, a right, a key that is not of the contract."""


class Unreadable(ClientError):
    """What Redis has of the request cannot be read: an entry of its log, or its tombstone."""


class InvalidArgument(ClientError, ValueError):
    """A request id, a place in a log or a URL that cannot be one."""


class Misused(ClientError, RuntimeError):
    """The client is used in another event loop or process than its own."""


_READING = (BadEntry, msgspec.DecodeError, UnicodeDecodeError)

_WRONG_TYPE = (
    "Another program wrote to a key of this request (<prefix>:tokens:{ID}, <prefix>:ended:{ID}) or to one that all "
    "share: `worker check` names the latter. Remove what it wrote, or choose another prefix"
)
"""What to do about a key of another type: `worker check` looks at none of a single request."""

MAPPED = (RedisError, OSError, *_READING)
"""The kinds of errors that `mapped` knows."""


def mapped(error: Exception) -> ClientError:
    """What the client raises for one of `MAPPED`."""
    if isinstance(error, _READING):
        what = str(error) if isinstance(error, BadEntry) else f"the tombstone cannot be read: {error}"
        return Unreadable(f"{what}. Another program wrote it, or Redis lost a part of it")
    said = redacted_message(error)
    verdict = "refuses" if isinstance(error, ResponseError) or not is_transient(error) else "does not answer"
    advice = _WRONG_TYPE if said.startswith("WRONGTYPE") else "`worker check` says what to do"
    text = f"Redis {verdict}: {said if said.endswith(('?', '!')) else said.rstrip('.') + '.'} {advice}"
    return Unavailable(text) if is_transient(error) else Refused(text)


def check_id(request_id: str) -> str:
    """A request id, if it can be one.

    Raises:
        InvalidArgument: when it cannot.
    """
    if not is_request_id(request_id):
        raise InvalidArgument(f"the request id is {request_id!r:.160}: it must be 1 to 128 characters of A-Za-z0-9_-")
    return request_id


def check_place(after: str | EntryId) -> EntryId:
    """A place in a log or stream, as Redis takes it.

    Raises:
        InvalidArgument: when it is none.
    """
    try:
        place = EntryId.parse(str(after))
    except ValueError:  # also of thousands of digits, which Python does not read
        place = None
    if place is None or place.attempt > SEAL.attempt or place.n > SEAL.n:
        raise InvalidArgument(
            f"{str(after)!r:.60} is not the id of a log entry: give one such as 1-0, as it stood in the log"
        )
    return place


def gone(request_id: str, stone: bytes | None) -> ClientError:
    """What to say of a request without a log, by its tombstone if there is one."""
    if stone is None:
        return UnknownRequest(f"nothing is known of a request {request_id}: was it enqueued, and with this prefix?")
    return Expired(request_id, msgspec.json.decode(stone, type=Tombstone))

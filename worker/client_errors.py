"""What the client raises: each error says what could not be done, and why."""

import msgspec

from worker.contract.ids import BEFORE_ALL, EntryId
from worker.contract.records import Tombstone


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
    """Redis does not answer."""


def gone(request_id: str, stone: bytes | None) -> ClientError:
    """What to say of a request without a log, by its tombstone if there is one."""
    if stone is None:
        return UnknownRequest(f"nothing is known of a request {request_id}: was it enqueued, and with this prefix?")
    return Expired(request_id, msgspec.json.decode(stone, type=Tombstone))

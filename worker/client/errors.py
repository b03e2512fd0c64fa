"""The errors that the client raises. Each message has the reason.

`mapped` is the only place that maps errors of Redis, and of the data in it, to these.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import msgspec
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from ..contract.entries import BadEntry
from ..contract.ids import BEFORE_ALL, SEAL, EntryId, is_request_id
from ..contract.records import Tombstone
from ..redisio.advice import advice_on
from ..redisio.errors import is_connection_refused, is_transient, redacted_message
from ..redisio.retry import RetryUntilAvailable

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ClientError(Exception):
    """The base of all errors of the client."""


class UnknownRequest(ClientError):
    """The request id is unknown: there is neither a log nor a tombstone."""


class Expired(ClientError):
    """The request has ended and its log has expired. Only `outcome` and `time` (Unix ms) are known."""

    def __init__(self, request_id: str, tombstone: Tombstone) -> None:
        super().__init__(f"request {request_id} ended ({tombstone.outcome}) and its log has expired")
        self.outcome = tombstone.outcome
        self.time = tombstone.time


class Conflict(ClientError):
    """Another request has the same id."""


class QueueFull(ClientError):
    """The queue has reached its limit of waiting jobs. Nothing was written. `waiting` and `limit` count jobs."""

    def __init__(self, queue: str, waiting: int, limit: int) -> None:
        super().__init__(
            f"the queue {queue} is full: {waiting} jobs wait in it, and the limit is {limit}. "
            "Try again later, start more workers, or raise the limit"
        )
        self.waiting = waiting
        self.limit = limit


class IncompleteLog(ClientError):
    """The log lacks entries that it had: somebody trimmed or deleted them, or a failover lost them.

    `after` is the last entry before the missing ones; `0-0` if the beginning is missing. If the entry from which to
    continue is missing, `after` is its id. Missing entries that a later entry (`restarted`) makes void are no error.
    """

    def __init__(self, request_id: str, after: EntryId, *, is_cursor: bool = False) -> None:
        log = f"the log of request {request_id}"
        super().__init__(
            f"{log} has no entry {after} from which to continue: follow it from its start"
            if is_cursor
            else f"{log} lacks its beginning: somebody has trimmed it"
            if after == BEFORE_ALL
            else f"{log} lacks entries after {after}: somebody has deleted them"
        )
        self.after = after


class Unavailable(ClientError):
    """Redis does not answer, or refuses for a temporary reason such as full memory; or the client is closed."""


class Refused(ClientError):
    """Redis refuses, and a retry does not help: a wrong password, a missing right, a key of another program."""


class Unreadable(ClientError):
    """The data of the request in Redis cannot be read: an entry of its log, or its tombstone."""


class InvalidArgument(ClientError, ValueError):
    """An argument is invalid: a request id, the id of an entry, a number or a URL."""


class Misused(ClientError, RuntimeError):
    """The client is used in an event loop or a process that did not create it."""


_UNREADABLE = (BadEntry, msgspec.DecodeError, UnicodeDecodeError)

_WRONG_TYPE = (
    "Another program wrote to a key of this request (<prefix>:tokens:{ID}, <prefix>:ended:{ID}) or to a shared key, "
    "which `worker check` reports. Remove the data of that program, or choose another prefix"
)
"""How to fix a key of another type. `worker check` does not check keys of a single request."""

MAPPED = (RedisError, OSError, *_UNREADABLE)
"""The errors that `mapped` accepts."""


def mapped(error: Exception) -> ClientError:
    """Return the error of the client for one of `MAPPED`."""
    if isinstance(error, _UNREADABLE):
        what = str(error) if isinstance(error, BadEntry) else f"the tombstone cannot be read: {error}"
        return Unreadable(f"{what}. Another program wrote it, or Redis lost a part of it")
    message = redacted_message(error)
    verdict = "refuses" if isinstance(error, ResponseError) or not is_transient(error) else "does not answer"
    advice = _WRONG_TYPE if message.startswith("WRONGTYPE") else "`worker check` shows how to fix it"
    if isinstance(error, NoPermissionError):  # `worker check` tries the rights of a worker only
        advice = f"To fix it: {advice_on(error)}"
    if is_connection_refused(error):
        verdict, advice = "refuses the connection", f"To fix it: {advice_on(error)}"
    text = f"Redis {verdict}: {message if message.endswith(('?', '!')) else message.rstrip('.') + '.'} {advice}"
    return Unavailable(text) if is_transient(error) else Refused(text)


class MappedRetry:
    """Retries operations until Redis answers, for at most `patience` seconds. Errors are mapped to a `ClientError`.

    Once `stop` is done, nothing is retried.
    """

    def __init__(self, patience: float, stop: "asyncio.Future[None] | None" = None) -> None:
        self._retry = RetryUntilAvailable(limit=patience, stop=stop)

    async def __call__(self, operation: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call an operation until it succeeds, and return its result. The operation must be safe to repeat.

        Raises:
            Unavailable: when Redis does not answer in time.
            Refused: when Redis refuses, and a retry does not help.
            Unreadable: when the data in Redis cannot be read.
        """
        try:
            return await self._retry(operation, *args, **kwargs)
        except MAPPED as error:
            raise mapped(error) from error


def check_id(request_id: str) -> str:
    """Check a request id; returns it.

    Raises:
        InvalidArgument: when it is invalid.
    """
    if not is_request_id(request_id):
        raise InvalidArgument(f"the request id is {request_id!r:.160}: it must be 1 to 128 characters of A-Za-z0-9_-")
    return request_id


def parse_entry_id(after: str | EntryId) -> EntryId:
    """Parse the id of an entry of a log or stream.

    Raises:
        InvalidArgument: when the id is invalid.
    """
    try:
        entry_id = EntryId.parse(str(after))
    except ValueError:  # also for thousands of digits, which Python does not parse
        entry_id = None
    if entry_id is None or entry_id.attempt > SEAL.attempt or entry_id.n > SEAL.n:
        raise InvalidArgument(f"{str(after)!r:.60} is not the id of a log entry: give an id from the log, such as 1-0")
    return entry_id


def missing_log_error(request_id: str, tombstone: bytes | None) -> ClientError:
    """Return the error for a request without a log, given its tombstone in Redis."""
    if tombstone is None:
        return UnknownRequest(f"the request {request_id} is unknown: was it enqueued, and with this prefix?")
    try:
        return Expired(request_id, msgspec.json.decode(tombstone, type=Tombstone))
    except _UNREADABLE as error:
        return mapped(error)

"""The seals that clients write: a cancel, and the end of a request whose deadline passed before a worker took it.

The client that writes a seal also sets the log's expiry, writes the tombstone, and informs followers and workers. A
worker that gets the job later finds the seal, adds what is missing, and does the rest. Nothing here imports the
worker process.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import NoPermissionError, ResponseError, WatchError

from ..contract.answer import Answer
from ..contract.entries import (
    Cancelled,
    Entry,
    Failed,
    Fields,
    Queued,
    Started,
    is_terminal,
    parse_leniently,
    to_fields,
    to_json,
)
from ..contract.ids import SEAL
from ..contract.keys import Keys
from ..contract.records import Tombstone
from ..redisio.cluster import ClusterClient
from ..redisio.errors import is_lost_connection, redacted_message
from .log_pages import RawEntry, read_raw_entries

GRACE = 5.0
"""Seconds after its deadline until a client ends a request that no worker has started: a live worker does it first."""

_RETENTION, _REMEMBER = 3600, 24 * 3600
"""Seconds that a log without an expiry, and a tombstone, are kept."""

USAGE_TRIES = 4
"""Times that `seal_cancelled` counts the usage of a log that is still written, before it leaves the usage out."""

_EXHAUSTED = re.compile("(ERR )?The stream has exhausted the last possible ID")
"""The error of Redis 6.2 and 7 for a stream that has the greatest id already. redis-py cuts `ERR ` off."""

_NO_MULTI = "EXEC without MULTI"
"""The error where a user may not MULTI: Redis has then executed each command by itself."""

_MESSAGE = "the deadline of the job passed before a worker took it: none serves its queue, or all were busy"


async def cancel(redis: Redis, keys: Keys, request_id: str) -> bool:
    """Seal a log as cancelled. Returns false if the log had a seal.

    Raises:
        RedisError: what Redis answers. A caller that repeats this after a lost reply finds the seal.
    """
    key, now = keys.tokens(request_id), await now_of(redis)

    def keep(pipe: Pipeline, first: Entry | None) -> None:
        digest = first.digest if isinstance(first, Queued | Started) else ""
        stone = Tombstone(outcome=Cancelled.type, time=now, digest=digest)
        pipe.expire(key, _RETENTION)
        pipe.set(keys.ended(request_id), to_json(stone), ex=_REMEMBER, nx=True)

    sealed = await seal_cancelled(redis, key, keep)
    if sealed is None:
        return False
    pipe = redis.pipeline(transaction=False)
    if not sealed.is_whole:
        keep(pipe, sealed.first)
    kept = len(pipe.command_stack)
    _publish(redis, pipe, keys, request_id, sealed.fields)
    replies = await pipe.execute(raise_on_error=False)  # a user may lack the right to publish: speed only
    for reply in replies[:kept]:
        if isinstance(reply, Exception):
            raise reply
    return True


def may_be_overdue(entry: Entry | None) -> bool:
    """Whether a log's last entry is `queued` with a deadline that has passed, by the clock of this machine."""
    return isinstance(entry, Queued) and _is_overdue(entry, int(time.time() * 1000))


async def end_overdue(redis: Redis, keys: Keys, request_id: str) -> bool:
    """Seal a log as failed if it holds only `queued` and Redis's clock is past the deadline. Returns whether it did.

    The log is read and written in one step, under a WATCH: a worker that starts meanwhile keeps the job and its log.

    Raises:
        RedisError: what Redis answers. A caller that repeats this after a lost reply finds the seal. A user who may
            read but not write gets the error only where there is something to seal.
    """
    key, ended = keys.tokens(request_id), keys.ended(request_id)
    if await _overdue(redis, key) is None:
        return False
    async with redis.pipeline() as pipe:
        await pipe.watch(key, ended)
        overdue = await _overdue(pipe, key)
        if overdue is None or await pipe.exists(ended):
            return False
        last, now = overdue
        left = int(await pipe.ttl(key))
        seal = to_fields(Failed(id=SEAL, code="deadline", message=_MESSAGE))
        stone = Tombstone(outcome=Failed.type, time=now, digest=last.digest)
        pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
        pipe.xadd(key, seal, id=str(SEAL))  # type: ignore[arg-type]  # dict is invariant
        pipe.set(ended, to_json(stone), ex=max(_REMEMBER, left))
        if left < 0:
            pipe.expire(key, _RETENTION)
        try:
            await pipe.execute()
        except WatchError:  # a worker started or ended the request meanwhile
            return False
    pipe = redis.pipeline(transaction=False)
    _publish(redis, pipe, keys, request_id, seal)
    await pipe.execute(raise_on_error=False)
    return True


async def now_of(redis: Redis) -> int:
    """Redis's clock, in Unix ms."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def _overdue(redis: Redis, key: str) -> tuple[Queued, int] | None:
    """The last entry of a log and the time in Unix ms, if that entry is `queued` and its deadline has passed."""
    tail = cast("list[tuple[bytes, dict[bytes, bytes]]]", await redis.xrevrange(key, count=1))
    last, now = parse_leniently(*tail[0]) if tail else None, await now_of(redis)
    return (last, now) if isinstance(last, Queued) and _is_overdue(last, now) else None


def _is_overdue(queued: Queued, now: int) -> bool:
    return bool(queued.deadline) and now >= queued.deadline + GRACE * 1000


def _publish(redis: Redis, pipe: Pipeline, keys: Keys, request_id: str, seal: Fields) -> None:
    """Add the commands that inform workers and followers of a seal."""
    pipe.publish(keys.cancel, request_id)
    message = keys.feed(request_id), to_json([[str(SEAL), seal]])
    pipe.publish(*message)
    if isinstance(redis, ClusterClient):  # the feed is sharded there, with Redis 7
        pipe.execute_command("SPUBLISH", *message)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A seal that was written.

    `first` is the log's first entry before it, `fields` are its own, and `is_whole` says whether the commands that
    belong with the seal were executed with it.
    """

    first: Entry | None
    fields: Fields
    is_whole: bool


def _add_nothing(_pipe: Pipeline, _first: Entry | None) -> None:
    """Add no further command."""


async def seal_cancelled(
    redis: Redis, key: str, add: Callable[[Pipeline, Entry | None], None] = _add_nothing
) -> Sealed | None:
    """Seal a log as cancelled, or begin it with the seal. Returns None if the log had a seal.

    `add` adds the commands that belong with the seal, given the log's first entry. Redis executes all of them or none,
    as where the user lacks a right to one. Only the seal is written where entries come too fast, and where the user may
    not MULTI.

    The seal holds the usage of the whole log, or none: an entry between count and seal would be in the log and not in
    the usage. So the log is watched while the usage is counted. A cancel does not wait for a log to which entries are
    added faster than that.

    Raises:
        RedisError: what Redis answers, unless it answers that there is a seal. Repeating this after a lost reply is
            safe.
    """
    log = [parse_leniently(*entry) for entry in await read_raw_entries(redis, key)]
    if log and is_terminal(log[-1]):  # Redis refuses a range that begins after the greatest id
        return None
    tries_left = USAGE_TRIES
    while True:
        async with redis.pipeline() as pipe:
            await pipe.watch(key)
            unread = await pipe.xrange(key, min=f"({log[-1].id}" if log else "-")
            log += [parse_leniently(*entry) for entry in cast("list[RawEntry]", unread)]
            so_far = Answer(log)
            if so_far.end:
                return None
            if not tries_left:
                await pipe.unwatch()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves it without types
            seal = to_fields(Cancelled(id=SEAL, usage=so_far.usage if tries_left else {}, model=so_far.model))
            pipe.multi()  # type: ignore[no-untyped-call]  # and this one
            pipe.xadd(key, seal, id=str(SEAL))  # type: ignore[arg-type]  # dict is invariant
            first = log[0] if log else None
            if tries_left:  # otherwise the log may have another seal by now, with its own expiry and tombstone
                add(pipe, first)
            try:
                await pipe.execute()
            except WatchError as error:
                if is_lost_connection(error):
                    raise
                tries_left -= 1  # an entry was added meanwhile
                continue
            except ResponseError as error:
                return Sealed(first, seal, is_whole=False) if await _was_written(redis, key, seal, error) else None
            return Sealed(first, seal, is_whole=bool(tries_left))


async def _was_written(redis: Redis, key: str, seal: Fields, error: ResponseError) -> bool:
    """Whether a seal was written in spite of an error; false where the log had another.

    Raises:
        ResponseError: when the log has no seal.
    """
    message = redacted_message(error)
    if _EXHAUSTED.match(message):
        return False
    if _NO_MULTI not in message:
        raise error
    end = cast("list[RawEntry]", await redis.xrevrange(key, count=1))
    if not end or end[0][0] != str(SEAL).encode():
        raise NoPermissionError("this user has no permissions to run the 'multi' command") from error
    return {name.decode(): value.decode() for name, value in end[0][1].items()} == seal

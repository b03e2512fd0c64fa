"""The seals that clients write: a cancel, and the end of a request whose deadline passed before a worker started it.

The client that writes a seal also sets the log's expiry, writes the tombstone, and notifies followers and workers. A
worker that gets the job later finds the seal, repeats any step that is missing, writes the lifecycle and acknowledges.
Clients import this module, so it must not import the worker process.
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
"""How often `seal_cancelled` counts the usage of a log that is still written, before it omits the usage."""

_EXHAUSTED = re.compile("(ERR )?The stream has exhausted the last possible ID")
"""The error of Redis 6.2 and 7 for a stream that has the greatest id already. redis-py removes `ERR `."""

_NO_MULTI = "EXEC without MULTI"
"""The error for a user who has no right to MULTI: Redis has then executed each command by itself."""

_MESSAGE = "the deadline of the job passed before a worker took it: none serves its queue, or all were busy"


async def cancel(redis: Redis, keys: Keys, request_id: str) -> bool:
    """Seal a log as cancelled. Returns false if the log had a seal.

    Raises:
        RedisError: when Redis returns an error. A caller that repeats this after a lost reply finds the seal.
    """
    key, now = keys.tokens(request_id), await redis_time_ms(redis)

    def add_expiry_and_tombstone(pipe: Pipeline, first: Entry | None) -> None:
        digest = first.digest if isinstance(first, Queued | Started) else ""
        tombstone = Tombstone(outcome=Cancelled.type, time=now, digest=digest)
        pipe.expire(key, _RETENTION)
        pipe.set(keys.ended(request_id), to_json(tombstone), ex=_REMEMBER, nx=True)

    sealed = await seal_cancelled(redis, key, add_expiry_and_tombstone)
    if sealed is None:
        return False
    pipe = redis.pipeline(transaction=False)
    if not sealed.is_complete:
        add_expiry_and_tombstone(pipe, sealed.first)
    required = len(pipe.command_stack)
    _publish(redis, pipe, keys, request_id, sealed.fields)
    replies = await pipe.execute(raise_on_error=False)  # a user may lack the right to publish, which is only for speed
    for reply in replies[:required]:
        if isinstance(reply, Exception):
            raise reply
    return True


def may_be_overdue(entry: Entry | None) -> bool:
    """Whether a log's last entry is `queued` and its deadline has passed by this machine's clock."""
    return isinstance(entry, Queued) and _is_overdue(entry, int(time.time() * 1000))


async def end_overdue(redis: Redis, keys: Keys, request_id: str) -> bool:
    """Seal a log as failed if it holds only `queued` and Redis's clock is past the deadline. Returns whether it did.

    The log is read and written in one step, under a WATCH: a worker that starts meanwhile keeps the job and its log.

    Raises:
        RedisError: when Redis returns an error. A caller that repeats this after a lost reply finds the seal. A user
            with the right to read and not to write gets the error only if there is something to seal.
    """
    key, ended = keys.tokens(request_id), keys.ended(request_id)
    if await _read_overdue(redis, key) is None:
        return False
    async with redis.pipeline() as pipe:
        await pipe.watch(key, ended)
        overdue = await _read_overdue(pipe, key)
        if overdue is None or await pipe.exists(ended):
            return False
        last, now = overdue
        left = int(await pipe.ttl(key))
        seal = to_fields(Failed(id=SEAL, code="deadline", message=_MESSAGE))
        tombstone = Tombstone(outcome=Failed.type, time=now, digest=last.digest)
        pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
        pipe.xadd(key, seal, id=str(SEAL))  # type: ignore[arg-type]  # dict is invariant
        pipe.set(ended, to_json(tombstone), ex=max(_REMEMBER, left))
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


async def redis_time_ms(redis: Redis) -> int:
    """The time of Redis's clock, in Unix ms."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def _read_overdue(redis: Redis, key: str) -> tuple[Queued, int] | None:
    """The last entry of a log and the time in Unix ms, if that entry is `queued` and its deadline has passed."""
    tail = cast("list[tuple[bytes, dict[bytes, bytes]]]", await redis.xrevrange(key, count=1))
    last, now = parse_leniently(*tail[0]) if tail else None, await redis_time_ms(redis)
    return (last, now) if isinstance(last, Queued) and _is_overdue(last, now) else None


def _is_overdue(queued: Queued, now: int) -> bool:
    return bool(queued.deadline) and now >= queued.deadline + GRACE * 1000


def _publish(redis: Redis, pipe: Pipeline, keys: Keys, request_id: str, seal: Fields) -> None:
    """Add the commands that notify workers and followers of a seal."""
    pipe.publish(keys.cancel, request_id)
    message = keys.feed(request_id), to_json([[str(SEAL), seal]])
    pipe.publish(*message)
    if isinstance(redis, ClusterClient):  # the feed is sharded there, with Redis 7
        pipe.execute_command("SPUBLISH", *message)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A seal that was written.

    `first` is the log's first entry, or None if the seal began the log. `fields` are the seal's. `is_complete` is
    whether Redis executed the accompanying commands with the seal.
    """

    first: Entry | None
    fields: Fields
    is_complete: bool


def _add_nothing(_pipe: Pipeline, _first: Entry | None) -> None:
    """Add no accompanying command."""


async def seal_cancelled(
    redis: Redis, key: str, add: Callable[[Pipeline, Entry | None], None] = _add_nothing
) -> Sealed | None:
    """Seal a log as cancelled, or begin it with the seal. Returns None if the log had a seal.

    `add` gets the log's first entry and adds the accompanying commands. Redis executes seal and commands together, or
    none of them if the user lacks a right to one. Only the seal is written if entries come too fast, or if the user
    has no right to MULTI.

    The seal holds the usage of the whole log, or none. The log is watched while its usage is counted, because an entry
    between count and seal would be missing in the usage. If entries are added faster than the usage is counted, the
    seal has no usage, so that the cancel does not wait.

    Raises:
        RedisError: when Redis returns an error, except for a log that is sealed. Repeating this after a lost reply is
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
                return Sealed(first, seal, is_complete=False) if await _was_written(redis, key, seal, error) else None
            return Sealed(first, seal, is_complete=bool(tries_left))


async def _was_written(redis: Redis, key: str, seal: Fields, error: ResponseError) -> bool:
    """Whether a seal was written in spite of an error; false if the log had another seal.

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

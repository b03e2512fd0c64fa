"""Cancels: the seal that our client writes, and hints of it.

The hints are a channel that tells every worker which log was sealed, so that it need not wait to look. Speed only: the
log is the truth, and every log is looked at three times a lease. Whatever is lost here costs time.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline, PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError, ResponseError, WatchError

from ..contract.answer import Answer
from ..contract.entries import Cancelled, Entry, Fields, is_terminal, parse_leniently, to_fields
from ..contract.ids import SEAL
from ..redisio.clients import Backoff
from ..redisio.errors import is_lost_connection, is_transient, redacted_message
from .cluster_publisher import AnyPublisher
from .log_pages import RawEntry, read_all

_log = structlog.get_logger()

_TICK = 0.25
"""Seconds after which it is seen that the process leaves: a read is not cancelled, redis-py may not notice."""

_SILENCE = 5.0
"""Seconds after which a silent connection is asked whether it still lives, and then given up."""

_ASK_AGAIN = 5.0
"""Seconds until a subscription that was refused is tried again."""

_COUNTS = 4
"""How often the usage of a log is counted that goes on meanwhile, until its seal is written without one."""

_SEALED = re.compile("(ERR )?The stream has exhausted the last possible ID")
"""What Redis 6.2 and 7 say when a stream already has the greatest id. redis-py cuts `ERR ` off."""


_NO_MULTI = "EXEC without MULTI"
"""What Redis says where a user may not MULTI: it has done each command by itself."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A seal that was written: the log's first entry before it, its fields, and whether all that belongs with it is."""

    first: Entry | None
    fields: Fields
    is_whole: bool


def _nothing(_pipe: Pipeline, _first: Entry | None) -> None:
    """Add nothing."""


async def seal_cancelled(
    redis: Redis, key: str, beside: Callable[[Pipeline, Entry | None], None] = _nothing
) -> Sealed | None:
    """Seal a log, or begin it with the seal; gives nothing if it had a seal.

    `beside` adds what belongs with the seal of a log, given its first entry: all of it is written, or nothing, as where
    the user lacks a right to it. Only where entries come too fast, and where the user may not MULTI, it may be missing.

    The seal tells the usage of the whole log or none: entries that come between count and seal would be in the log and
    not in the usage. So the log is watched, and where they come too fast for that a cancel does not wait for them.

    Raises:
        RedisError: what Redis says, unless it says that there is a seal. Repeating this after a lost reply is safe.
    """
    log = [parse_leniently(*entry) for entry in await read_all(redis, key)]
    if log and is_terminal(log[-1]):  # Redis refuses to be asked for what comes after it
        return None
    left = _COUNTS
    while True:
        async with redis.pipeline() as pipe:
            await pipe.watch(key)
            unread = await pipe.xrange(key, min=f"({log[-1].id}" if log else "-")
            log += [parse_leniently(*entry) for entry in cast("list[RawEntry]", unread)]
            so_far = Answer(log)
            if so_far.end:
                return None
            if not left:
                await pipe.unwatch()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves it without types
            seal = to_fields(Cancelled(id=SEAL, usage=so_far.usage if left else {}, model=so_far.model))
            pipe.multi()  # type: ignore[no-untyped-call]  # and this one
            pipe.xadd(key, seal, id=str(SEAL))  # type: ignore[arg-type]  # dict is invariant
            first = log[0] if log else None
            if left:  # else another seal may have come, which has its own
                beside(pipe, first)
            try:
                await pipe.execute()
            except WatchError as error:
                if is_lost_connection(error):
                    raise
                left -= 1  # an entry came meanwhile: look again
                continue
            except ResponseError as error:
                return Sealed(first, seal, is_whole=False) if await _stands(redis, key, seal, error) else None
            return Sealed(first, seal, is_whole=bool(left))


async def _stands(redis: Redis, key: str, seal: Fields, error: ResponseError) -> bool:
    """Whether a seal was written in spite of an error; false where the log had another.

    Raises:
        ResponseError: when there is none.
    """
    said = redacted_message(error)
    if _SEALED.match(said):
        return False
    if _NO_MULTI not in said:
        raise error
    end = cast("list[RawEntry]", await redis.xrevrange(key, count=1))
    if not end or end[0][0] != str(SEAL).encode():
        raise NoPermissionError("this user has no permissions to run the 'multi' command") from error
    return {name.decode(): value.decode() for name, value in end[0][1].items()} == seal


class CancelHints:
    """The process's one subscription; for a request that runs here, it has the end of that log read at once."""

    def __init__(self, redis: Redis, channel: str, publisher: AnyPublisher) -> None:
        self._redis = redis
        self._channel = channel
        self._publisher = publisher
        self._leaving = asyncio.Event()
        self._refused = ""
        """Why Redis does not take the subscription, or nothing."""

    async def run(self) -> None:
        """Listen until `leave` is called, and subscribe again whenever the connection is lost or refused."""
        backoff = Backoff("cancel_hints_lost")
        while not self._leaving.is_set():
            try:
                async with self._redis.pubsub() as hints:
                    await hints.subscribe(self._channel)
                    await self._listen(hints, backoff)
            except (RedisError, OSError) as error:
                if is_transient(error):
                    await backoff.wait(error)
                else:
                    await self._until_rights_may_have_changed(redacted_message(error))

    async def _until_rights_may_have_changed(self, refusal: str) -> None:
        """After a refusal that an operator may lift, as of a user without the right, or with a former password."""
        if refusal != self._refused:
            self._refused = refusal
            _log.warning("cancel_hints_refused", channel=self._channel, error=refusal)
        with suppress(TimeoutError):
            async with asyncio.timeout(_ASK_AGAIN):
                await self._leaving.wait()

    def leave(self) -> None:
        """Come to an end soon."""
        self._leaving.set()

    async def _listen(self, hints: PubSub, backoff: Backoff) -> None:
        now = asyncio.get_running_loop().time
        heard, asked = now(), False
        while not self._leaving.is_set():
            message = await hints.get_message(timeout=_TICK)
            if message is not None:
                heard, asked = now(), False
                self._take(message, backoff)
            elif now() - heard > _SILENCE:
                if asked:
                    raise RedisConnectionError("the connection is silent")
                await hints.ping()
                heard, asked = now(), True

    def _take(self, message: dict[str, object], backoff: Backoff) -> None:
        data = message["data"]
        if message["type"] == "message" and isinstance(data, bytes):
            self._publisher.look_at(data.decode("utf-8", "replace"))
        elif message["type"] == "subscribe":
            backoff.reset()
            if self._refused:
                self._refused = ""
                _log.info("recovered", after="cancel_hints_refused")
            self._publisher.look()  # hints may have been lost before

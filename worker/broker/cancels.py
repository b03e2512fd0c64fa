"""Cancels: the seal that our client writes, and hints of it.

The hints are a channel that tells every worker which log was sealed, so that it need not wait to look. Speed only: the
log is the truth, and every log is looked at three times a lease. Whatever is lost here costs time.
"""

import asyncio
import re
from contextlib import suppress
from typing import cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError, WatchError

from worker.broker.cluster_publisher import AnyPublisher
from worker.broker.connection import Backoff, is_lost, is_transient, what_redis_said
from worker.broker.pages import RawEntry, read_all
from worker.contract.answer import Answer
from worker.contract.entries import Cancelled, Entry, Fields, is_terminal, parse_leniently, to_fields
from worker.contract.ids import SEAL

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


async def seal_cancelled(redis: Redis, key: str) -> tuple[Entry | None, Fields] | None:
    """Seal a log, or begin it with the seal; gives its first entry and the seal's fields, or nothing if it had a seal.

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
            try:
                await pipe.execute()
            except WatchError as error:
                if is_lost(error):
                    raise
                left -= 1  # an entry came meanwhile: look again
                continue
            except ResponseError as error:
                if not _SEALED.match(what_redis_said(error)):
                    raise
                return None
            return (log[0] if log else None), seal


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
                    await self._until_rights_may_have_changed(what_redis_said(error))

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

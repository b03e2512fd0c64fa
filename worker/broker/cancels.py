"""Hints of cancels: a channel on which clients publish the id of each request that they seal.

A worker that listens reads the end of that log at once. The hints are for speed only: the log is the truth, and workers
read the end of every log three times a lease. A hint that is lost costs time.
"""

import asyncio
from contextlib import suppress

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ..redisio.clients import Backoff
from ..redisio.errors import is_transient, redacted_message
from .cluster_publisher import AnyPublisher

_log = structlog.get_logger()

_TICK = 0.25
"""Seconds after which it is seen that the process leaves: a read is not cancelled, redis-py may not notice."""

_SILENCE = 5.0
"""Seconds after which a silent connection is asked whether it still lives, and then given up."""

_ASK_AGAIN = 5.0
"""Seconds until a subscription that was refused is tried again."""


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
            self._publisher.verify(data.decode("utf-8", "replace"))
        elif message["type"] == "subscribe":
            backoff.reset()
            if self._refused:
                self._refused = ""
                _log.info("recovered", after="cancel_hints_refused")
            self._publisher.verify_all()  # hints may have been lost before

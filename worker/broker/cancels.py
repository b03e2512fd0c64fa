"""The listener for cancel hints: clients publish the id of each request that they seal on a channel.

A worker that gets a hint reads the end of that log at once. The hints are for speed only: the log is the truth, and
workers read the end of every log three times a lease. A lost hint only delays a cancel.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from redis.asyncio import Redis

from ..redisio.errors import redacted_message
from ..redisio.subscriptions import Subscriptions
from ..telemetry.events import CancelHintsRefused, Recovered, Telemetry


class LogVerifier(Protocol):
    """Reads the ends of this process's logs. Publishers implement it."""

    def verify(self, request_id: str) -> None:
        """Read the end of one log soon."""

    def verify_all(self) -> None:
        """Read the end of every log soon."""


class _Presence:
    """The subscription by which others see that this process has a connection. See `Keys.presence`."""

    is_subscribed = False

    def __init__(self, on_refused: Callable[[], None]) -> None:
        self._on_refused = on_refused

    def on_message(self, payload: bytes) -> None:
        """Do nothing: nobody publishes there."""

    def on_subscribed(self) -> None:
        self.is_subscribed = True

    def on_interrupted(self) -> None:
        self.is_subscribed = False

    def on_refused(self, _: Exception) -> None:
        self.is_subscribed = False
        self._on_refused()


class CancelListener:
    """The process's subscription to the channel of cancel hints, and to its own channel of presence.

    A refusal is not final: an operator may give the user the right to the channel, or restore a password that was
    changed. So the subscription is requested again every `retry_refused_after` seconds. The same refusal is reported
    once.
    """

    def __init__(
        self,
        redis: Redis,
        channel: str,
        presence: str,
        publisher: LogVerifier,
        telemetry: Telemetry,
        *,
        retry_refused_after: float = 5.0,
    ) -> None:
        self._subscriptions = Subscriptions(
            redis, sharded=False, retry_refused_after=retry_refused_after, what="cancel_hints_lost", telemetry=telemetry
        )
        self._channel = channel
        self._presence_channel = presence
        # A refusal of this channel would end the hints as well, so it is not requested again.
        self._presence = _Presence(lambda: self._subscriptions.unsubscribe(presence))
        self._publisher = publisher
        self._telemetry = telemetry
        self._stopping = asyncio.Event()
        self._refusal = ""
        """The error with which Redis refused the subscription, if it did."""

    @property
    def shows_presence(self) -> bool:
        """Whether the process is subscribed to its channel of presence."""
        return self._presence.is_subscribed

    async def run(self) -> None:
        """Listen until `stop` is called."""
        self._subscriptions.subscribe(self._channel, self)
        self._subscriptions.subscribe(self._presence_channel, self._presence)
        try:
            await self._stopping.wait()
        finally:
            await self._subscriptions.aclose()

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    def on_message(self, payload: bytes) -> None:
        """See `Listener`, also below. The payload is the id of a request that was sealed."""
        self._publisher.verify(payload.decode("utf-8", "replace"))

    def on_subscribed(self) -> None:
        if self._refusal:
            self._refusal = ""
            self._telemetry.emit(Recovered("cancel_hints_refused"))
        self._publisher.verify_all()  # earlier hints may be lost

    def on_interrupted(self) -> None:
        """Do nothing: `on_subscribed` verifies all logs after the interruption."""

    def on_refused(self, error: Exception) -> None:
        refusal = redacted_message(error)
        if refusal != self._refusal:
            self._refusal = refusal
            self._telemetry.emit(CancelHintsRefused(self._channel, refusal))

"""The listener for cancel hints: clients publish the id of each request that they seal on a channel.

A worker that gets a hint reads the end of that log at once. The hints are for speed only: the log is the truth, and
workers read the end of every log three times a lease. A lost hint only delays a cancel.
"""

from collections.abc import Callable
from typing import Protocol

from redis.asyncio import Redis

from ..telemetry.events import CancelHintsRefused, Telemetry
from .hints import HintListener


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


class CancelListener(HintListener):
    """The process's subscription to the channel of cancel hints, and to its own channel of presence."""

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
        super().__init__(
            redis,
            channel,
            publisher.verify,
            publisher.verify_all,
            name="cancel_hints",
            refused=CancelHintsRefused,
            telemetry=telemetry,
            retry_refused_after=retry_refused_after,
        )
        self._presence_channel = presence
        # A refusal of this channel would end the hints as well, so it is not requested again.
        self._presence = _Presence(lambda: self.subscriptions.unsubscribe(presence))

    @property
    def shows_presence(self) -> bool:
        """Whether the process is subscribed to its channel of presence."""
        return self._presence.is_subscribed

    async def run(self) -> None:
        """See `HintListener`."""
        self.subscriptions.subscribe(self._presence_channel, self._presence)
        await super().run()

"""The listener for hints: messages of a channel that something in Redis has changed. Hints are only for speed.

A lost hint delays what it is about until the next regular read.
"""

import asyncio
from collections.abc import Callable

from redis.asyncio import Redis

from ..redisio.errors import redacted_message
from ..redisio.subscriptions import Subscriptions
from ..telemetry.events import Event, Recovered, Telemetry


class HintListener:
    """The process's subscription to a channel of hints.

    A refusal is not final: an operator may give the user the right to the channel, or restore a password that was
    changed. So the subscription is requested again every `retry_refused_after` seconds. The same refusal is reported
    once.

    Each listener has a connection of its own, in `subscriptions`: a refused channel would interrupt others on the same
    connection.

    Args:
        redis: the client whose pool has the connection.
        channel: the channel's name.
        on_hint: called with each message.
        on_subscribed: called when Redis has confirmed the subscription. Earlier hints may be lost.
        name: the name of these hints in the log: `<name>_lost`, `<name>_refused`.
        refused: makes the event of a refusal from the channel and the error.
        telemetry: the receiver of events.
        retry_refused_after: seconds.
    """

    def __init__(
        self,
        redis: Redis,
        channel: str,
        on_hint: Callable[[str], object],
        on_subscribed: Callable[[], object],
        *,
        name: str,
        refused: Callable[[str, str], Event],
        telemetry: Telemetry,
        retry_refused_after: float = 5.0,
    ) -> None:
        self.subscriptions = Subscriptions(
            redis, sharded=False, retry_refused_after=retry_refused_after, what=f"{name}_lost", telemetry=telemetry
        )
        self._channel = channel
        self._on_hint = on_hint
        self._on_subscribed = on_subscribed
        self._name = name
        self._refused = refused
        self._telemetry = telemetry
        self._stopping = asyncio.Event()
        self._refusal = ""
        """The error with which Redis refused the subscription, if it did."""

    async def run(self) -> None:
        """Listen until `stop` is called."""
        self.subscriptions.subscribe(self._channel, self)
        try:
            await self._stopping.wait()
        finally:
            await self.subscriptions.aclose()

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    def on_message(self, payload: bytes) -> None:
        """See `Listener`, also below."""
        self._on_hint(payload.decode("utf-8", "replace"))

    def on_subscribed(self) -> None:
        if self._refusal:
            self._refusal = ""
            self._telemetry.emit(Recovered(f"{self._name}_refused"))
        self._on_subscribed()

    def on_interrupted(self) -> None:
        """Do nothing: `on_subscribed` makes up for the hints that are lost."""

    def on_refused(self, error: Exception) -> None:
        refusal = redacted_message(error)
        if refusal != self._refusal:
            self._refusal = refusal
            self._telemetry.emit(self._refused(self._channel, refusal))

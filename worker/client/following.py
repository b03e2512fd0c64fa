"""Following requests: each entry once and in order, from the feed as far as that goes, and from the log for the rest.

The log is the truth, the feed only speed. Whoever follows has a place in the log, and takes from the feed nothing but
the entry that comes next there: of the same attempt, with `n` one higher. At anything else (a gap, another attempt, the
end), and when nothing has come for a while, the log is read from that place on. Followers that read at the same time
read together. Where the feed cannot be heard, or says less than the log has, a blocking XREAD waits instead.
"""

import asyncio
from collections.abc import Sequence

from ..contract.entries import BadEntry
from ..contract.feed import MAX_SILENCE, read_message
from ..contract.ids import EntryId
from ..contract.keys import Keys
from ..redisio.clients import command_client
from ..redisio.subscriptions import Subscriptions
from .follower import Follower
from .log_reader import LogReader
from .patience import Patience

_SETTLED_AFTER = MAX_SILENCE + 0.05
"""Seconds from a subscription until every accepted entry is told, or a later one. Till then, or a first message, the
log is read; and so it is for as long while the subscription is on its way."""

_SETTLING = 0.05
"""Seconds from one such reading to the next."""

_TICK = 0.5
"""Seconds from one look at who hears nothing to the next."""

_AT_ONCE, _SPARED = 200, 0.001
"""Requests that are looked at in one step, and seconds until the next of these."""


class Followers:
    """All that a client follows; two connections to each server do for any number of requests."""

    def __init__(self, url: str, keys: Keys, patience: Patience) -> None:
        self.keys = keys
        self._redis = command_client(url, connections=2)
        self.subscriptions = Subscriptions(self._redis)
        self.logs = LogReader(url, self._redis, keys, patience)
        self._requests: dict[str, RequestFollowers] = {}
        self.settling: dict[RequestFollowers, None] = {}
        """Whose followers read the log again and again."""
        self._tick: asyncio.TimerHandle | None = None

    def follow(self, request_id: str, last: EntryId, wait: float = 0.0) -> Follower:
        """Somebody who follows a request from what comes after `last`, and calls `leave` at the end.

        A log that is not there yet has `wait` seconds to appear.
        """
        if request_id not in self._requests:
            self._requests[request_id] = RequestFollowers(self, request_id)
        if self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(_TICK, self._look_for_silence)
        return Follower(self.logs, self._requests[request_id], last, wait)

    def settle(self, request: "RequestFollowers") -> None:
        """Have its followers read the log again and again, until it is settled."""
        if not self.settling:
            asyncio.get_running_loop().call_later(_SETTLING, self._go_on_settling)
        self.settling[request] = None

    def forget(self, request: "RequestFollowers") -> None:
        """Nobody follows it any more."""
        if self._requests.get(request.id) is request:
            del self._requests[request.id]
        self.settling.pop(request, None)

    async def aclose(self) -> None:
        """Close every connection; whoever still follows gets `Unavailable`."""
        if self._tick is not None:
            self._tick.cancel()
        for request in self._requests.values():
            request.look_up()
        await self.logs.aclose()
        await self.subscriptions.aclose()
        await self._redis.aclose()

    def _go_on_settling(self) -> None:
        now = asyncio.get_running_loop().time()
        for request in list(self.settling):
            if not request.has_told:
                request.look_up()
            if request.has_told or request.settles_until < now:
                del self.settling[request]
        if self.settling and not self.logs.is_closed:
            asyncio.get_running_loop().call_later(_SETTLING, self._go_on_settling)

    def _look_for_silence(self, requests: Sequence["RequestFollowers"] = ()) -> None:
        """A few requests at a time, for messages wait meanwhile."""
        requests = requests or list(self._requests.values())
        for request in requests[:_AT_ONCE]:
            for follower in request.followers:
                follower.tick()
        again = asyncio.get_running_loop().call_later
        if rest := requests[_AT_ONCE:]:
            self._tick = again(_SPARED, self._look_for_silence, rest)
        else:
            self._tick = again(_TICK, self._look_for_silence) if self._requests else None


class RequestFollowers:
    """A request that is followed: a subscription, as soon as somebody has read all there is, for all who follow it."""

    def __init__(self, following: Followers, request_id: str) -> None:
        self.id = request_id
        self.followers: dict[Follower, None] = {}
        self.settles_until = 0.0
        """By the event loop's clock, if nothing is told before."""
        self.is_heard = self.has_told = False
        self._following = following
        self._channel = following.keys.feed(request_id)
        self._is_subscribed = False

    def subscribe(self) -> None:
        """Listen to the feed, if nobody does yet."""
        if not self._is_subscribed:
            self._is_subscribed = True
            self._following.subscriptions.subscribe(self._channel, self)
            self._settle()

    def leave(self, follower: Follower) -> None:
        """One follower less."""
        if self.followers.pop(follower, self) is None and not self.followers:
            self._following.forget(self)
            if self._is_subscribed:
                self._following.subscriptions.unsubscribe(self._channel)

    def look_up(self, *, alive: bool = False) -> None:
        """Have the log read, and if `alive` whether it is there at all."""
        for follower in self.followers:
            follower.look_up(alive=alive)

    def on_message(self, payload: bytes) -> None:
        """See `Listener`, also below."""
        self.has_told = True
        try:
            entries = read_message(payload)
        except BadEntry:
            self.look_up()
            return
        size = len(payload)
        for follower in list(self.followers):  # what one pours into may begin to follow the same request
            follower.tell(entries, size)

    def on_subscribed(self) -> None:
        self.is_heard, self.has_told = True, False
        self._settle()
        self.look_up()

    def on_interrupted(self) -> None:
        self.is_heard = self.has_told = False
        self.look_up()

    @property
    def is_settled(self) -> bool:
        """Whether every entry that is accepted is told, as far as that can be known."""
        return self.is_heard and (self.has_told or self not in self._following.settling)

    def _settle(self) -> None:
        self.settles_until = asyncio.get_running_loop().time() + _SETTLED_AFTER
        self._following.settle(self)

    def on_refused(self, error: Exception) -> None:  # noqa: ARG002 - see `Listener`
        self._is_subscribed = False
        for follower in list(self.followers):
            follower.go_alone()

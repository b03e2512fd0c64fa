"""The requests that one client follows, each with its followers and one subscription, and their shared timers."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from redis.asyncio import Redis

from ...contract.entries import BadEntry
from ...contract.feed import read_message
from ...contract.ids import BEFORE_ALL, EntryId
from ...contract.keys import Keys
from ...redisio.clients import blocking_client, command_client
from ...redisio.subscriptions import Subscriptions
from ..errors import MappedRetry
from ..log_reader import LogReader
from ..timings import Timings
from .follower import Follower
from .machine import FEED_TRANSITIONS, FeedInput, FeedState

_TICKED_AT_ONCE, _TICK_GAP = 200, 0.001
"""How many requests get a tick in one step, during which messages wait; and seconds between two such steps."""

_LIVE = FeedState.LIVE
"""A constant, because looking up a member of an enum is slow in Python 3.11, and this one is used for every message."""


class Followers:
    """All followers of a client. Two connections to each server are enough for any number of requests."""

    def __init__(self, redis: Redis, keys: Keys, logs: LogReader) -> None:
        self.keys = keys
        self.logs = logs
        self.timings = logs.timings
        self.subscriptions = Subscriptions(redis, retry_refused_after=self.timings.retry_refused_after)
        self._redis = redis
        self.requests: dict[str, RequestFollowers] = {}
        """The requests that are followed, by id."""
        self._unnoticed: dict[RequestFollowers, None] = {}
        """Requests whose log is read repeatedly until publishers have noticed their subscription."""
        self._tick: asyncio.TimerHandle | None = None

    @classmethod
    def connect(cls, url: str, keys: Keys, retry: MappedRetry, timings: Timings) -> Self:
        """Create the followers of a client, with their own connections.

        Raises:
            ValueError: when the URL is not valid.
        """
        redis = command_client(url, connections=2, timeout=timings.command_timeout)
        blocking = blocking_client(url, timings.block, timeout=timings.command_timeout)
        return cls(redis, keys, LogReader(redis, blocking, keys, retry, timings))

    def follow(self, request_id: str, after: EntryId, wait: float = 0.0) -> Follower:
        """Return a follower of a request from the entry after `after`. The caller must call `leave` at the end.

        A log that does not exist yet has `wait` seconds to appear.
        """
        if request_id not in self.requests:
            self.requests[request_id] = RequestFollowers(self, request_id)
        if self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(self.timings.tick, self._on_tick)
        return Follower(self.logs, self.requests[request_id], after, wait)

    def expect(self, request_id: str) -> Callable[[], None]:
        """Subscribe to the feed of a request that is about to be enqueued. Returns a function that ends this.

        The first entries of a log are published to the subscribers of that moment. One that subscribes later gets
        the next ones only by reading the log, until the publisher has noticed it.
        """
        follower = self.follow(request_id, BEFORE_ALL)
        request = self.requests[request_id]
        request.subscribe()
        return Expectation(request, follower)

    def is_subscribed(self, request_id: str) -> bool:
        """Whether Redis has confirmed the subscription to the feed of a request, and its connection is not lost."""
        request = self.requests.get(request_id)
        return request is not None and request.feed not in (FeedState.ABSENT, FeedState.PENDING)

    def reread_until_noticed(self, request: "RequestFollowers") -> None:
        """Let the followers of a request read the log repeatedly until publishers have noticed its subscription."""
        if not self._unnoticed:
            asyncio.get_running_loop().call_later(self.timings.reread_pause, self._reread_unnoticed)
        self._unnoticed[request] = None

    def forget(self, request: "RequestFollowers") -> None:
        """Forget a request that has no more followers."""
        if self.requests.get(request.id) is request:
            del self.requests[request.id]
        self._unnoticed.pop(request, None)

    async def aclose(self) -> None:
        """Close every connection. All followers get `Unavailable`."""
        if self._tick is not None:
            self._tick.cancel()
        for request in self.requests.values():
            request.look_up()
        await self.logs.aclose()
        await self.subscriptions.aclose()
        await self._redis.aclose()

    def _reread_unnoticed(self) -> None:
        now = asyncio.get_running_loop().time()
        for request in list(self._unnoticed):
            if request.feed is not FeedState.LIVE:
                request.look_up()
            if request.feed is FeedState.LIVE or request.noticed_at < now:
                del self._unnoticed[request]
                request.on_feed(FeedInput.TIME_PASSED)
        if self._unnoticed and not self.logs.is_closed:
            asyncio.get_running_loop().call_later(self.timings.reread_pause, self._reread_unnoticed)

    def _on_tick(self, requests: Sequence["RequestFollowers"] = ()) -> None:
        requests = requests or list(self.requests.values())
        for request in requests[:_TICKED_AT_ONCE]:
            for follower in request.followers:
                follower.on_tick()
        call_later = asyncio.get_running_loop().call_later
        if rest := requests[_TICKED_AT_ONCE:]:
            self._tick = call_later(_TICK_GAP, self._on_tick, rest)
        else:
            self._tick = call_later(self.timings.tick, self._on_tick) if self.requests else None


class RequestFollowers:
    """The followers of one request. They share a subscription, which begins once one has read the log to its end."""

    def __init__(self, client_followers: Followers, request_id: str) -> None:
        self.id = request_id
        self.followers: dict[Follower, None] = {}
        self.feed = FeedState.ABSENT
        self.noticed_at = 0.0
        """When publishers have noticed the subscription if no message comes before, by the event loop's clock."""
        self._client_followers = client_followers
        self._channel = client_followers.keys.feed(request_id)

    def subscribe(self) -> None:
        """Subscribe to the feed, unless that was done."""
        if self.feed is FeedState.ABSENT:
            self.on_feed(FeedInput.SUBSCRIBE)
            self._client_followers.subscriptions.subscribe(self._channel, self)
            self._await_notice()

    def leave(self, follower: Follower) -> None:
        """Remove a follower. The last one ends the subscription."""
        if self.followers.pop(follower, self) is None and not self.followers:
            self._client_followers.forget(self)
            self._client_followers.subscriptions.unsubscribe(self._channel)

    def look_up(self) -> None:
        """Let every follower read the log."""
        for follower in self.followers:
            follower.look_up()

    def on_feed(self, event: FeedInput) -> None:
        """Handle a change of the subscription."""
        self.feed = FEED_TRANSITIONS.get((self.feed, event), self.feed)

    def on_message(self, payload: bytes) -> None:
        """See `Listener`, also below."""
        if self.feed is not _LIVE:
            self.on_feed(FeedInput.MESSAGE)
        try:
            entries = read_message(payload)
        except BadEntry:
            self.look_up()
            return
        size = len(payload)
        for follower in list(self.followers):  # pouring may add a follower of the same request
            follower.on_message(entries, size)

    def on_subscribed(self) -> None:
        self.on_feed(FeedInput.CONFIRMED)
        self._await_notice()
        for follower in self.followers:
            follower.return_to_feed()
        self.look_up()

    def on_interrupted(self) -> None:
        self.on_feed(FeedInput.INTERRUPTED)
        self.look_up()

    def on_refused(self, error: Exception) -> None:  # noqa: ARG002 - see `Listener`
        self.on_feed(FeedInput.REFUSED)
        for follower in self.followers:
            follower.fall_back()

    def _await_notice(self) -> None:
        self.noticed_at = asyncio.get_running_loop().time() + self._client_followers.timings.noticed_after
        self._client_followers.reread_until_noticed(self)


class Expectation:
    """Holds the subscription of a request that is about to be enqueued. The first call ends that."""

    __slots__ = ("_follower", "_request")

    def __init__(self, request: RequestFollowers, follower: Follower) -> None:
        self._request = request
        self._follower: Follower | None = follower

    def __call__(self) -> None:
        if self._follower is not None:
            self._request.leave(self._follower)
            self._follower = None

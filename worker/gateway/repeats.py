"""Nothing is asked twice: a request that was sent again gets the answer that the first one began.

An `Idempotency-Key` names the answer, so it needs nothing of this. Most clients send none. What they send again is told
from a new request by three things:

- An SDK counts its tries in `x-stainless-retry-count`.
- A browser sends a POST again, unnoticed, if its connection closes before the first byte of the response. So a
  repetition without a count concerns only a request for which no byte was sent.
- In both cases nobody follows the first request any more. Identical requests at the same time are all followed.

Redis has two sets for each fingerprint (of the owner, the API key and the body): the young requests, and those of them
for which no byte was sent. A gateway adds a request once its own subscription to the feed is confirmed, and removes it
before that subscription ends. A call that attaches first removes the request from both sets, so only one does. Until a
gateway follows a new or attached request, the sets have it with a mark: nobody may attach yet, and a repetition looks
again soon.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from ..client.async_client import Client, State
from ..client.errors import ClientError, MappedRetry
from ..contract.canonical import canonical_json
from ..contract.keys import Keys
from ..redisio.cluster import ClusterClient, server_of
from .access import Requester

_YOUNG = 15 * 60
"""Seconds for which the retry of an SDK attaches: longer than the 10 minutes after which the SDKs give up a try."""
_UNANSWERED = 60
"""Seconds for which a browser's repetition attaches. A response without a byte for longer is rare: see `answers.py`."""
_PENDING = "~"
"""The mark before the id of a request that no gateway follows yet, and soon one will."""
_CANDIDATES = 32
"""How many requests with one fingerprint are looked at."""
_LOOK_AGAIN = 0.1
"""Seconds until the second look, if all are followed: a browser repeats a request before its former connection is
closed here."""


def fingerprint(caller: Requester, request: Mapping[str, object], options: Mapping[str, object]) -> str:
    """The hash by which a repetition is recognized: of who asks, the request and the options of its job."""
    who = canonical_json([caller.owner, caller.name])
    return hashlib.sha256(who + canonical_json([request, options])).hexdigest()[:40]


class Presence:
    """Whether somebody follows a request, in any process."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def followed(self, request_ids: Iterable[str]) -> dict[str, bool]:
        """Whether each request has a follower: a subscriber of its feed. Followers that only read logs do not count.

        Raises:
            RedisError: when Redis returns an error. A cluster before Redis 7 has no such command.
        """
        channels = {self._keys.feed(request_id): request_id for request_id in request_ids}
        if not channels:
            return {}
        counts: dict[str, bool] = {}
        if isinstance(self._redis, ClusterClient):
            for name, request_id in channels.items():
                server = await server_of(self._redis, name)
                ((_, count),) = await server.pubsub_shardnumsub(name)
                counts[request_id] = bool(count)
            return counts
        for channel, count in cast("list[tuple[bytes, int]]", await self._redis.pubsub_numsub(*channels)):
            counts[channels[channel.decode()]] = bool(count)
        return counts

    async def is_followed(self, request_id: str) -> bool:
        """Whether a request has a follower. Raises the errors of `followed`."""
        return (await self.followed([request_id]))[request_id]


class Repeats:
    """Finds the request that another one repeats."""

    def __init__(self, redis: Redis, keys: Keys, client: Client, presence: Presence, patience: float) -> None:
        self._redis = redis
        self._keys = keys
        self._client = client
        self.presence = presence
        self._retry = MappedRetry(patience)

    async def attach(
        self, fingerprint: str, new_id: str, *, is_retry: bool, count: Callable[[], Awaitable[object]]
    ) -> str | None:
        """Find the request that this one repeats, and claim it; returns its id, or None for a new request.

        Args:
            fingerprint: see `fingerprint`.
            new_id: the id of the request if it is new. It is marked as one that soon has a follower.
            is_retry: whether an SDK states that this is a retry.
            count: counts a repetition, or raises. The next repetition may then attach.

        Raises:
            ClientError: when Redis does not answer.
        """
        claimed = None
        found = await self._retry(self._look, fingerprint, new_id, is_retry=is_retry)
        if found:
            claimed = await self._claim(fingerprint, found, is_retry=is_retry)
            if claimed is None:
                await asyncio.sleep(_LOOK_AGAIN)
                found = await self._retry(self._look, fingerprint, new_id, is_retry=is_retry)
                claimed = await self._claim(fingerprint, found, is_retry=is_retry)
        if claimed is not None:
            await self._retry(self.forget, fingerprint, new_id)
            try:
                await count()
            except BaseException:
                await self._retry(self.note, fingerprint, claimed, is_answered=is_retry)
                raise
        return claimed

    async def note(self, fingerprint: str, request_id: str, *, is_answered: bool) -> None:
        """Make a request known to those that repeat it. It has a follower, or will have none."""
        pipe = self._redis.pipeline()
        self._add(pipe, fingerprint, request_id, is_answered=is_answered)
        pipe.zrem(self._keys.asked(fingerprint), _PENDING + request_id)
        pipe.zrem(self._keys.unanswered(fingerprint), _PENDING + request_id)
        await pipe.execute()

    async def note_answered(self, fingerprint: str, request_id: str) -> None:
        """Note that the first byte of the response is sent."""
        await self._redis.zrem(self._keys.unanswered(fingerprint), request_id)

    async def forget(self, fingerprint: str, request_id: str) -> bool:
        """Let nobody attach to a request any more. Returns whether somebody could until now."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.zrem(self._keys.asked(fingerprint), request_id)
        for key in (self._keys.asked(fingerprint), self._keys.unanswered(fingerprint)):
            pipe.zrem(key, request_id, _PENDING + request_id)
        return bool((await pipe.execute())[0])

    async def _look(self, fingerprint: str, new_id: str, *, is_retry: bool) -> list[str]:
        """Mark a new request, and return the requests that it may repeat, the newest first."""
        key, window = self._keys.unanswered(fingerprint), _UNANSWERED
        if is_retry:
            key, window = self._keys.asked(fingerprint), _YOUNG
        pipe = self._redis.pipeline(transaction=False)
        since = int((time.time() - window) * 1000)
        pipe.zrevrangebyscore(key, "+inf", since, start=0, num=_CANDIDATES)
        self._add(pipe, fingerprint, _PENDING + new_id, is_answered=False)
        found = [member.decode() for member in cast("list[bytes]", (await pipe.execute())[0])]
        return [member for member in found if member != _PENDING + new_id]

    async def _claim(self, fingerprint: str, members: list[str], *, is_retry: bool) -> str | None:
        """Claim the first request that nobody follows; returns its id."""
        request_ids = [member for member in members if not member.startswith(_PENDING)]
        try:
            followed = await self._retry(self.presence.followed, request_ids)
        except ClientError:
            return None  # nobody knows who follows what: a second job is better than somebody else's answer
        for request_id in request_ids:
            if followed[request_id] or not await self._retry(self._mark, fingerprint, request_id, is_retry=is_retry):
                continue
            status = await self._client.status(request_id)
            if status.state not in (State.UNKNOWN, State.EXPIRED) and status.outcome != "cancelled":
                return request_id
            await self._retry(self.forget, fingerprint, request_id)
        return None

    async def _mark(self, fingerprint: str, request_id: str, *, is_retry: bool) -> bool:
        """Replace a request by its mark. Returns false if somebody else did."""
        sets = [self._keys.unanswered(fingerprint), self._keys.asked(fingerprint)]
        pipe = self._redis.pipeline()
        for key in reversed(sets) if is_retry else sets:
            pipe.zrem(key, request_id)
        self._add(pipe, fingerprint, _PENDING + request_id, is_answered=False)
        return bool((await pipe.execute())[0])

    def _add(self, pipe: Pipeline, fingerprint: str, member: str, *, is_answered: bool) -> None:
        now = int(time.time() * 1000)
        sets = [(self._keys.asked(fingerprint), _YOUNG), (self._keys.unanswered(fingerprint), _UNANSWERED)]
        for key, window in sets[:1] if is_answered else sets:
            pipe.zremrangebyscore(key, "-inf", now - window * 1000)
            pipe.zadd(key, {member: now})
            pipe.expire(key, window)

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
gateway follows a new or attached request, the sets have it with a mark: nobody may attach yet.

A browser repeats a request within milliseconds, and on a busy machine Redis learns later than that that nobody follows
the first one. So a call that finds requests and may attach to none looks again. How often depends on their connections:

- Open in this process: never. The kernel knows of a loss before the repetition can arrive.
- Lost in this process: until Redis knows it too.
- In another process: a few times.
"""

import asyncio
import hashlib
import socket
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
from .outlets import Wire

_YOUNG = 15 * 60
"""Seconds for which the retry of an SDK attaches: longer than the 10 minutes after which the SDKs give up a try."""
_UNANSWERED = 60
"""Seconds for which a browser's repetition attaches. A response without a byte for longer is rare: see `answers.py`."""
_PENDING = "~"
"""The mark before the id of a request that no gateway follows yet, and soon one will."""
_CANDIDATES = 32
"""How many requests with one fingerprint are looked at."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.1
"""Seconds between two looks. Each pause is twice the one before."""
_LOOKS_ELSEWHERE = 5
"""How many looks there are while another process may still have to notice a loss. They take 0.15 s."""
_LOOKS_LOST = 100
"""How many looks there are while a connection of this process is lost and Redis does not know it. They take 10 s."""
_LOST_FOR = 10.0
"""Seconds for which a lost connection is remembered after the subscription to the feed was ended."""
_ESTABLISHED = 1
"""The state of a TCP connection that neither end has closed (Linux, `tcp_states.h`)."""


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
        self._wires: dict[str, Wire] = {}
        """The connections of this process whose clients wait for the first byte of a request."""

    async def attach(
        self, fingerprint: str, new_id: str, wire: Wire | None, *, is_retry: bool,
        count: Callable[[], Awaitable[object]],
    ) -> str | None:  # fmt: skip
        """Find the request that this one repeats, and claim it; returns its id, or None for a new request.

        Call `expect` for the request before anything else is awaited.

        Args:
            fingerprint: see `fingerprint`.
            new_id: the id of the request if it is new. It is marked as one that soon has a follower.
            wire: the connection of the client, if the server offers it.
            is_retry: whether an SDK states that this is a retry.
            count: counts a repetition, or raises. The next repetition may then attach.

        Raises:
            ClientError: when Redis does not answer.
        """
        if wire is not None:
            self._wires[new_id] = wire
        try:
            claimed = await self._find(fingerprint, new_id, is_retry=is_retry)
            if claimed is not None:
                await self._retry(self.forget, fingerprint, new_id)
                try:
                    await count()
                except BaseException:
                    await self._retry(self.note, fingerprint, claimed, is_answered=is_retry)
                    raise
        finally:
            self._wires.pop(new_id, None)
        return claimed

    def expect(self, request_id: str, wire: Wire | None) -> Callable[[], None]:
        """Subscribe to the feed of a request, by which others see that it is followed. Returns what ends this."""
        release = self._client.expect(request_id)
        if wire is None:
            return release
        self._wires[request_id] = wire

        def forget_wire() -> None:
            if self._wires.get(request_id) is wire:
                del self._wires[request_id]

        def end() -> None:
            release()
            if self._is_open(request_id):
                forget_wire()
            else:  # Redis still has to learn that nobody follows the request
                asyncio.get_running_loop().call_later(_LOST_FOR, forget_wire)

        return end

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

    async def _find(self, fingerprint: str, new_id: str, *, is_retry: bool) -> str | None:
        """Claim a request that this one repeats; returns its id. Looks again while the client of one may be lost."""
        found = await self._retry(self._look, fingerprint, new_id, is_retry=is_retry)
        ids, looks, pause = {member.removeprefix(_PENDING) for member in found}, 1, _FIRST_PAUSE
        while found:
            claimed = await self._claim(fingerprint, found, is_retry=is_retry)
            if claimed is not None:
                return claimed
            are_open = {self._is_open(member.removeprefix(_PENDING)) for member in found}
            if are_open == {True} or looks >= (_LOOKS_LOST if False in are_open else _LOOKS_ELSEWHERE):
                return None
            await asyncio.sleep(pause)
            pause, looks = min(2 * pause, _LONGEST_PAUSE), looks + 1
            found = await self._retry(self._look, fingerprint, new_id, is_retry=is_retry)
            found = [member for member in found if member.removeprefix(_PENDING) in ids]
        return None

    def _is_open(self, request_id: str) -> bool | None:
        """Whether the client of a request is connected to this process; None if nothing here knows its connection.

        The kernel is asked, because the event loop may not have read the end of the connection yet.
        """
        wire = self._wires.get(request_id)
        if wire is None or not hasattr(socket, "TCP_INFO"):
            return None
        if wire.transport.is_closing():
            return False
        connection = wire.transport.get_extra_info("socket")
        return bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED)

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
            if (
                followed[request_id]
                or self._is_open(request_id)
                or not await self._retry(self._mark, fingerprint, request_id, is_retry=is_retry)
            ):
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

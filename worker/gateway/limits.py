"""The limits of API keys, counted in Redis so that all replicas share them: in flight, queued, requests a minute.

A tenant's requests that have not been seen to end are a sorted set. Those that have not been seen to start are another.
The replica that sees an end removes the id. A request may also start, or end, while nobody follows it. So the state of
some ids is read at a limit, and of a few after every so many requests.
"""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar, cast

from ..client.async_client import Client, State
from ..client.errors import ClientError, MappedRetry
from ..contract.keys import Keys
from ..redisio.batching import CommandBatcher
from ..redisio.pipelined import pack
from ..redisio.scripts import Script
from .access import Requester
from .ids import owner_hash
from .problems import RETRY_AFTER, Problem

_T = TypeVar("_T")

_EXPIRE_MS = 25 * 3600 * 1000
"""How long an id is remembered that nobody sees end: longer than a job's default deadline."""

_LOOKED_AT = 64
"""How many ids are looked at when a limit is reached."""

LOOKS_EVERY = 64
"""The requests of an owner in this process after which some of its ids are looked at."""

_LOOKS = (16, 2 * LOOKS_EVERY)
"""How many ids are looked at then: a few, and more if many of these have ended.

That is twice as many as may have come. So where nobody sees any request end, about as many ids of ended ones stay as
there are requests that run.
"""

_MOST = 10_000
"""How many ids are read at a limit, to choose from."""

_ADDED_WITHIN = 120.0
"""Seconds after which a request that was counted is in its queue, or was not added."""

_FULL_FOR = 0.25
"""Seconds for which a full tenant is refused without another look at its requests."""

# One script, because between two commands other replicas would admit requests as well. KEYS: running, waiting, rate.
# ARGV: id, now (Unix ms), expiry (ms), and the limits in flight, queued, a minute; 0 is none.
_ADMIT = Script("""
local id, now, keep = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local most, most_waiting, most_a_minute = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if most_a_minute > 0 then
  local count = redis.call('INCRBY', KEYS[3], 1)
  redis.call('EXPIRE', KEYS[3], 120)
  if count > most_a_minute then return 'rate' end
end
if id == '' then return '' end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - keep)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - keep)
if redis.call('ZSCORE', KEYS[1], id) then return '' end
if most > 0 and redis.call('ZCARD', KEYS[1]) >= most then return 'running' end
if most_waiting > 0 and redis.call('ZCARD', KEYS[2]) >= most_waiting then return 'waiting' end
redis.call('ZADD', KEYS[1], now, id)
redis.call('PEXPIRE', KEYS[1], keep)
if most_waiting > 0 then
  redis.call('ZADD', KEYS[2], now, id)
  redis.call('PEXPIRE', KEYS[2], keep)
end
return ''
""")

_REFUSALS = {
    "rate": "this key has made as many requests in this minute as it may: try again in the next one",
    "running": "as many requests of this key wait or run as may: try again when one has ended",
    "waiting": "as many requests of this key wait as may: try again when one has started",
}


def has_limits(caller: Requester) -> bool:
    """Whether a limit may refuse a request of a caller."""
    key = caller.key
    return key is not None and (key.in_flight, key.queued, key.requests_per_minute) != (None, None, None)


class Limits:
    """Counts the requests of all callers.

    Every method raises a `ClientError` if Redis does not answer or refuses; the client then gets status 503 or 500.
    """

    def __init__(
        self, commands: CommandBatcher, keys: Keys, client: Client, patience: float,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._redis = commands.redis
        self._commands = commands
        self._keys = keys
        self._client = client
        self._retry = MappedRetry(patience)
        self._now = now
        self._full_until: dict[tuple[str, str], float] = {}
        self._admitted = Counter[str]()
        """The requests of each owner that this process has counted."""

    async def admit(self, caller: Requester, request_id: str) -> None:
        """Count a new request, or refuse it. A request that is counted already is admitted again.

        Raises:
            Problem: when a limit of the caller's key is reached (429).
        """
        verdict = await self._try(caller, request_id)
        for _ in range(2):  # each of the two limits may be reached by requests that no longer count
            if verdict in ("running", "waiting") and await self._forget_old(caller.owner, verdict):
                verdict = await self._try(caller, request_id, is_counted=True)
        if verdict:
            raise self._refusal(verdict)
        self._admitted[caller.owner] += 1
        if self._admitted[caller.owner] % LOOKS_EVERY == 0:
            with suppress(ClientError):  # the next look may succeed
                await self._forget_unseen_ends(caller.owner)

    async def admit_to(self, caller: Requester, request_id: str, add: Callable[[], Awaitable[_T]]) -> _T:
        """Count a new request, and add it by `add` unless a limit refuses it; returns what `add` returns.

        Without a limit the count refuses nothing, so both are sent at once.

        Raises:
            Problem: when a limit of the caller's key is reached (429).
        """
        if has_limits(caller):
            await self.admit(caller, request_id)
            return await add()
        added, _ = await asyncio.gather(add(), self.admit(caller, request_id))
        return added

    async def count(self, caller: Requester) -> None:
        """Count a request that starts no job, such as a read, against the requests a minute.

        Raises:
            Problem: when there are too many in this minute (429).
        """
        if caller.key is not None and caller.key.requests_per_minute is not None and await self._try(caller, ""):
            raise self._refusal("rate")

    async def ended(self, owner: str, *request_ids: str) -> None:
        """Requests have ended, or were not added after all."""
        hashed = owner_hash(owner)
        await self._retry(self._remove, [self._keys.running(hashed), self._keys.waiting(hashed)], request_ids)

    async def running(self, owner: str, most: int = 1000) -> list[str]:
        """The requests of an owner that have not been seen to end, the newest first."""
        key = self._keys.running(owner_hash(owner))

        async def read() -> list[str]:
            return [found.decode() for found in cast("list[bytes]", await self._redis.zrevrange(key, 0, most - 1))]

        return await self._retry(read)

    async def _try(self, caller: Requester, request_id: str, *, is_counted: bool = False) -> str:
        """Count a request if no limit is reached; returns the limit that is, or empty."""
        key, owner = caller.key, owner_hash(caller.owner)
        a_minute = 0 if is_counted or key is None else key.requests_per_minute or 0
        names = [
            self._keys.running(owner), self._keys.waiting(owner), self._keys.rate(owner, int(self._now()) // 60)
        ]  # fmt: skip
        limits = (0, 0) if key is None else (key.in_flight or 0, key.queued or 0)
        arguments = [request_id, int(self._now() * 1000), _EXPIRE_MS, *limits, a_minute]
        verdict: bytes = await self._retry(_ADMIT.run, self._commands, names, list(map(str, arguments)))
        return verdict.decode()

    async def _forget_old(self, owner: str, which: str) -> bool:
        """Remove some ids that have ended or, if `which` is `waiting`, have started.

        Returns whether there were any.
        """
        now = self._now()
        if self._full_until.get((owner, which), -math.inf) > now:
            return False
        hashed = owner_hash(owner)
        key = self._keys.running(hashed) if which == "running" else self._keys.waiting(hashed)
        over = await self._over_among(await self._some_of(key, _LOOKED_AT, among=_MOST), which)
        if not over:
            self._full_until = {place: until for place, until in self._full_until.items() if until > now}
            self._full_until[owner, which] = now + _FULL_FOR
            return False
        await self._retry(self._remove, [key], over)
        return True

    async def _forget_unseen_ends(self, owner: str) -> None:
        """Remove some ids of requests that have ended."""
        for most in _LOOKS:
            known = await self._some_of(self._keys.running(owner_hash(owner)), most, among=most)
            over = await self._over_among(known, "running")
            if over:
                await self.ended(owner, *over)
            if len(over) <= len(known) / 4:
                return

    async def _some_of(self, key: str, most: int, *, among: int) -> dict[str, float]:
        """Random ids, each with the Unix ms of its count: the oldest may all be long answers.

        They are chosen from `among` that were counted one after another.
        """

        async def read() -> list[tuple[bytes, float]]:
            first = random.randint(0, max(0, await self._redis.zcard(key) - among))  # noqa: S311 - a sample
            return cast(
                "list[tuple[bytes, float]]", await self._redis.zrange(key, first, first + among - 1, withscores=True)
            )

        found = await self._retry(read)
        chosen = random.sample(found, min(most, len(found)))
        return {request_id.decode(): counted for request_id, counted in chosen}

    async def _over_among(self, known: Mapping[str, float], which: str) -> Sequence[str]:
        """Those ids that have ended or, if `which` is `waiting`, have started."""
        found = await asyncio.gather(*map(self._client.status, known))
        gone = {State.ENDED, State.EXPIRED} if which == "running" else {State.ENDED, State.EXPIRED, State.RUNNING}
        # A request that is being added has no log yet. If it has none later, the process that counted it has died.
        young = (self._now() - _ADDED_WITHIN) * 1000
        return [
            request_id
            for (request_id, counted), status in zip(known.items(), found, strict=True)
            if status.state in gone or (status.state is State.UNKNOWN and counted < young)
        ]

    async def _remove(self, keys: Sequence[str], ids: Sequence[str]) -> None:
        """Remove ids from sets of one owner, which share a slot of a cluster."""
        words = [request_id.encode() for request_id in ids]
        packed = [pack(b"ZREM", key.encode(), *words) for key in keys]
        await self._commands.execute(keys[0], b"".join(packed), len(packed))

    def _refusal(self, limit: str) -> Problem:
        seconds = math.ceil(60 - self._now() % 60) if limit == "rate" else RETRY_AFTER
        return Problem(429, "rate_limit_exceeded", _REFUSALS[limit], headers={"Retry-After": str(seconds)})

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
- In another process: that process is asked, and the same holds.
- In none that answers, as one that is stuck: a few times.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect

from ..client.async_client import Client, State
from ..client.enqueuing import Enqueuer, NoRivals
from ..client.errors import ClientError, MappedRetry
from ..client.new_job import NewJob
from ..contract.canonical import canonical_json
from ..contract.keys import Keys
from ..redisio.batching import CommandBatcher
from ..redisio.cluster import ClusterClient
from ..redisio.pipelined import pack
from .access import Requester
from .neighbours import Neighbours
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
_LOOKS_UNKNOWN = 5
"""How many looks there are while a process that does not answer may still have to notice a loss. They take 0.15 s."""
_LOOKS_LOST = 100
"""How many looks there are while a connection is lost and Redis does not know it. They take 10 s."""
_LOST_FOR = 10.0
"""Seconds for which a lost connection is remembered after the subscription to the feed was ended."""

_Command: TypeAlias = tuple[str | int, ...]


def fingerprint(caller: Requester, request: Mapping[str, object], options: Mapping[str, object]) -> str:
    """The hash by which a repetition is recognized: of who asks, the request and the options of its job."""
    who = canonical_json([caller.owner, caller.name])
    return hashlib.sha256(who + canonical_json([request, options])).hexdigest()[:40]


class Presence:
    """Whether somebody follows a request, in any process."""

    def __init__(self, commands: CommandBatcher, keys: Keys) -> None:
        self._commands = commands
        self._keys = keys

    async def followed(self, request_ids: Iterable[str]) -> dict[str, bool]:
        """Whether each request has a follower: a subscriber of its feed. Followers that only read logs do not count.

        Raises:
            RedisError: when Redis returns an error. A cluster before Redis 7 has no such command.
        """
        channels = {self._keys.feed(request_id): request_id for request_id in request_ids}
        if isinstance(self._commands.redis, ClusterClient):
            replies = [await self._counts(b"SHARDNUMSUB", name) for name in channels]
            counts = [word for reply in replies for word in reply]
        else:
            counts = await self._counts(b"NUMSUB", *channels) if channels else []
        return {request_id: bool(count) for request_id, count in zip(channels.values(), counts[1::2], strict=True)}

    async def _counts(self, command: bytes, *channels: str) -> list[Any]:
        """The subscribers of channels, each after the name of its channel."""
        packed = pack(b"PUBSUB", command, *[name.encode() for name in channels])
        (counts,) = await self._commands.execute(channels[0], packed, 1)
        return list(counts)

    async def is_followed(self, request_id: str) -> bool:
        """Whether a request has a follower. Raises the errors of `followed`."""
        return (await self.followed([request_id]))[request_id]


class Repeats:
    """Finds the request that another one repeats."""

    def __init__(
        self, commands: CommandBatcher, keys: Keys, client: Client, neighbours: Neighbours, patience: float
    ) -> None:
        self._commands = commands
        self.adds = not isinstance(commands.redis, ClusterClient)
        """Whether `add` can be used."""
        self._enqueuer = Enqueuer(commands.redis, commands, keys)
        self._keys = keys
        self._client = client
        self._neighbours = neighbours
        self._wires = neighbours.wires
        self.presence = Presence(commands, keys)
        self._retry = MappedRetry(patience)

    async def attach(
        self, fingerprint: str, new_id: str, wire: Wire | None, *, is_retry: bool,
        count: Callable[[], Awaitable[object]], found: Sequence[str] | None = None,
    ) -> str | None:  # fmt: skip
        """Find the request that this one repeats, and claim it; returns its id, or None for a new request.

        Call `expect` for the request before anything else is awaited.

        Args:
            fingerprint: see `fingerprint`.
            new_id: the id of the request if it is new. It is marked as one that soon has a follower.
            wire: the connection of the client, if the server offers it and `expect` was not called for `new_id`.
            is_retry: whether an SDK states that this is a retry.
            count: counts a repetition, or raises. The next repetition may then attach.
            found: the result of `add`, if the request has its mark already.

        Raises:
            ClientError: when Redis does not answer.
            ClientDisconnect: when the client has left, and the request is not the only one of its kind.
        """
        if wire is not None:
            self._wires[new_id] = wire
        try:
            if found is None:
                found = await self._retry(self._look, fingerprint, new_id, is_retry=is_retry)
            claimed = await self._find(fingerprint, new_id, found, is_retry=is_retry)
            if claimed is not None:
                await self._retry(self.forget, fingerprint, new_id)
                try:
                    await count()
                except BaseException:
                    await self._retry(self.note, fingerprint, claimed, is_answered=is_retry)
                    raise
        finally:
            if wire is not None:
                del self._wires[new_id]
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
            if self._neighbours.is_open(request_id):
                forget_wire()
            else:  # Redis still has to learn that nobody follows the request
                asyncio.get_running_loop().call_later(_LOST_FOR, forget_wire)

        return end

    def is_subscribed(self, request_id: str) -> bool:
        """Whether Redis has confirmed the subscription of this process, so that others see the request followed."""
        return self._client.is_subscribed(request_id)

    async def note(self, fingerprint: str, request_id: str, *, is_answered: bool) -> None:
        """Make a request known to those that repeat it. It has a follower, or will have none."""
        pending = _PENDING + request_id
        await self._run(
            fingerprint,
            ("MULTI",),
            *self._adding(fingerprint, request_id, is_answered=is_answered),
            *(("ZREM", key, pending) for key in self._sets(fingerprint)),
            ("EXEC",),
        )

    async def note_answered(self, fingerprint: str, request_id: str) -> None:
        """Note that the first byte of the response is sent."""
        await self._run(fingerprint, ("ZREM", self._keys.unanswered(fingerprint), request_id))

    async def forget(self, fingerprint: str, request_id: str) -> bool:
        """Let nobody attach to a request any more. Returns whether somebody could until now."""
        asked, unanswered = self._sets(fingerprint)
        was_known, *_ = await self._run(
            fingerprint,
            ("ZREM", asked, request_id),
            ("ZREM", asked, _PENDING + request_id),
            ("ZREM", unanswered, request_id, _PENDING + request_id),
        )
        return bool(was_known)

    async def add(self, fingerprint: str, new: NewJob, *, is_retry: bool) -> list[str]:
        """Add the job of a request unless it may repeat another one, in the step that looks for these, and mark it.

        Returns the requests for `attach`; none if the job was added. Call `expect` before, and not in a cluster, whose
        slots this step would cross.

        Raises:
            Conflict: when the id belongs to another request.
            ClientError: when Redis does not answer.
        """
        now, window = int(time.time() * 1000), _YOUNG if is_retry else _UNANSWERED
        condition = NoRivals(
            self._sets(fingerprint), _PENDING + new.job.id, 1 if is_retry else 2,
            since=now - window * 1000, most=_CANDIDATES, now=now, kept_1=_YOUNG, kept_2=_UNANSWERED,
        )  # fmt: skip
        return await self._retry(self._enqueuer.add, *new, condition)

    async def _find(self, fingerprint: str, new_id: str, found: Sequence[str], *, is_retry: bool) -> str | None:
        """Claim a request that this one repeats; returns its id. Looks again while the client of one may be lost."""
        ids, looks, pause = {member.removeprefix(_PENDING) for member in found}, 1, _FIRST_PAUSE
        elsewhere = dict[str, bool]()
        while found:
            if self._neighbours.is_open(new_id) is False:
                # The client has left, or its next repetition may have claimed the request already: no job is needed.
                await self._retry(self.forget, fingerprint, new_id)
                raise ClientDisconnect
            waiting = [member for member in found if not member.startswith(_PENDING)]
            try:
                followed = await self._retry(self.presence.followed, waiting)
            except ClientError:
                return None  # nobody knows who follows what: a second job is better than somebody else's answer
            claimed = await self._claim(fingerprint, followed, is_retry=is_retry)
            if claimed is not None:
                return claimed
            known = {request_id: self._neighbours.is_open(request_id) for request_id in ids}
            if looks == 1:
                elsewhere = await self._neighbours.ask([each for each, is_open in known.items() if is_open is None])
            are_open = {(known | elsewhere)[member.removeprefix(_PENDING)] for member in found}
            if are_open == {True} or looks >= (_LOOKS_LOST if False in are_open else _LOOKS_UNKNOWN):
                return None
            await asyncio.sleep(pause)
            pause, looks = min(2 * pause, _LONGEST_PAUSE), looks + 1
            found = await self._retry(self._look, fingerprint, new_id, is_retry=is_retry)
            found = [member for member in found if member.removeprefix(_PENDING) in ids]
        return None

    async def _look(self, fingerprint: str, new_id: str, *, is_retry: bool) -> list[str]:
        """Mark a new request, and return the requests that it may repeat, the newest first."""
        key, window = self._keys.unanswered(fingerprint), _UNANSWERED
        if is_retry:
            key, window = self._keys.asked(fingerprint), _YOUNG
        since = int((time.time() - window) * 1000)
        found, *_ = await self._run(
            fingerprint,
            ("ZREVRANGEBYSCORE", key, "+inf", since, "LIMIT", 0, _CANDIDATES),
            *self._adding(fingerprint, _PENDING + new_id, is_answered=False),
        )
        return [member.decode() for member in found if member.decode() != _PENDING + new_id]

    async def _claim(self, fingerprint: str, followed: Mapping[str, bool], *, is_retry: bool) -> str | None:
        """Claim the first request that nobody follows; returns its id."""
        for request_id, is_followed in followed.items():
            if (
                is_followed
                or self._neighbours.is_open(request_id)
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
        sets = self._sets(fingerprint)
        *_, executed = await self._run(
            fingerprint,
            ("MULTI",),
            *(("ZREM", key, request_id) for key in (sets if is_retry else reversed(sets))),
            *self._adding(fingerprint, _PENDING + request_id, is_answered=False),
            ("EXEC",),
        )
        return bool(executed[0])

    def _sets(self, fingerprint: str) -> tuple[str, str]:
        """The keys of the young requests, and of those for which no byte was sent."""
        return self._keys.asked(fingerprint), self._keys.unanswered(fingerprint)

    def _adding(self, fingerprint: str, member: str, *, is_answered: bool) -> list[_Command]:
        now = int(time.time() * 1000)
        commands = list[_Command]()
        for key, window in list(zip(self._sets(fingerprint), (_YOUNG, _UNANSWERED), strict=True))[: 2 - is_answered]:
            commands += [
                ("ZREMRANGEBYSCORE", key, "-inf", now - window * 1000),
                ("ZADD", key, now, member),
                ("EXPIRE", key, window),
            ]
        return commands

    async def _run(self, fingerprint: str, *commands: _Command) -> list[Any]:
        """Send commands about one fingerprint, whose sets share a slot of a cluster, and return their replies.

        Raises:
            RedisError: when Redis does not answer, or refuses one of them.
        """
        packed = b"".join([pack(*[str(word).encode() for word in command]) for command in commands])
        return await self._commands.execute(self._keys.asked(fingerprint), packed, len(commands))

"""How a process comes to own the log of a request, goes on under a later attempt, and seals it.

Every decision is read from the log itself, under a WATCH where two keys must agree, so each of these may be repeated
after a lost reply: what is already there is found and taken for what it is.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ResponseError, WatchError

from worker.broker.connection import TooFewReplicas
from worker.broker.jobs import Delivery, JobQueue
from worker.broker.log import LogFenced, LogGone, TokenLog, judge
from worker.broker.publisher import Publisher
from worker.contract.entries import (
    TAKEOVER,
    BadEntry,
    Claimed,
    Entry,
    Fields,
    Started,
    Terminal,
    parse,
    parse_leniently,
    to_fields,
    to_json,
)
from worker.contract.ids import SEAL, EntryId
from worker.contract.keys import Keys
from worker.contract.records import Tombstone

_RawEntry: TypeAlias = tuple[bytes, dict[bytes, bytes]]

_WAIT_MS = 1000
"""How long replicas may take to have the end of a log, until it is asked for again; a connection waits meanwhile."""

_MAX_WAITING = 8
"""How many connections may wait for replicas at once: the renewals of leases need one of the rest."""


@dataclass(frozen=True, slots=True)
class Owned:
    """The log is ours to write. `history` is what earlier attempts wrote; empty at the first.

    `unreadable` says why the history cannot be read; it is empty then.
    """

    log: TokenLog
    history: list[Entry]
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The request has ended: the log has its terminal entry, or only the tombstone is left."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Another job of the same request id is at work."""


@dataclass(frozen=True, slots=True)
class NotOurs:
    """Another worker holds the job by now: nothing is to be done, not even an acknowledgement."""


Taken: TypeAlias = Owned | Ended | Duplicate | NotOurs


class Owner:
    """What this process does with the logs of requests. `nonce` tells it from every other process, and life of one.

    `replicas` must have the end of a log before it is confirmed.
    """

    def __init__(
        self, redis: Redis, keys: Keys, jobs: JobQueue, publisher: Publisher, *, worker: str, nonce: str,
        now: Callable[[], int], replicas: int = 0,
    ) -> None:  # fmt: skip
        self._redis = redis
        self._keys = keys
        self._jobs = jobs
        self._publisher = publisher
        self._worker = worker
        self._nonce = nonce
        self._now = now
        self._replicas = replicas
        self._may_wait = asyncio.Semaphore(_MAX_WAITING)

    async def take(self, request_id: str, delivery: Delivery, expire_at: int, digest: str = "") -> Taken:
        """Come to own the log of a delivered job, or find why not.

        `expire_at` (Unix ms) is when a log that is never sealed expires; `digest` is the request's.
        """
        key = self._keys.tokens(request_id)
        while True:
            async with self._redis.pipeline() as pipe:
                await pipe.watch(key, self._keys.ended(request_id))
                tail = await _tail(pipe, key)
                if tail == SEAL:
                    return Ended()
                if await pipe.exists(self._keys.ended(request_id)):
                    return Ended()
                attempt = tail.attempt if tail else 0
                if attempt == 0 and not await self._start(pipe, request_id, delivery, expire_at, digest):
                    continue
                holder = await _entry(pipe, key, EntryId(attempt, 0)) if attempt else None
            # The connection is given back before more is asked: callers that each hold one and wait for a second
            # would wait for ever.
            if attempt == 0:
                return await self._owned(request_id, 1)
            # Not where this process had the job before: what that run sent may still be on its way to Redis.
            if tail is not None and tail.n == 0 and not delivery.again and self._wrote(holder, delivery):
                return await self._owned(request_id, attempt)  # our own entry, whose reply was lost
            if (refusal := await self._refusal(holder, delivery)) is not None:
                return refusal
            if await self._claim(request_id, attempt + 1, delivery, TAKEOVER, delivery.count):
                return await self._owned(request_id, attempt + 1)

    async def condemn(self, request_id: str, delivery: Delivery, end: Terminal, expire_at: int) -> bool:
        """Seal the log of a job with which this process cannot deal, knowing no more of it than its last id.

        True as well where the request has ended before. False where this is not ours to do: another job of the request
        is at work, or another worker has this one. `expire_at` is Unix ms; the rest is given to the log by whoever
        settles it.
        """
        key, ended = self._keys.tokens(request_id), self._keys.ended(request_id)
        while True:
            tail = await _tail(self._redis, key)
            if tail == SEAL or await self._redis.exists(ended):
                return True
            holder = await _entry(self._redis, key, EntryId(tail.attempt, 0)) if tail else None
            if await self._refusal(holder, delivery) is not None:
                return False
            async with self._redis.pipeline() as pipe:
                await pipe.watch(key, ended)
                if await _tail(pipe, key) != tail or await pipe.exists(ended):
                    continue
                _multi(pipe)
                _xadd(pipe, key, SEAL, to_fields(end), create=True)
                pipe.pexpireat(key, expire_at)
                try:
                    await pipe.execute()
                except WatchError:
                    continue
            return True

    async def _refusal(self, holder: Entry | None, delivery: Delivery) -> Duplicate | NotOurs | None:
        """Why a log that was begun is not ours to take over, or nothing when it is."""
        if isinstance(holder, Started | Claimed) and (holder.queue, holder.job) != (delivery.queue, delivery.id):
            # Another job of the same request began it: this one is a duplicate for as long as that one is to be done.
            return Duplicate() if await self._jobs.is_live(holder.queue, holder.job) else None
        return None if await self._jobs.holds(delivery) else NotOurs()

    async def begin_again(self, log: TokenLog, delivery: Delivery, expire_at: int, digest: str = "") -> None:
        """Make one's own log anew where it is gone though the request has not ended, as after a failover.

        It begins with `1-0`; its owner then goes on under a later attempt than it had, so that whoever has read the
        log that was lost sees what is new. Nothing is done to a log that is there.

        Raises:
            LogGone: when the request has ended: it was deleted or has expired.
            LogFenced: when the job is not ours any more.
        """
        ended = self._keys.ended(log.request_id)
        while await self._jobs.holds(delivery):
            async with self._redis.pipeline() as pipe:
                await pipe.watch(log.key, ended)
                if await _tail(pipe, log.key) is not None:
                    return
                if await pipe.exists(ended):
                    raise LogGone("the request has ended")
                if await self._start(pipe, log.request_id, delivery, expire_at, digest):
                    return
        raise LogFenced("Redis does not hold the log as it was, and the job is not with this worker any more")

    async def advance(self, log: TokenLog, delivery: Delivery, reason: str) -> None:
        """Go on under the next attempt of one's own log.

        Raises:
            LogLost: when the log is no longer ours.
        """
        attempt = log.attempt + 1
        if not await self._claim(log.request_id, attempt, delivery, reason):
            tail = await _tail(self._redis, log.key)
            lost = judge(tail, attempt, EntryId(attempt, 0))
            if lost is not None:
                raise lost
            if not self._wrote(await _entry(self._redis, log.key, EntryId(attempt, 0)), delivery):
                raise LogFenced(f"attempt {attempt} has begun")
        log.begin_attempt(attempt)

    async def seal(self, log: TokenLog, end: Terminal, tombstone: Tombstone, *, retention: int, remember: int) -> Entry:
        """Write the terminal entry with expiry and tombstone, all at once; gives the one that stands.

        The seal's id is above every attempt's, so it has a fence of its own: the log is watched while its last entry
        is compared with what this owner has written. `retention` and `remember` are seconds.

        Raises:
            LogLost: when the log is no longer ours.
        """
        await log.drained()
        ended = self._keys.ended(log.request_id)
        while True:
            async with self._redis.pipeline() as pipe:
                await pipe.watch(log.key)
                tail = await _tail(pipe, log.key)
                if tail == SEAL and (standing := await _entry(pipe, log.key, SEAL)):
                    return standing
                lost = judge(tail, log.attempt, log.accepted)
                if lost is not None:
                    raise lost
                _multi(pipe)
                _xadd(pipe, log.key, SEAL, to_fields(end), create=False)
                pipe.expire(log.key, retention)
                pipe.set(ended, to_json(tombstone), ex=remember)
                try:
                    await pipe.execute()
                except WatchError:
                    continue  # written after all with a lost reply, or cancelled meanwhile: look again
            return parse(str(SEAL), to_fields(end))

    async def confirm(self, request_id: str, tombstone: Tombstone, *, retention: int, remember: int) -> bool:
        """Before the acknowledgement: is the seal still there? Gives expiry and tombstone where they are missing.

        A log that is gone has its tombstone left. False when the end is lost, as after a failover: a tombstone then
        would keep everybody from writing another.

        Raises:
            TooFewReplicas: when it is not yet on as many replicas as it must be.
        """
        key = self._keys.tokens(request_id)
        while True:
            async with self._redis.pipeline() as pipe:
                await pipe.watch(key)
                if not await self._is_over(pipe, request_id):
                    return False
                _multi(pipe)
                pipe.expire(key, retention)
                pipe.set(self._keys.ended(request_id), to_json(tombstone), ex=remember, nx=True)
                try:
                    await pipe.execute()
                except WatchError:
                    continue  # somebody else set the expiry, or the connection was lost: look again
            return await self._replicated(request_id, retention) if self._replicas else True

    async def _replicated(self, request_id: str, retention: int) -> bool:
        """Wait until replicas have the end of a log; false when it is not there.

        WAIT counts what its own connection has written, hence the EXPIRE: whoever has that has the seal, which was
        written before it. The WATCH keeps all of it on one connection, and so on one server.
        """
        key = self._keys.tokens(request_id)
        async with self._turn_to_wait(), self._redis.pipeline() as pipe:
            await pipe.watch(key)
            if not await self._is_over(pipe, request_id):
                return False
            await pipe.expire(key, retention)
            there = cast("int", await pipe.execute_command("WAIT", self._replicas, _WAIT_MS))
        if there < self._replicas:
            raise TooFewReplicas(f"{there} of {self._replicas} replicas have the end of a log: its job is kept")
        return True

    @asynccontextmanager
    async def _turn_to_wait(self) -> AsyncIterator[None]:
        """A turn that does not come soon is no turn: whoever is told to stop meanwhile must see it."""
        try:
            async with asyncio.timeout(_WAIT_MS / 1000):
                await self._may_wait.acquire()
        except TimeoutError:
            raise TooFewReplicas("the ends of other logs wait for replicas: this one's job is kept") from None
        try:
            yield
        finally:
            self._may_wait.release()

    async def _is_over(self, pipe: Pipeline, request_id: str) -> bool:
        """Whether a log has its seal, or is gone and has left a tombstone."""
        tail = await _tail(pipe, self._keys.tokens(request_id))
        return tail == SEAL if tail else bool(await pipe.exists(self._keys.ended(request_id)))

    async def read(self, request_id: str) -> list[Entry]:
        """The whole log. Entries that cannot be read are in it as such of an unknown type."""
        return [parse_leniently(*entry) for entry in await self._raw(request_id)]

    async def _owned(self, request_id: str, attempt: int) -> Owned:
        key = self._keys.tokens(request_id)
        log = TokenLog(request_id, key, self._keys.feed(request_id), attempt, self._publisher)
        try:
            entries = [parse(*entry) for entry in await self._raw(request_id)]
        except BadEntry as error:
            return Owned(log, [], f"the log cannot be read: {error}")
        return Owned(log, [entry for entry in entries if entry.id.attempt < attempt])

    async def _raw(self, request_id: str) -> list[_RawEntry]:
        return cast("list[_RawEntry]", await self._redis.xrange(self._keys.tokens(request_id)))

    async def _start(self, pipe: Pipeline, request_id: str, delivery: Delivery, expire_at: int, digest: str) -> bool:
        _multi(pipe)
        started = Started(
            id=EntryId(1, 0), queue=delivery.queue, job=delivery.id, worker=self._worker, owner=self._nonce,
            time=self._now(), digest=digest, delivery=delivery.count,
        )  # fmt: skip
        key = self._keys.tokens(request_id)
        _xadd(pipe, key, started.id, to_fields(started), create=True)
        pipe.pexpireat(key, expire_at)
        try:
            await pipe.execute()
        except WatchError:
            return False
        self._announce(request_id, started)
        return True

    async def _claim(self, request_id: str, attempt: int, delivery: Delivery, reason: str, count: int = 0) -> bool:
        """Write `<attempt>-0`, which fences every earlier attempt. False when Redis refused: look again."""
        claimed = Claimed(
            id=EntryId(attempt, 0), queue=delivery.queue, job=delivery.id, worker=self._worker, owner=self._nonce,
            time=self._now(), reason=reason, delivery=count,
        )  # fmt: skip
        pipe = self._redis.pipeline(transaction=False)
        _xadd(pipe, self._keys.tokens(request_id), claimed.id, to_fields(claimed), create=False)
        try:
            (written,) = await pipe.execute()
        except ResponseError as error:
            if "equal or smaller" in str(error) or "exhausted the last" in str(error):
                return False
            raise
        if written is not None:
            self._announce(request_id, claimed)
        return written is not None

    def _announce(self, request_id: str, entry: Entry) -> None:
        self._publisher.announce(self._keys.feed(request_id), [(str(entry.id), to_fields(entry))])

    def _wrote(self, entry: Entry | None, delivery: Delivery) -> bool:
        return (
            isinstance(entry, Started | Claimed)
            and (entry.owner, entry.queue, entry.job) == (self._nonce, delivery.queue, delivery.id)
        )  # fmt: skip


def _multi(pipe: Pipeline) -> None:
    pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types


def _xadd(pipe: Pipeline, key: str, entry_id: EntryId, fields: Fields, *, create: bool) -> None:
    pipe.xadd(key, fields, id=str(entry_id), nomkstream=not create)  # type: ignore[arg-type]  # dict is invariant


async def _tail(redis: Redis, key: str) -> EntryId | None:
    raw = cast("list[_RawEntry]", await redis.xrevrange(key, count=1))
    return EntryId.parse(raw[0][0]) if raw else None


async def _entry(redis: Redis, key: str, entry_id: EntryId) -> Entry | None:
    raw = cast("list[_RawEntry]", await redis.xrange(key, str(entry_id), str(entry_id)))
    return parse_leniently(*raw[0]) if raw else None

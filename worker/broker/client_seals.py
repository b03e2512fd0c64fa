"""The seals that clients write: a cancel, and the end of a request whose deadline passed before anybody took it.

The client that writes one gives the log what belongs with it (expiry, tombstone) and informs followers and workers.
A worker that gets the job later finds the seal, mends what is missing, and does the rest.
"""

import time
from typing import cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from ..contract.entries import (
    Cancelled,
    Entry,
    Failed,
    Fields,
    Queued,
    Started,
    parse_leniently,
    to_fields,
    to_json,
)
from ..contract.ids import SEAL
from ..contract.keys import Keys
from ..contract.records import Tombstone
from ..redisio.cluster import ClusterClient
from .cancels import seal_cancelled

GRACE = 5.0
"""Seconds after its deadline until a client ends a request that nobody has begun: a worker that is there is first."""

_RETENTION, _REMEMBER = 3600, 24 * 3600
"""Seconds that a log without an expiry, and a tombstone, are kept."""

_MESSAGE = "the deadline of the job passed before a worker took it: none serves its queue, or all were busy"


async def cancel(redis: Redis, keys: Keys, request_id: str) -> bool:
    """Seal a log as cancelled; false when it has a seal.

    Raises:
        RedisError: what Redis says; a caller that repeats this after a lost reply finds the seal.
    """
    key, now = keys.tokens(request_id), await now_of(redis)

    def keep(pipe: Pipeline, first: Entry | None) -> None:
        asked = first.digest if isinstance(first, Queued | Started) else ""
        stone = Tombstone(outcome=Cancelled.type, time=now, digest=asked)
        pipe.expire(key, _RETENTION)
        pipe.set(keys.ended(request_id), to_json(stone), ex=_REMEMBER, nx=True)

    sealed = await seal_cancelled(redis, key, keep)
    if sealed is None:
        return False
    pipe = redis.pipeline(transaction=False)
    if not sealed.is_whole:
        keep(pipe, sealed.first)
    kept = len(pipe.command_stack)
    _tell(redis, pipe, keys, request_id, sealed.fields)
    replies = await pipe.execute(raise_on_error=False)  # a user may lack the right to publish: speed only
    for reply in replies[:kept]:
        if isinstance(reply, Exception):
            raise reply
    return True


def may_be_overdue(entry: Entry | None) -> bool:
    """Whether a log's last entry says that the deadline has passed with nothing begun, by the clock of this machine."""
    return isinstance(entry, Queued) and _is_overdue(entry, int(time.time() * 1000))


async def end_overdue(redis: Redis, keys: Keys, request_id: str) -> bool:
    """Seal a log as failed if it holds nothing but `queued`, and Redis's clock is past the deadline; whether it was.

    Look and write are one step, under a WATCH: a worker that begins meanwhile has it, and what it has written stays.

    Raises:
        RedisError: what Redis says; a caller that repeats this after a lost reply finds the seal. A user who may read
            but not write gets it only where there is something to seal.
    """
    key, ended = keys.tokens(request_id), keys.ended(request_id)
    if await _overdue(redis, key) is None:
        return False
    async with redis.pipeline() as pipe:
        await pipe.watch(key, ended)
        overdue = await _overdue(pipe, key)
        if overdue is None or await pipe.exists(ended):
            return False
        last, now = overdue
        left = int(await pipe.ttl(key))
        seal = to_fields(Failed(id=SEAL, code="deadline", message=_MESSAGE))
        stone = Tombstone(outcome=Failed.type, time=now, digest=last.digest)
        pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
        pipe.xadd(key, seal, id=str(SEAL))  # type: ignore[arg-type]  # dict is invariant
        pipe.set(ended, to_json(stone), ex=max(_REMEMBER, left))
        if left < 0:
            pipe.expire(key, _RETENTION)
        try:
            await pipe.execute()
        except WatchError:  # somebody has begun or ended it meanwhile
            return False
    pipe = redis.pipeline(transaction=False)
    _tell(redis, pipe, keys, request_id, seal)
    await pipe.execute(raise_on_error=False)
    return True


async def now_of(redis: Redis) -> int:
    """Redis's clock, in Unix ms."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def _overdue(redis: Redis, key: str) -> tuple[Queued, int] | None:
    """What a log ends in and the time, if that is `queued` and Redis's clock is past the deadline."""
    tail = cast("list[tuple[bytes, dict[bytes, bytes]]]", await redis.xrevrange(key, count=1))
    last, now = parse_leniently(*tail[0]) if tail else None, await now_of(redis)
    return (last, now) if isinstance(last, Queued) and _is_overdue(last, now) else None


def _is_overdue(queued: Queued, now: int) -> bool:
    return bool(queued.deadline) and now >= queued.deadline + GRACE * 1000


def _tell(redis: Redis, pipe: Pipeline, keys: Keys, request_id: str, seal: Fields) -> None:
    pipe.publish(keys.cancel, request_id)
    told = keys.feed(request_id), to_json([[str(SEAL), seal]])
    pipe.publish(*told)
    if isinstance(redis, ClusterClient):  # where Redis 7 has the feed
        pipe.execute_command("SPUBLISH", *told)

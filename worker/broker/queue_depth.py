"""How many jobs of a queue wait, how old the oldest is that a worker has, and whether any worker serves it."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from redis.asyncio import Redis

from ..contract.ids import EntryId
from ..contract.keys import GROUP, Keys
from ..contract.records import WorkerRecord

_SILENT = 60.0
"""Seconds after which a worker's line is that of a dead one: it is renewed each third of a lease, which few have longer
than three minutes."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How a queue stands.

    `waiting` is how many jobs no worker has read, None where Redis cannot tell; `oldest` is when the oldest job that a
    worker has was added, in Unix ms.
    """

    waiting: int | None
    oldest: int | None


async def depth_of(redis: Redis, key: str) -> Depth:
    """How the queue of a job stream stands.

    Raises:
        RedisError: also where the stream does not exist.
    """
    group = _ours(await redis.xinfo_groups(key))
    if group is None:
        return Depth(None, None)
    waiting = await _unread(redis, key, group, await redis.xlen(key))
    first = (await redis.xpending(key, GROUP))["min"]
    return Depth(waiting, EntryId.parse(first).attempt if first else None)


async def waiting_in(redis: Redis, key: str) -> int:
    """How many jobs of a stream no worker has read yet.

    Where Redis does not know the group's lag (before 7.0, and after an XDEL) it is the stream's length less what is
    pending. That is too high by the jobs that are done and not yet trimmed.
    """
    pipe = redis.pipeline(transaction=False)
    pipe.exists(key)
    pipe.xlen(key)
    pipe.xinfo_groups(key)
    exists, length, groups = await pipe.execute(raise_on_error=False)
    if exists == 0:
        return 0
    for reply in (exists, length, groups):
        if isinstance(reply, Exception):
            raise reply
    group = _ours(groups)
    if group is None:
        return int(length)
    unread = await _unread(redis, key, group, int(length))
    return max(0, int(length) - int(group["pending"])) if unread is None else unread


async def is_served(redis: Redis, keys: Keys, queue: str) -> bool:
    """Whether a worker lives that serves a queue, or that does not say which ones it serves.

    Raises:
        RedisError: what Redis says.
    """
    seconds, _ = await redis.time()
    for raw in cast("dict[bytes, bytes]", await redis.hgetall(keys.workers)).values():
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            line = msgspec.json.decode(raw, type=WorkerRecord)
            if abs(seconds - line.beat / 1000) < _SILENT and (not line.queues or queue in line.queues):
                return True
    return False


async def _unread(redis: Redis, key: str, group: dict[str, Any], length: int) -> int | None:
    """How many entries come after the last one that the group delivered; None where Redis does not know.

    Redis 7.0 keeps counting unread jobs that somebody trimmed, so its lag may be too high, and above 0 for ever.
    """
    lag = group.get("lag")
    if lag == 0:
        return 0
    last = group["last-delivered-id"].decode()
    if not await redis.xrange(key, min=f"({last}", count=1):
        return 0
    return None if lag is None else min(int(lag), length)


def _ours(groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((group for group in groups if group["name"] == GROUP.encode()), None)

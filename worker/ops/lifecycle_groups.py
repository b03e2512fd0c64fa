"""Findings about the consumer groups of the lifecycle: which one is behind, how far, and what it has lost."""

from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..broker.group_progress import acknowledged_below
from ..contract.ids import EntryId
from ..contract.keys import Keys
from .findings import Finding
from .units import duration, size

_BEHIND = 3600
"""Seconds for which a group may leave an entry. A logger that runs is behind for less than a second."""


async def lifecycle_findings(redis: Redis, keys: Keys, now: float) -> list[Finding]:
    """A warning for each group that is an hour behind, or that has lost entries and not reported it.

    `now` is Redis's time in seconds.

    Raises:
        RedisError: when Redis does not answer, or the user may not read the lifecycle.
    """
    key = keys.lifecycle
    try:
        groups = await redis.xinfo_groups(key)
    except ResponseError as error:
        if str(error).startswith("no such key"):
            return []
        raise
    lost = {
        group: int(count)
        for group, count in cast("dict[bytes, bytes]", await redis.hgetall(keys.lifecycle_losses)).items()
    }
    findings = []
    for group in groups:
        behind = await _behind(redis, key, group, now)
        missing = lost.get(group["name"], 0)
        name = group["name"].decode("utf-8", "replace")
        found = []
        if missing > 0:
            found.append(f"it has lost {missing} entries, which were removed before it had acknowledged them")
        if behind >= _BEHIND:
            held = size(await redis.memory_usage(key) or 0)
            found.append(f"it is {duration(behind)} behind, and workers keep {held} of entries for it")
        if found:
            fix = f"start its program, or remove the group: XGROUP DESTROY {key} {name}"
            findings.append(Finding("warning", f"lifecycle group {name}", "; ".join(found), fix, "lifecycle_behind"))
    return findings


async def _behind(redis: Redis, key: str, group: dict[str, Any], now: float) -> float:
    """The age in seconds of the oldest entry that the group has not acknowledged; 0 if there is none."""
    below = await acknowledged_below(redis, key, group)
    is_delivered = below == EntryId.parse(group["last-delivered-id"])
    oldest = await redis.xrange(key, f"({below}" if is_delivered else str(below), count=1)
    return max(0.0, now - EntryId.parse(cast("bytes", oldest[0][0])).attempt / 1000) if oldest else 0.0

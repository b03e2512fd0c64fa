"""Which requests of all services run now, or have ended lately: read from the lifecycle stream."""

from collections.abc import Mapping
from typing import cast

from redis.asyncio import Redis

from ..contract.keys import Keys
from ..contract.records import Lifecycle

_LOOKED_AT = 1000
"""The number of the latest records that are read. A request whose record is older is not found."""


async def started_requests(redis: Redis, keys: Keys) -> list[str]:
    """The ids of requests that have started and not finished, the newest first. They may have ended a moment ago."""
    records = await _latest(redis, keys)
    finished = {record.id for record in records if record.type == "finished"}
    return list(
        dict.fromkeys(record.id for record in records if record.type == "started" and record.id not in finished)
    )


async def finished_requests(redis: Redis, keys: Keys) -> list[str]:
    """The ids of requests that have finished, the newest first."""
    return [record.id for record in await _latest(redis, keys) if record.type == "finished"]


async def _latest(redis: Redis, keys: Keys) -> list[Lifecycle]:
    found = cast("list[tuple[bytes, Mapping[bytes, bytes]]]", await redis.xrevrange(keys.lifecycle, count=_LOOKED_AT))
    return [Lifecycle.read(line.decode(), raw) for line, raw in found]

"""Which requests of all services run now, for operators: read from the lifecycle stream."""

from collections.abc import Mapping
from typing import cast

from redis.asyncio import Redis

from ..contract.keys import Keys
from ..contract.records import Lifecycle

_LOOKED_AT = 1000
"""The number of the latest records that are read. A request that started before them is not found."""


async def started_requests(redis: Redis, keys: Keys) -> list[str]:
    """The ids of requests that have started and not finished, the newest first. They may have ended a moment ago."""
    found = cast("list[tuple[bytes, Mapping[bytes, bytes]]]", await redis.xrevrange(keys.lifecycle, count=_LOOKED_AT))
    records = [Lifecycle.read(line.decode(), raw) for line, raw in found]
    finished = {record.id for record in records if record.type == "finished"}
    return list(
        dict.fromkeys(record.id for record in records if record.type == "started" and record.id not in finished)
    )

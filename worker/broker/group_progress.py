"""How far a consumer group has got in its stream."""

from collections.abc import Mapping
from typing import Any

from redis.asyncio import Redis

from ..contract.ids import EntryId


async def acknowledged_below(redis: Redis, key: str, group: Mapping[str, Any]) -> EntryId:
    """The id below which a group has acknowledged every entry. `group` is a reply of XINFO GROUPS.

    The last delivered id was read before the oldest pending id is. In the other order, an entry that is delivered in
    between would count as acknowledged.
    """
    delivered = EntryId.parse(group["last-delivered-id"])
    oldest = (await redis.xpending(key, group["name"]))["min"]
    return min(delivered, EntryId.parse(oldest)) if oldest else delivered

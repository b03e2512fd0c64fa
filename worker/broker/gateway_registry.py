"""The sorted set of gateway records: each gateway process renews its own, and drops those that nobody renews.

Nothing but an operator's picture depends on the records. The gateway writes them with rights that its other keys need.
"""

from contextlib import suppress
from math import isfinite
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.entries import to_json
from ..contract.keys import Keys
from ..contract.records import GatewayRecord
from ..redisio.scripts import Script

KEPT = 150
"""Seconds for which the record of a gateway stays that has not removed it, as that of a worker with a usual lease."""

_SET_KEPT = 24 * 3600
"""Seconds for which the set stays: gateways that run while Redis is full cannot renew its expiry either."""

# KEYS: the set. ARGV: the record, seconds for which a record is kept, seconds for which the set is kept, and the
# process's earlier records.
_RENEW = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
call('ZADD', KEYS[1], now, ARGV[1])
if ARGV[4] then call('ZREM', KEYS[1], unpack(ARGV, 4)) end
call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2] * 1000)
return call('EXPIRE', KEYS[1], ARGV[3])
""")


class GatewayRegistry:
    """The records of all gateway processes. An object writes that of one process."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._key = keys.gateway_processes
        self._stored = set[str]()
        """What may be stored: the record that was written last, and those whose writes had no reply."""

    async def write(self, record: GatewayRecord) -> None:
        """Renew this process's record. If Redis refuses that, the record becomes old, and the gateway serves on."""
        text, former = to_json(record), self._stored
        self._stored = former | {text}
        try:
            words = text, str(KEPT), str(_SET_KEPT), *sorted(former - {text})
            await _RENEW.run_on(self._redis, [self._key], words)
            self._stored = {text}
        except ResponseError:
            self._stored = former

    async def remove(self) -> None:
        """Remove this process's record."""
        if self._stored:
            with suppress(ResponseError):
                await self._redis.zrem(self._key, *self._stored)

    async def records(self) -> list[GatewayRecord]:
        """All records that can be read, the latest of each process, in the order of their names and addresses.

        Two processes may have one name: containers with the network of their host are each process 1 of that host.
        """
        found = cast("list[tuple[bytes, float]]", await self._redis.zrange(self._key, 0, -1, withscores=True))
        records = [GatewayRecord.read(raw, int(score)) for raw, score in found if isfinite(score)]
        latest = {(record.name, record.address): record for record in records if record}
        return [latest[process] for process in sorted(latest)]

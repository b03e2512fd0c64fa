"""Reads the lifecycle as a consumer of a group: each record goes to one of the group's consumers, at least once."""

import time
from typing import TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.keys import Keys
from ..contract.records import Lifecycle
from ..redisio.scripts import Script

_PAGE = 100
"""Records that are read at a time."""

_COLLECT_EVERY = 5.0
"""Seconds between two searches for records that another consumer has left behind."""

_ABANDONED_AFTER = 30.0
"""Seconds after which a record counts as left behind by its consumer."""

_STALE_AFTER = 3600.0
"""Seconds after which a consumer without pending records is removed."""

_LEFT_IDLE = 10**11
"""The idle time in ms (3 years) of a record that its consumer leaves to others."""

_LOSSES_KEPT = 30 * 86_400

_Streams: TypeAlias = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]

_CLAIM = f"""
local claimed, lost = 0, 0
local function claim(entries, ...)
  for _, entry in ipairs(entries) do
    if #call('XRANGE', KEYS[1], entry[1], entry[1]) > 0 then
      call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1], 'JUSTID', ...)
      claimed = claimed + 1
    else
      lost = lost + call('XACK', KEYS[1], ARGV[1], entry[1])
    end
  end
  if lost > 0 then
    call('HINCRBY', ARGV[3], ARGV[1], lost)
    call('EXPIRE', ARGV[3], {_LOSSES_KEPT})
  end
end
"""
"""A function of scripts that claims pending records for a consumer, and counts those that are lost.

KEYS is the stream. ARGV: the group, the consumer, and the key of the losses, which is in the same slot.

A pending record that was removed from the stream is lost. Redis 6.2 would keep it pending, and 7.0 forgets it silently.
"""

_COLLECT = Script(f"""{_CLAIM}
local pending = {{'XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[4], '-', '+', {_PAGE}}}
if ARGV[4] == '0' then pending[#pending + 1] = ARGV[2] end
claim(call(unpack(pending)))
for _, fields in ipairs(call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {{}}
  for n = 1, #fields, 2 do consumer[fields[n]] = fields[n + 1] end
  if consumer.name ~= ARGV[2] and consumer.pending == 0 and consumer.idle >= {_STALE_AFTER * 1000:.0f} then
    call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
  end
end
return {{claimed, tonumber(call('HGET', ARGV[3], ARGV[1]) or 0)}}
""")
"""Claims records that are pending: those that their consumers have left behind, or those of this consumer.

KEYS and ARGV are those of `claim`, and the least idle time in ms: 0 for the pending records of this consumer. Returns
the number of claimed records, and that of all losses that were not reported.
"""

_REPORTED = Script("""
if tonumber(call('HGET', KEYS[1], ARGV[1]) or 0) < tonumber(ARGV[2]) then return 0 end
return call('HINCRBY', KEYS[1], ARGV[1], '-' .. ARGV[2])
""")
"""Takes a loss off, unless another consumer has done so. KEYS is the hash of losses. ARGV: the group, the number."""

_LEAVE = Script(f"""{_CLAIM}
claim(call('XPENDING', KEYS[1], ARGV[1], '-', '+', 10 * {_PAGE}, ARGV[2]), 'IDLE', '{_LEFT_IDLE}')
if #call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) == 0 then
  call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
return claimed
""")
"""Leaves a consumer's pending records to the others at once, or removes a consumer that has none.

KEYS and ARGV are those of `claim`. With the consumer, Redis would remove its pending records.
"""


class LifecycleGroup:
    """One consumer of a group of the lifecycle. `consumer` is a name that no other process has.

    `redis` is a client for blocking reads. `lost` is the number of records that the group has lost since the last
    report, as of the last search for records left behind.

    All methods raise RedisError or OSError when Redis does not answer or refuses. `read` and `acknowledge` may be
    repeated then.
    """

    def __init__(self, redis: Redis, keys: Keys, group: str, consumer: str) -> None:
        self._redis = redis
        self._key = keys.lifecycle
        self._losses = keys.lifecycle_losses
        self._group = group
        self._consumer = consumer
        self._has_pending = False
        """Whether records may be pending with this consumer that it does not know, as after a lost reply."""
        self._collect_at = 0.0
        self.lost = 0

    async def read(self, wait: float) -> list[Lifecycle]:
        """Return the next records, after up to `wait` seconds: at most 100, of all types, or none.

        Every record must be acknowledged before the next call. The group is created if it is missing.
        """
        try:
            return await self._read(wait)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
        await self._create()
        return []

    async def acknowledge(self, records: list[Lifecycle]) -> None:
        """Remove records from the pending ones: no consumer gets them again."""
        if records:
            await self._redis.xack(self._key, self._group, *[record.line for record in records])

    async def losses_reported(self) -> None:
        """Take `lost` off the group's losses, since it was reported."""
        lost, self.lost = self.lost, 0
        await _REPORTED.run_on(self._redis, [self._losses], [self._group, str(lost)])

    async def leave(self) -> None:
        """Leave the records that were not acknowledged to other consumers, and read no more."""
        await _LEAVE.run_on(self._redis, [self._key], [self._group, self._consumer, self._losses])

    async def _read(self, wait: float) -> list[Lifecycle]:
        if not self._has_pending and time.monotonic() >= self._collect_at:
            self._has_pending = await self._collect(_ABANDONED_AFTER)
            if not self._has_pending:
                self._collect_at = time.monotonic() + _COLLECT_EVERY
        elif self._has_pending:
            self._has_pending = await self._collect(0)
        if self._has_pending:
            return await self._read_after("0")
        self._has_pending = True
        records = await self._read_after(">", wait)
        self._has_pending = False
        return records

    async def _collect(self, idle: float) -> bool:
        """Claim records of others that are idle for so many seconds, or with 0 those of this consumer, if any."""
        arguments = [self._group, self._consumer, self._losses, f"{idle * 1000:.0f}"]
        collected, self.lost = await _COLLECT.run_on(self._redis, [self._key], arguments)
        return bool(collected)

    async def _read_after(self, place: str, wait: float = 0.0) -> list[Lifecycle]:
        block = max(1, int(wait * 1000)) if wait else None
        streams = cast(
            "_Streams",
            await self._redis.xreadgroup(self._group, self._consumer, {self._key: place}, count=_PAGE, block=block),
        )
        return [Lifecycle.read(line.decode(), fields) for _, records in streams for line, fields in records]

    async def _create(self) -> None:
        """Create the group. It begins with the oldest record."""
        try:
            await self._redis.xgroup_create(self._key, self._group, "0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        else:
            await self._redis.hdel(self._losses, self._group)  # of a group that had the same name

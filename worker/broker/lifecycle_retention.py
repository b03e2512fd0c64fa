"""How long the lifecycle stream keeps its records: behind its consumer groups, and within a limit of bytes.

The newest records stay for readers without a group. Older ones stay while a group has not acknowledged them, until the
stream exceeds its limit of bytes. Then the oldest are removed, and each group's losses are counted.
"""

import math

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.keys import Keys
from ..redisio.errors import is_permission_denied
from ..redisio.scripts import Script
from .group_progress import acknowledged_below

RECORD_BYTES = 275
"""Bytes that a record takes of Redis's memory: the mean of `started` and `finished`, with a model, tenant and usage."""

_MOST_REMOVED = 2000
"""Records that one command removes. It blocks Redis for some milliseconds if they are pending, else less."""

_NODE = 1000
"""More records than Redis keeps in one node of a stream (`stream-node-max-entries`), which is removed as a whole."""

_PAGE = 1000
"""Pending entries that the script lists and removes at a time."""

_LOSSES_KEPT = 30 * 86_400
"""Seconds for which losses are known that no reader has collected."""

_REMOVE_UNREAD = Script(f"""
local groups = {{}}
for n, fields in ipairs(call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {{lost = 0}}
  for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
  group.ms, group.seq = string.match(group['last-delivered-id'], '(%d+)-(%d+)')
  groups[n] = group
end
table.sort(groups, function(a, b)
  if a.ms ~= b.ms then return tonumber(a.ms) < tonumber(b.ms) end
  return tonumber(a.seq) < tonumber(b.seq)
end)
local left = tonumber(ARGV[1])
local function remove(losers, ...)
  if left < {_NODE} then return end
  local removed = call('XTRIM', KEYS[1], ...)
  left = left - removed
  for n = 1, losers do groups[n].lost = groups[n].lost + removed end
end
for n, group in ipairs(groups) do
  local next = string.format('%s-%.0f', group.ms, group.seq + 1)
  remove(n - 1, 'MINID', '~', next, 'LIMIT', left)
  remove(n - 1, 'MINID', next)
end
remove(#groups, 'MAXLEN', '~', math.max(0, call('XLEN', KEYS[1]) - left), 'LIMIT', math.max(left, 1))
local removed = tonumber(ARGV[1]) - left
local first = call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
for _, group in ipairs(groups) do
  for _ = 1, group.pending > 0 and {_MOST_REMOVED // _PAGE + 1} or 0 do
    local ids = {{}}
    for n, entry in ipairs(call('XPENDING', KEYS[1], group.name, '-', first and '(' .. first[1] or '+', {_PAGE})) do
      ids[n] = entry[1]
    end
    if #ids > 0 then call('XACK', KEYS[1], group.name, unpack(ids)) end
    removed, group.lost = removed + #ids, group.lost + #ids
    if #ids < {_PAGE} then break end
  end
  if group.lost > 0 then try('HINCRBY', ARGV[2], group.name, group.lost) end
end
if removed > 0 then try('EXPIRE', ARGV[2], {_LOSSES_KEPT}) end
return removed
""")
"""Removes the oldest records though groups have not read them, and counts for each group what it loses.

KEYS is the stream. ARGV: about how many records, and the key of the losses, which is in the same slot. Returns how many
records and pending entries were removed.

The script removes the records up to the place of one group after another, beginning with the group that is the furthest
behind: first in whole nodes, and then the rest of the node in which that place is. What it removes beyond the places of
groups is lost to these. So are the removed records that were delivered and are pending: Redis would keep their pending
entries for ever. A consumer that writes such a record in this moment makes the count too high.

The key of the losses is no key of the script, so that a user without the right to it can still free memory.
"""


class LifecycleTrimmer:
    """Removes old records. Every worker may do so, as often as it likes: with nothing to remove it takes 5 us of Redis.

    `length` is the number of records that stay in any case, up to `max_bytes` of Redis's memory.
    """

    def __init__(self, redis: Redis, keys: Keys, *, length: int, max_bytes: int) -> None:
        self._redis = redis
        self._key = keys.lifecycle
        self._losses = keys.lifecycle_losses
        self._length = length
        self._max_bytes = max_bytes

    async def trim(self) -> None:
        """Remove records that all groups have acknowledged, and then the oldest, if the stream is too large.

        Raises:
            RedisError: when Redis does not answer or refuses a command.
        """
        while await self._remove_acknowledged():
            pass
        while await self._remove_surplus():
            pass

    async def _remove_acknowledged(self) -> int:
        """Remove some records that are not among the newest and that no group needs. Returns how many."""
        length = int(await self._redis.xlen(self._key))
        if length <= self._length:
            return 0
        most = min(length - self._length, _MOST_REMOVED)
        groups = await self._redis.xinfo_groups(self._key)
        if not groups:
            return int(await self._redis.xtrim(self._key, maxlen=length - most, approximate=True, limit=most))
        below = min([await acknowledged_below(self._redis, self._key, group) for group in groups])
        return int(await self._redis.xtrim(self._key, minid=str(below), approximate=True, limit=most))

    async def _remove_surplus(self) -> int:
        """Remove some of the oldest records if the stream is too large. Returns how many, with pending entries."""
        length = int(await self._redis.xlen(self._key))
        used = await self._bytes(length)
        if used <= self._max_bytes:
            return 0
        surplus = math.ceil(length * (1 - self._max_bytes / used)) + _NODE
        arguments = [str(min(surplus, _MOST_REMOVED)), self._losses]
        return int(await _REMOVE_UNREAD.run_on(self._redis, [self._key], arguments))

    async def _bytes(self, length: int) -> int:
        """The memory that the stream takes. Without the right to `MEMORY USAGE` it is estimated.

        Redis reports six times the memory that pending entries take.
        """
        try:
            return int(await self._redis.memory_usage(self._key) or 0)
        except ResponseError as error:
            if not is_permission_denied(error):
                raise
            return length * RECORD_BYTES

"""Adds a job to its queue once. The same step begins the log, by which a repeated call is recognized."""

from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..contract.entries import Cancelled, Queued, Started, parse_leniently
from ..contract.job import Job, digest, is_digest_of
from ..contract.keys import GROUP, Keys
from ..contract.records import Tombstone
from ..redisio.batching import CommandBatcher
from ..redisio.cluster import ClusterClient
from ..redisio.scripts import Script
from .errors import Conflict

_DAY = 24 * 3600
_RETENTION = 3600
"""Seconds that a log is kept after its end if the job has no `retention`: the default of WORKER_RETENTION."""

# KEYS: the log, the tombstone and, if the same server has it, the job stream. ARGV: the ms until the deadline, the ms
# for which the log is kept after it, the name of the job's field for it or nothing, the digest, the queue, the group,
# the set of queues, and the job's other fields. Returns the deadline; or, of a request that is known, the first entries
# and the tombstone. A log whose entries were deleted has neither, and would refuse `queued` once the job was added.
# The job is written first: a job without `queued` is complete, while `queued` alone would pass for an enqueued job.
# A new job stream gets the workers' group, so that an autoscaler finds the queue before the first worker has started.
# The group comes last: with full memory Redis refuses only the first command of a script that needs memory. Without the
# group the job is complete as well, since workers create it, so an error of XGROUP is ignored. So is an error of SADD:
# the set of queues is for operators. It is none of KEYS, where a user without a right to it could not add jobs at all.
_FIND = """
local known, failed = try('XRANGE', KEYS[1], '-', '+', 'COUNT', 2)
if failed then return known end
local tombstone, failed = try('GET', KEYS[2])
if failed then return tombstone end
if #known > 0 or tombstone or call('EXISTS', KEYS[1]) == 1 then return {known, tombstone} end
"""
_WRITE = """
local time, failed = try('TIME')
if failed then return time end
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function text(ms) return string.format('%.0f', ms) end  -- tostring would round it to 14 digits
local deadline = text(now + ARGV[1])
local job = {unpack(ARGV, 8)}
if ARGV[3] ~= '' then
  table.insert(job, ARGV[3])
  table.insert(job, deadline)
end
local is_new = false
if KEYS[3] then
  is_new = call('EXISTS', KEYS[3]) == 0
  local reply, failed = try('XADD', KEYS[3], '*', unpack(job))
  if failed then return reply end
end
local reply, failed = try('XADD', KEYS[1], '0-1', 'type', 'queued', 'v', '1', 'digest', ARGV[4], 'deadline', deadline,
  'queue', ARGV[5], 'time', text(now))
if failed then return reply end
reply, failed = try('PEXPIREAT', KEYS[1], text(deadline + ARGV[2]))
if is_new then try('XGROUP', 'CREATE', KEYS[3], ARGV[6], '0') end
if KEYS[3] then try('SADD', ARGV[7], ARGV[5]) end
return failed and reply or deadline
"""
_ADD = Script(_FIND + _WRITE)

# The same, unless the request has rivals, which then are the third element of the reply. KEYS: also the sets of
# `NoRivals`. ARGV: first its other fields, in their order.
_ADD_WITHOUT_RIVALS = Script(f"""
local member, number, since, most, now, kept_1, kept_2 = unpack(ARGV, 1, 7)
for _ = 1, 7 do table.remove(ARGV, 1) end
{_FIND}
local rivals = {{}}
for _, rival in ipairs(call('ZREVRANGEBYSCORE', KEYS[number + 3], '+inf', since, 'LIMIT', 0, most)) do
  if rival ~= member then table.insert(rivals, rival) end
end
local added = {{{{}}, false, rivals}}
if #rivals == 0 then
  added = (function() {_WRITE} end)()
  if type(added) ~= 'string' then return added end
end
for key, kept in pairs({{[KEYS[4]] = kept_1, [KEYS[5]] = kept_2}}) do
  try('ZREMRANGEBYSCORE', key, '-inf', now - kept * 1000)
  try('ZADD', key, now, member)
  try('EXPIRE', key, kept)
end
return added
""")

# The same for the job alone. KEYS: the job stream. ARGV: the group, and the job's fields.
_ADD_TO_QUEUE = Script("""
local is_new = call('EXISTS', KEYS[1]) == 0
local id = call('XADD', KEYS[1], '*', unpack(ARGV, 2))
if is_new then try('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0') end
return id
""")


class NoRivals(NamedTuple):
    """The condition that one of two sorted sets has no recent member but the job's own.

    The job joins both sets, added or not: `member` stands for it, with the score `now` (Unix ms). `number` is that of
    the set, 1 or 2, whose members with a score from `since` on are rivals, of which at most `most` count. `kept_1` and
    `kept_2` are the seconds that members stay in each set.
    """

    sets: tuple[str, str]
    member: str
    number: int
    since: int
    most: int
    now: int
    kept_1: int
    kept_2: int


class Enqueuer:
    """Adds jobs to queues."""

    def __init__(self, redis: Redis, commands: CommandBatcher, keys: Keys) -> None:
        self._redis = redis
        self._commands = commands
        self._keys = keys
        self._named: set[str] = set()
        """Queues that were added to the set of queues."""

    async def add(self, job: Job, queue: str, within: float | None, condition: NoRivals | None = None) -> list[str]:
        """Add a job, unless the same request was added before. `within` is seconds until its deadline.

        Returns the rivals because of which the job was not added, the newest first; none if it was added. A cluster
        cannot check the condition in the same step.

        Raises:
            Conflict: when the id belongs to another request.
            RedisError: when Redis returns an error. Repeating this after a lost reply is safe.
        """
        in_cluster = isinstance(self._redis, ClusterClient)
        keys = [self._keys.tokens(job.id), self._keys.ended(job.id)]
        if not in_cluster:
            keys.append(self._keys.jobs(queue))
        arguments = [
            str(int((_DAY if within is None else within) * 1000)),
            str((job.retention or _RETENTION) * 1000),
            "" if within is None else "deadline",
            digest(job.request, job.fallbacks),
            queue,
            GROUP,
            self._keys.queues,
            *chain.from_iterable(job.to_fields().items()),
        ]
        if condition is None:
            reply = await _ADD.run(self._commands, keys, arguments)
        else:
            sets, *fields = condition
            reply = await _ADD_WITHOUT_RIVALS.run(self._commands, [*keys, *sets], [*map(str, fields), *arguments])
        if isinstance(reply, list):
            first_entries, tombstone, rivals = [*reply, None, None][:3]
            if rivals:
                return [rival.decode() for rival in rivals]
            queued = _check_same(job, first_entries, tombstone)
            if not in_cluster or queued is None:
                return []
            deadline = queued.deadline
        else:
            deadline = int(reply)
        if in_cluster:
            if within is not None:
                job = msgspec.structs.replace(job, deadline=deadline or None)
            await self.add_to_queue(job, queue)
            await self._name_queue(queue)
        return []

    async def add_to_queue(self, job: Job, queue: str) -> None:
        """Add the job in a separate step, since log and job stream are in different slots of a cluster.

        A client that dies between the two steps leaves a log with only `queued`. A repeated call finds that log and
        adds the job. It cannot know whether the job is in the stream already, so the job may be there twice: workers
        acknowledge the second one without running it. Without another call, the log expires with the deadline.
        """
        fields = chain.from_iterable(job.to_fields().items())
        await _ADD_TO_QUEUE.run(self._commands, [self._keys.jobs(queue)], [GROUP, *fields])

    async def _name_queue(self, queue: str) -> None:
        """Add a queue to the set of queues, which a cluster keeps in a slot of its own. Done once for each queue."""
        if queue not in self._named:
            self._named.add(queue)
            with suppress(RedisError, OSError):  # the set is for operators, and workers add their queues too
                await self._redis.sadd(self._keys.queues, queue)


def _check_same(job: Job, first_entries: list[tuple[bytes, list[bytes]]], tombstone: bytes | None) -> Queued | None:
    """Check that the request of a log, or else of a tombstone, is the job's. Returns `queued` if the log has only that.

    Raises:
        Conflict: when the id belongs to another request.
    """
    entries = [
        parse_leniently(entry_id, dict(zip(fields[::2], fields[1::2], strict=True)))
        for entry_id, fields in first_entries
    ]  # `queued` and `started`, if the log has both
    if not entries:
        if tombstone is None:
            raise Conflict(f"the log of the id {job.id} exists, but its entries were deleted: choose another id")
        known = msgspec.json.decode(tombstone, type=Tombstone).digest
    else:  # `queued` of another client may have no digest
        digests = [entry.digest for entry in entries if isinstance(entry, Queued | Started)]
        known = next(filter(None, digests), "")
    if entries and isinstance(entries[0], Cancelled):
        raise Conflict(f"the id {job.id} was cancelled before it was enqueued: choose another id")
    if not known and entries and isinstance(entries[-1], Queued):
        raise Conflict(
            f"the id {job.id} is enqueued, and its client omitted the digest that shows whether it is the same "
            "request: choose another id"
        )
    if not is_digest_of(known, job.request, job.fallbacks):
        raise Conflict(f"the id {job.id} belongs to another request: omit the id, or choose another")
    last = entries[-1] if entries else None
    return last if isinstance(last, Queued) else None

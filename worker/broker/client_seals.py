"""The seals that clients write: a cancel, and the end of a request whose deadline passed before a worker started it.

The client that writes a seal also sets the log's expiry, writes the tombstone, and notifies followers and workers. A
worker that gets the job later finds the seal, repeats any step that is missing, writes the lifecycle and acknowledges.
Clients import this module, so it must not import the worker process.
"""

import time
from itertools import chain
from typing import cast

from redis.asyncio import Redis

from ..contract.answer import Answer
from ..contract.entries import (
    Cancelled,
    Entry,
    Failed,
    Queued,
    Started,
    is_terminal,
    parse_leniently,
    to_fields,
    to_json,
)
from ..contract.ids import SEAL
from ..contract.keys import Keys
from ..contract.records import Tombstone
from ..redisio.cluster import ClusterClient
from ..redisio.scripts import Script
from .log_pages import RawEntry, read_raw_entries
from .log_scripts import LOG_FUNCTIONS

GRACE = 1.0
"""Seconds after its deadline until a client ends a request that no worker has started: a live worker does it first."""

_RETENTION, _REMEMBER = 3600, 24 * 3600
"""Seconds that a log without an expiry, and a tombstone, are kept."""

USAGE_TRIES = 4
"""How often `cancel` counts the usage of a log that is still written, before it omits the usage."""

_ANY, _SEALED = "*", 1

_SEAL = Script(f"""{LOG_FUNCTIONS}
local function check(...)
  local reply, failed = try(...)
  if failed and not reply.err:find('not an integer', 1, true) then error({{reply}}) end
end
if ARGV[1] ~= '{_ANY}' and last_id() ~= ARGV[1] then return 0 end
check('SET', KEYS[2], '', 'EX', '')
check('EXPIRE', KEYS[1], '')
if ARGV[5] == '1' and call('EXISTS', KEYS[2]) == 1 or not add('{SEAL}', unpack(ARGV, 6)) then return 2 end
call('EXPIRE', KEYS[1], ARGV[2])
call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4], 'NX')
return 1
""")
"""Seals a log, or begins it with the seal. Returns 1; 0 if its last entry is another; 2 if the request has ended.

ARGV: the id that the last entry must have, or `*`; seconds until the log expires; the tombstone, and seconds until that
expires; 1 if a tombstone shows that the request has ended, which else only a seal does; the words of the seal.

`check` tries a command with an argument that no Redis accepts: a user without the right to it seals nothing. Otherwise
the log would be sealed and kept without an expiry, and a repeated call would take it for ended.
"""

_MESSAGE = "the deadline of the job passed before a worker took it: none serves its queue, or all were busy"


async def cancel(redis: Redis, keys: Keys, request_id: str) -> bool:
    """Seal a log as cancelled, or begin it with the seal. Returns false if the log had a seal.

    The seal holds the usage of the whole log, or none. The script compares the log's last entry, because an entry
    between count and seal would be missing in the usage. If entries are added faster than the usage is counted, the
    seal has no usage, so that the cancel does not wait.

    Raises:
        RedisError: when Redis returns an error. A caller that repeats this after a lost reply finds the seal.
    """
    key, now = keys.tokens(request_id), await redis_time_ms(redis)
    log = [parse_leniently(*entry) for entry in await read_raw_entries(redis, key)]
    tries_left = USAGE_TRIES
    while not (log and is_terminal(log[-1])):  # Redis refuses a range that begins after the greatest id
        so_far, first = Answer(log), log[0] if log else None
        last = str(log[-1].id) if log else ""
        end = Cancelled(id=SEAL, usage=so_far.usage if tries_left else {}, model=so_far.model)
        digest = first.digest if isinstance(first, Queued | Started) else ""
        tombstone = Tombstone(outcome=end.type, time=now, digest=digest)
        if outcome := await _seal(redis, keys, request_id, last if tries_left else _ANY, end, tombstone):
            return outcome == _SEALED
        tries_left -= 1  # an entry was added meanwhile
        unread = await redis.xrange(key, min=f"({last}" if last else "-")
        log += [parse_leniently(*entry) for entry in cast("list[RawEntry]", unread)]
    return False


def may_be_overdue(entry: Entry | None) -> bool:
    """Whether a log's last entry is `queued` and its deadline has passed by this machine's clock."""
    return isinstance(entry, Queued) and _is_overdue(entry, int(time.time() * 1000))


async def end_overdue(redis: Redis, keys: Keys, request_id: str) -> bool:
    """Seal a log as failed if it holds only `queued` and Redis's clock is past the deadline. Returns whether it did.

    A worker that starts meanwhile keeps the job and its log.

    Raises:
        RedisError: when Redis returns an error. A caller that repeats this after a lost reply finds the seal. A user
            with the right to read and not to write gets the error only if there is something to seal.
    """
    key = keys.tokens(request_id)
    tail = cast("list[RawEntry]", await redis.xrevrange(key, count=1))
    last, now = parse_leniently(*tail[0]) if tail else None, await redis_time_ms(redis)
    if not isinstance(last, Queued) or not _is_overdue(last, now):
        return False
    end = Failed(id=SEAL, code="deadline", message=_MESSAGE)
    tombstone = Tombstone(outcome=end.type, time=now, digest=last.digest)
    left = max(0, await redis.ttl(key)) or _RETENTION  # the log keeps its expiry
    outcome = await _seal(redis, keys, request_id, str(last.id), end, tombstone, left, heeds_tombstone=True)
    return outcome == _SEALED


async def redis_time_ms(redis: Redis) -> int:
    """The time of Redis's clock, in Unix ms."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


def _is_overdue(queued: Queued, now: int) -> bool:
    return bool(queued.deadline) and now >= queued.deadline + GRACE * 1000


async def _seal(
    redis: Redis, keys: Keys, request_id: str, last: str, end: Cancelled | Failed, tombstone: Tombstone,
    retention: int = _RETENTION, *, heeds_tombstone: bool = False,
) -> int:  # fmt: skip
    """Seal a log and notify workers and followers. Returns what the script returns.

    A user may lack the right to publish, which is only for speed.
    """
    seal = to_fields(end)
    times = str(retention), to_json(tombstone), str(max(retention, _REMEMBER))
    words = last, *times, str(int(heeds_tombstone)), *chain(*seal.items())
    outcome = cast("int", await _SEAL.run_on(redis, (keys.tokens(request_id), keys.ended(request_id)), words))
    if outcome != _SEALED:
        return outcome
    pipe = redis.pipeline(transaction=False)
    pipe.publish(keys.cancel, request_id)
    message = keys.feed(request_id), to_json([[str(SEAL), seal]])
    pipe.publish(*message)
    if isinstance(redis, ClusterClient):  # the feed is sharded there, with Redis 7
        pipe.execute_command("SPUBLISH", *message)
    await pipe.execute(raise_on_error=False)
    return outcome

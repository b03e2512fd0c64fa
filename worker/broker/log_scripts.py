"""The scripts that write the entries which a log's owner must not write blindly: the first of an attempt, and the seal.

Each compares the log and its tombstone with what the caller expects, and writes in the same step. If they differ, the
script writes nothing and returns the state of the log, which the caller decides on. KEYS are the log and its tombstone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from redis.exceptions import RedisError, ResponseError

from ..contract.entries import Entry, parse_leniently
from ..contract.ids import SEAL, EntryId
from ..contract.keys import GROUP
from ..contract.records import Tombstone
from ..redisio.errors import redacted_message
from ..redisio.scripts import Script
from .log_pages import RawEntry

LOG_FUNCTIONS = """
local function last_id()
  local last = call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
  return last and last[1] or ''
end
local function look()
  local tombstone = call('GET', KEYS[2])
  local info, failed = try('XINFO', 'STREAM', KEYS[1])
  if failed then return info.err:find('no such key', 1, true) and {0, tombstone} or info end
  local holder
  for n = 1, #info, 2 do
    if info[n] == 'last-generated-id' then holder = info[n + 1]:match('%d+') .. '-0' end
  end
  return {0, tombstone, info, call('XRANGE', KEYS[1], '1-0', '1-0'), call('XRANGE', KEYS[1], holder, holder)}
end
local function add(...)
  local added, failed = try('XADD', KEYS[1], ...)
  if not failed then return added end
  local is_taken = added.err:find('equal or smaller', 1, true) or added.err:find('exhausted the last', 1, true)
  if not is_taken then error({added}) end
  return false
end
"""
"""Functions for scripts on a log: KEYS[1], and its tombstone: KEYS[2].

`last_id` is the id of the last entry, or empty. `look` returns 0 and the arguments of `LogState.read`. `add` returns
false if the log has, or had, an entry with that id or a greater one, or if there must be a log and is none.
"""

LOOK = Script(LOG_FUNCTIONS + "return look()")
"""Returns the state of a log."""

BEGIN = Script(f"""{LOG_FUNCTIONS}
local count = tonumber(ARGV[5])
if call('GET', KEYS[2]) or not add('1-0', unpack(ARGV, 6, 5 + count)) then return look() end
call('PEXPIREAT', KEYS[1], ARGV[1])
try(ARGV[2], ARGV[3], ARGV[4])
local refused = not ARGV[6 + count] or select(2, try('XADD', unpack(ARGV, 6 + count)))
return {{1, refused and 0 or 1, call('XRANGE', KEYS[1], '-', '(1-0', 'COUNT', 2)}}
""")
"""Writes `1-0` into a log that has, and had, no attempt, unless the request has a tombstone.

ARGV: when the log expires (Unix ms); the command that publishes to the feed, its channel and the message; the number of
words of `1-0`, and these; perhaps the words of the XADD to the lifecycle. If the feed or the lifecycle refuses its
part, the log is begun all the same. With the lifecycle in KEYS, Redis would refuse the whole call to a user who has no
right to that key.

Returns 1, whether the lifecycle has the record, and the first two of the entries before `1-0`.
"""

CLAIM = Script(f"""{LOG_FUNCTIONS}
if not add('NOMKSTREAM', unpack(ARGV)) then return look() end
return {{1, call('XLEN', KEYS[1])}}
""")
"""Writes the first entry of a later attempt into a log. ARGV: its id and words. Returns 1 and the number of entries."""

SEAL_UNOWNED = Script(f"""{LOG_FUNCTIONS}
if call('GET', KEYS[2]) or last_id() ~= ARGV[1] or not add('{SEAL}', unpack(ARGV, 3)) then return look() end
call('PEXPIREAT', KEYS[1], ARGV[2])
return {{1}}
""")
"""Seals a log that this process does not own, or begins it with the seal.

ARGV: the id that the log's last entry must have, empty if the log must have none; when the log expires (Unix ms); the
words of the seal.
"""

SEAL_LOG = Script(f"""{LOG_FUNCTIONS}
local is_whole = last_id() == ARGV[1] and call('XLEN', KEYS[1]) == tonumber(ARGV[2])
if not is_whole or not call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1] then return look() end
local steps = 8 + ARGV[7]
if not add('{SEAL}', unpack(ARGV, 8, steps - 1)) then return look() end
call('EXPIRE', KEYS[1], ARGV[4])
call('SET', KEYS[2], ARGV[5], 'EX', ARGV[6])
local is_settled = ARGV[steps] and pcall(function()
  call('XADD', unpack(ARGV, steps + 4))
  if ARGV[steps + 1] ~= '' then call('PUBLISH', ARGV[steps], ARGV[steps + 1]) end
  call('XACK', ARGV[steps + 2], '{GROUP}', ARGV[steps + 3])
end)
return {{1, is_settled and 1 or 0}}
""")
"""Seals its owner's log. The seal needs this fence of its own, because its id is greater than that of any attempt.

ARGV: the id of the last entry and the number of entries that the log must have, and the id of another that it must
have; seconds until it expires; the tombstone, and seconds until that expires; the number of words of the seal, and
these; perhaps the last steps of the job. These are the feed's channel and the message to it, empty for none; the job's
stream and id; the words of the XADD to the lifecycle. Their keys are no KEYS: Redis would refuse the whole call to a
user who has no right to the lifecycle.

Returns 1, and whether all last steps were done. The first one that Redis refuses ends them.
"""

FINALIZE = Script(f"""
local last = call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not (last and last[1] == '{SEAL}') and call('EXISTS', KEYS[2]) == 0 then return 0 end
call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3], 'NX')
call('EXPIRE', KEYS[1], ARGV[1])
return 1
""")
"""Adds a missing expiry and tombstone to a request that has its end, and returns 1; returns 0 if it has none.

ARGV: seconds until the log expires; the tombstone, and seconds until that expires.
"""


@dataclass(frozen=True, slots=True)
class LogState:
    """A log and its tombstone at one moment.

    `greatest` is the greatest id that the log ever had, even if its entry was deleted; None if there is no log.
    `started` is the entry `1-0`, and `holder` the entry that began the attempt of `greatest`. An entry that cannot be
    read is `Unknown`.
    """

    tombstone: Tombstone | None
    first: Entry | None = None
    last: Entry | None = None
    length: int = 0
    greatest: EntryId | None = None
    started: Entry | None = None
    holder: Entry | None = None

    @classmethod
    def read(cls, tombstone: bytes | None, info: Sequence[Any] = (), started: Any = (), holder: Any = ()) -> Self:  # noqa: ANN401 - replies
        """Read what a script returns after its 0."""
        values = dict(zip(info[::2], info[1::2], strict=True))
        return cls(
            tombstone=None if tombstone is None else Tombstone.read(tombstone),
            first=_entry(values.get(b"first-entry")),
            last=_entry(values.get(b"last-entry")),
            length=values.get(b"length", 0),
            greatest=EntryId.parse(values[b"last-generated-id"]) if values else None,
            started=_entry(*started),
            holder=_entry(*holder),
        )

    @property
    def tail(self) -> EntryId | None:
        """The id of the last entry."""
        return self.last.id if self.last else None

    @property
    def has_ended(self) -> bool:
        """Whether the request has ended: the log has its seal, or there is a tombstone."""
        return self.tail == SEAL or self.tombstone is not None


def _entry(reply: Sequence[Any] | None = None) -> Entry | None:
    return parse_leniently(*raw_entry(reply)) if reply else None


def raw_entry(reply: Sequence[Any]) -> RawEntry:
    """An entry in the form of redis-py, from one in a reply of Redis: its id and a list of names and values."""
    entry_id, flat = reply
    return entry_id, dict(zip(flat[::2], flat[1::2], strict=True))


def is_id_taken(error: RedisError) -> bool:
    """Whether Redis refused an entry because the log has, or had, an entry with that id or a greater one."""
    text = redacted_message(error)  # an error may quote the text of an entry
    return isinstance(error, ResponseError) and ("equal or smaller" in text or "exhausted the last" in text)

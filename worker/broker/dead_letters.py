"""Dead letters: workers add the jobs that they bury, and operators find, retry and drop letters."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias, cast

import msgspec
from redis.asyncio import Redis

from ..contract.entries import Fields, to_json
from ..contract.ids import EntryId, is_request_id
from ..contract.job import FIELDS, InvalidJob, Job, RawFields, parse_job, size_of
from ..contract.keys import Keys
from ..contract.records import DeadLetter
from ..redisio.scripts import Script
from ..telemetry.events import NO_TELEMETRY, Telemetry
from .job_queue import Delivery
from .refusals import reports_refusal

_MAX_LETTERS = 1000
_SEARCHED = 50
"""How many of the newest letters are searched for a job's letter, which may have been written before a lost reply."""
_TRUNCATED_LENGTH = 1024
"""Bytes of a long field that a truncated letter keeps."""
_PAGE = 16
"""Letters in one reply: a letter may hold megabytes."""
_NO_LIMIT = 2**31

_BURY = Script(f"""
local newer = call('XREVRANGE', KEYS[1], '+', ARGV[1], 'COUNT', 1)
if newer[1] then return 0 end
call('XADD', KEYS[1], 'MAXLEN', '~', {_MAX_LETTERS}, '*', unpack(ARGV, 2))
return 1
""")
"""Adds a letter unless there are letters from an id on. ARGV: this id, as XRANGE takes it, and the letter's words."""

_REPLACE = Script("""
if not call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1] then return '' end
local added = call('XADD', KEYS[1], '*', unpack(ARGV, 2))
call('XDEL', KEYS[1], ARGV[1])
return added
""")
"""Replaces a letter if it is there. ARGV: its id, and the words of the new one. Returns the new id, or nothing."""

_NEWEST = Script("""
local found = {call('XLEN', KEYS[1])}
for _, letter in ipairs(call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', ARGV[1])) do
  local fields, reason = letter[2], ''
  for at = 1, #fields, 2 do
    if fields[at] == 'reason' then reason = fields[at + 1] end
  end
  table.insert(found, letter[1])
  table.insert(found, reason)
end
return found
""")
"""Returns the number of letters, and the ids and reasons of the newest ARGV[1]: no prompt leaves Redis."""

_FIND = Script(f"""
local from = ARGV[3]
while true do
  local page = call('XRANGE', KEYS[1], from, '+', 'COUNT', {_PAGE})
  for _, letter in ipairs(page) do
    local fields = {{}}
    for at = 1, #letter[2], 2 do fields[letter[2][at]] = letter[2][at + 1] end
    if fields.queue == ARGV[1] and fields.job == ARGV[2] then return {{letter[1], fields.reason or ''}} end
    from = '(' .. letter[1]
  end
  if #page < {_PAGE} then return {{'', ''}} end
end
""")
"""The id and the reason of the letter of a job, without its prompt.

ARGV: the queue, the id of the job's entry, and the time from which letters are searched.
"""

_RawLetter: TypeAlias = tuple[bytes, Mapping[bytes, bytes]]


class DeadLetterWriter:
    """The worker's side of dead letters: it buries jobs."""

    def __init__(self, redis: Redis, keys: Keys, telemetry: Telemetry = NO_TELEMETRY) -> None:
        self._redis = redis
        self._key = keys.dead
        self._telemetry = telemetry
        self._burying = asyncio.Lock()

    async def bury(self, delivery: Delivery, reason: str, time: int, max_bytes: int) -> None:
        """Add a dead letter for a job, unless the job has one. `time` is Unix ms.

        A job of at most `max_bytes` is kept whole, ready to be put back. The letter of a larger job omits fields that
        are not in the contract; if that is not enough, long fields are truncated. The newest thousand letters are kept.

        If another worker had the job before, all letters since the job was added are searched for the job's letter.
        Otherwise only the newest letters are searched, because this call may repeat a call whose reply was lost. Search
        and write are one step, because two workers may have the job at once after a lease has expired. A process writes
        one letter at a time, since its own letters would make it search again. When several processes write at once,
        one of them succeeds, and the others then search only the new letters.
        """
        fields, truncated = _fields_to_keep(delivery.fields, max_bytes)
        letter = DeadLetter(
            reason=reason, queue=delivery.queue, job=delivery.id, time=time, fields=fields, truncated=truncated
        )
        since, count = f"{delivery.enqueued}-0", None if delivery.redelivered else _SEARCHED
        with reports_refusal(self._telemetry, "dead"):
            async with self._burying:
                while (last := await self._bury_once(letter, since, count)) is not None:
                    since, count = last, None

    async def _bury_once(self, letter: DeadLetter, since: str, count: int | None) -> str | None:
        """Search for the letter of a job. Write it if there is none and no other letter is added meanwhile.

        Returns None if the job has its letter, else the id from which there are new letters to search.
        """
        newest = cast("list[_RawLetter]", await self._redis.xrevrange(self._key, min=since, count=count) or [])
        named = (letter.queue.encode(), letter.job.encode())
        if any((fields.get(b"queue"), fields.get(b"job")) == named for _, fields in newest):
            return None
        searched = f"({newest[0][0].decode()}" if newest else since
        is_added = await _BURY.run_on(self._redis, [self._key], (searched, *chain(*letter.to_fields().items())))
        return None if is_added else searched

    async def drop_older(self, before: int) -> None:
        """Drop the letters that were written before a time in Unix ms: they hold prompts."""
        with reports_refusal(self._telemetry, "dead"):
            await self._redis.xtrim(self._key, minid=str(max(0, before)), approximate=False)


def _fields_to_keep(fields: RawFields, max_bytes: int) -> tuple[Fields, tuple[str, ...]]:
    """The fields of a job that its letter keeps, and the names of the truncated ones.

    The fields are encoded as text in JSON. That doubles JSON at most; other text may become longer.
    """
    known = {name: fields[name] for name in FIELDS if name in fields}
    for candidate in (fields, known):
        if size_of(candidate) <= max_bytes and len(to_json(text := _as_text(candidate)).encode()) <= 2 * max_bytes:
            return text, ()
    length = min(_TRUNCATED_LENGTH, max_bytes)
    truncated = tuple(name.decode() for name, value in known.items() if len(value) > length)
    return _as_text({name: value[:length] for name, value in known.items()}), truncated


def _as_text(fields: RawFields) -> Fields:
    return {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in fields.items()}


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A dead letter with its id in the stream. `size` is the size of its job in bytes."""

    id: str
    letter: DeadLetter
    size: int

    @property
    def request_id(self) -> str:
        """The request id of the job; empty if the job had no valid id."""
        named = self.letter.fields.get("id", "")
        return named if is_request_id(named) else ""


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Selects letters by queue and by a text in their reason. An empty string matches everything."""

    queue: str = ""
    reason: str = ""

    def matches(self, letter: DeadLetter) -> bool:
        """Whether a letter is selected. The case of the reason is ignored."""
        return self.queue in {"", letter.queue} and self.reason.casefold() in letter.reason.casefold()


class NotRetryable(ValueError):
    """A letter's job cannot be put back. The message is the reason."""


def retry_of(stored: StoredLetter) -> Job:
    """A new job that runs a buried job again.

    Its request id is derived from the buried job. So a retry whose outcome is unknown can be repeated without adding a
    second job. The deadline is omitted, because it was that of the first try.

    Raises:
        NotRetryable: when the letter was retried before, is truncated, or holds a job that does not validate.
    """
    letter = stored.letter
    if letter.retried_as:
        raise NotRetryable(f"it was retried already, as {letter.retried_as}")
    if letter.truncated:
        raise NotRetryable(
            f"its {', '.join(letter.truncated)} was over the size limit, and only the beginning was kept"
        )
    source = "\n".join((letter.queue, letter.job, letter.fields.get("id", "")))
    fields = {key: value for key, value in letter.fields.items() if key not in {"deadline", "retry_of"}}
    fields["id"] = hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()[:32]
    try:
        job = parse_job({key.encode(): value.encode() for key, value in fields.items()}, _NO_LIMIT)
    except InvalidJob as problem:
        raise NotRetryable(f"its job does not validate: {problem}") from None
    return msgspec.structs.replace(job, retry_of=stored.request_id)


class DeadLetters:
    """The operator's side of dead letters: it finds, drops and marks them."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._key = keys.dead

    async def newest(self, limit: int, wanted: LetterFilter) -> list[StoredLetter]:
        """The newest `limit` letters that match, from oldest to newest."""
        found: list[StoredLetter] = []
        last = "+"
        while len(found) < limit and (page := await self._redis.xrevrange(self._key, max=last, count=_PAGE)):
            stored = [_stored(raw) for raw in cast("list[_RawLetter]", page)]
            found += [one for one in stored if wanted.matches(one.letter)]
            last = f"({stored[-1].id}"
        return found[:limit][::-1]

    async def count_and_newest(self, limit: int) -> tuple[int, list[tuple[int, str]]]:
        """How many letters there are, and the times (Unix ms) and reasons of the newest ones, the newest first."""
        count, *found = cast("list[Any]", await _NEWEST.run_on(self._redis, [self._key], [str(limit)]))
        times = [EntryId.parse(entry_id).attempt for entry_id in found[::2]]
        return int(count), [
            (time, reason.decode("utf-8", "replace")) for time, reason in zip(times, found[1::2], strict=True)
        ]

    async def find(self, queue: str, job: str, since: int) -> tuple[str, str]:
        """The id and the reason of the letter of a job; empty if it has none since a time in Unix ms.

        `job` is the id of its entry.
        """
        words = [queue, job, str(max(0, since))]
        letter, reason = cast("list[bytes]", await _FIND.run_on(self._redis, [self._key], words))
        return letter.decode(), reason.decode("utf-8", "replace")

    async def oldest_first(self, wanted: LetterFilter) -> AsyncIterator[StoredLetter]:
        """All letters that match, from oldest to newest."""
        last = "-"
        while page := await self._redis.xrange(self._key, min=last, count=_PAGE):
            for raw in cast("list[_RawLetter]", page):
                stored = _stored(raw)
                last = f"({stored.id}"
                if wanted.matches(stored.letter):
                    yield stored

    async def get(self, letter_id: EntryId) -> StoredLetter | None:
        """The letter with this id, or None."""
        raw = cast("list[_RawLetter]", await self._redis.xrange(self._key, str(letter_id), str(letter_id)))
        return _stored(raw[0]) if raw else None

    async def drop(self, letter_id: EntryId) -> bool:
        """Drop a letter. Returns false if no letter has this id."""
        return bool(await self._redis.xdel(self._key, str(letter_id)))

    async def mark_retried(self, stored: StoredLetter, request_id: str) -> str:
        """Replace a letter whose job was put back by a copy with `retried_as` set to the new request.

        The copy is a new entry of the stream. Returns its id, or an empty string if the old letter is gone.
        """
        after = msgspec.structs.replace(stored.letter, retried_as=request_id)
        words = chain(*after.to_fields().items())
        return cast("bytes", await _REPLACE.run_on(self._redis, [self._key], (stored.id, *words))).decode()


def _stored(raw: _RawLetter) -> StoredLetter:
    entry_id, fields = raw
    return StoredLetter(entry_id.decode(), DeadLetter.read(fields), len(fields.get(b"fields", b"")))

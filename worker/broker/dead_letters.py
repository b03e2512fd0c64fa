"""Dead letters: workers bury jobs there, and a person finds letters, puts their jobs back, or drops them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import WatchError

from ..contract.entries import Fields, to_json
from ..contract.ids import EntryId, is_request_id
from ..contract.job import FIELDS, InvalidJob, Job, RawFields, parse_job, size_of
from ..contract.keys import Keys
from ..contract.records import DeadLetter
from ..redisio.errors import is_lost_connection
from ..telemetry.events import NO_TELEMETRY, Telemetry
from .job_queue import Delivery
from .refusals import reports_refusal

_MAX_LETTERS = 1000
_CHECKED = 50
"""How many of the newest letters are searched for a job's letter that may have been written before a lost reply."""
_KEPT_OF_LONG_FIELD = 1024
"""Bytes."""
_PAGE = 16
"""Letters in one reply: a letter may hold megabytes."""
_NO_LIMIT = 2**31

_RawLetter: TypeAlias = tuple[bytes, Mapping[bytes, bytes]]


class DeadLetterWriter:
    """The worker's side: buries jobs."""

    def __init__(self, redis: Redis, keys: Keys, telemetry: Telemetry = NO_TELEMETRY) -> None:
        self._redis = redis
        self._key = keys.dead
        self._telemetry = telemetry
        self._burying = asyncio.Lock()

    async def bury(self, delivery: Delivery, reason: str, time: int, max_bytes: int) -> None:
        """Add a dead letter for a job, unless the job has one. `time` is Unix ms.

        A job of at most `max_bytes` is kept whole, ready to be put back. Of a larger one, fields outside of the
        contract are left out, and if that is not enough, long fields are truncated. The newest thousand letters are
        kept.

        Where another worker had the job before, all letters since the job was added are searched for the job's letter;
        otherwise only the latest ones, for the case that this call repeats one whose reply was lost. Search and write
        are one step, because two workers may have the job at once when a lease has run out. One process writes one
        letter at a time, since its own letters would only make it search again. Of several processes one succeeds
        whenever the others have to search again, and they search no more than what is new.
        """
        fields, truncated = _kept(delivery.fields, max_bytes)
        letter = DeadLetter(
            reason=reason, queue=delivery.queue, job=delivery.id, time=time, fields=fields, truncated=truncated
        )
        since, count = f"{delivery.enqueued}-0", None if delivery.again else _CHECKED
        with reports_refusal(self._telemetry, "dead"):
            async with self._burying:
                while (last := await self._bury_once(letter, since, count)) is not None:
                    since, count = last, None

    async def _bury_once(self, letter: DeadLetter, since: str, count: int | None) -> str | None:
        """Search for the letter of a job and write it where there is none, unless another letter comes in between.

        Returns None when the letter is there, else the id from which there are new letters to search.
        """
        async with self._redis.pipeline() as pipe:
            await pipe.watch(self._key)
            newest = cast("list[_RawLetter]", await pipe.xrevrange(self._key, min=since, count=count) or [])
            named = (letter.queue.encode(), letter.job.encode())
            if any((fields.get(b"queue"), fields.get(b"job")) == named for _, fields in newest):
                return None
            pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
            pipe.xadd(self._key, letter.to_fields(), maxlen=_MAX_LETTERS)  # type: ignore[arg-type]  # dict is invariant
            try:
                await pipe.execute()
            except WatchError as error:
                if is_lost_connection(error):
                    raise
                return f"({newest[0][0].decode()}" if newest else since
        return None

    async def drop_older(self, before: int) -> None:
        """Drop the letters that were written before a time in Unix ms: they hold prompts."""
        with reports_refusal(self._telemetry, "dead"):
            await self._redis.xtrim(self._key, minid=str(max(0, before)), approximate=False)


def _kept(fields: RawFields, max_bytes: int) -> tuple[Fields, tuple[str, ...]]:
    """What a letter keeps of a job, and the names of the truncated fields.

    JSON that is text in JSON takes up to twice its bytes; other text may take more.
    """
    known = {name: fields[name] for name in FIELDS if name in fields}
    for candidate in (fields, known):
        if size_of(candidate) <= max_bytes and len(to_json(text := _as_text(candidate)).encode()) <= 2 * max_bytes:
            return text, ()
    length = min(_KEPT_OF_LONG_FIELD, max_bytes)
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
        """The request that the job was for; empty where the job had no valid id."""
        named = self.letter.fields.get("id", "")
        return named if is_request_id(named) else ""


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Selects the letters of a queue and those whose reason contains a text. Empty strings match everything."""

    queue: str = ""
    reason: str = ""

    def matches(self, letter: DeadLetter) -> bool:
        """Whether a letter is selected. Upper and lower case are the same."""
        return self.queue in {"", letter.queue} and self.reason.casefold() in letter.reason.casefold()


class NotRetryable(ValueError):
    """Why a letter cannot be put back."""


def retry_of(stored: StoredLetter) -> Job:
    """The job that runs a buried job again.

    Its request id is derived from the buried job, so that a retry whose outcome is unknown can be repeated and stays
    one job. The deadline is left out, because it was that of the first try.

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
    """The operator's side: finds, drops and marks letters."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._key = keys.dead

    async def newest(self, limit: int, wanted: LetterFilter) -> list[StoredLetter]:
        """The newest letters that match, the newest of all last."""
        found: list[StoredLetter] = []
        last = "+"
        while len(found) < limit and (page := await self._redis.xrevrange(self._key, max=last, count=_PAGE)):
            stored = [_stored(raw) for raw in cast("list[_RawLetter]", page)]
            found += [one for one in stored if wanted.matches(one.letter)]
            last = f"({stored[-1].id}"
        return found[:limit][::-1]

    async def oldest_first(self, wanted: LetterFilter) -> AsyncIterator[StoredLetter]:
        """All letters that match, the oldest first."""
        last = "-"
        while page := await self._redis.xrange(self._key, min=last, count=_PAGE):
            for raw in cast("list[_RawLetter]", page):
                stored = _stored(raw)
                last = f"({stored.id}"
                if wanted.matches(stored.letter):
                    yield stored

    async def get(self, letter_id: EntryId) -> StoredLetter | None:
        """One letter; None where there is none of this id."""
        raw = cast("list[_RawLetter]", await self._redis.xrange(self._key, str(letter_id), str(letter_id)))
        return _stored(raw[0]) if raw else None

    async def drop(self, letter_id: EntryId) -> bool:
        """Drop a letter. False where there is none of this id."""
        return bool(await self._redis.xdel(self._key, str(letter_id)))

    async def mark_retried(self, stored: StoredLetter, request_id: str) -> str:
        """Replace a letter that was put back with one that names the new request.

        The new letter is a new entry of the stream. Returns its id, or an empty string where the old letter is gone.
        """
        after = msgspec.structs.replace(stored.letter, retried_as=request_id)
        while True:
            async with self._redis.pipeline() as pipe:
                await pipe.watch(self._key)
                if not await pipe.xrange(self._key, stored.id, stored.id):
                    return ""  # somebody else replaced or dropped it meanwhile
                pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
                pipe.xadd(self._key, after.to_fields())  # type: ignore[arg-type]  # dict is invariant
                pipe.xdel(self._key, stored.id)
                try:
                    added, _ = await pipe.execute()
                except WatchError:
                    continue  # another letter was added meanwhile
                return cast("bytes", added).decode()


def _stored(raw: _RawLetter) -> StoredLetter:
    entry_id, fields = raw
    return StoredLetter(entry_id.decode(), DeadLetter.read(fields), len(fields.get(b"fields", b"")))

"""The dead letters, as a person deals with them: found, put back under a new request id, dropped."""

import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import WatchError

from ..contract.ids import EntryId, is_request_id
from ..contract.job import InvalidJob, Job, parse_job
from ..contract.keys import Keys
from ..contract.records import DeadLetter

_PAGE = 16  # a letter may hold megabytes
_NO_LIMIT = 2**31

_RawEntry: TypeAlias = tuple[bytes, Mapping[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A dead letter and its id in the stream; `size` is that of its job, in bytes."""

    id: str
    letter: DeadLetter
    size: int

    @property
    def request_id(self) -> str:
        """The request whose job this was; nothing when it had no usable id."""
        named = self.letter.fields.get("id", "")
        return named if is_request_id(named) else ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters: of one queue, with a reason that holds some text in whatever case."""

    queue: str = ""
    reason: str = ""

    def takes(self, letter: DeadLetter) -> bool:
        """Whether a letter is one of them."""
        return self.queue in {"", letter.queue} and self.reason.casefold() in letter.reason.casefold()


class NotRetryable(ValueError):
    """Why a letter cannot be put back."""


def retry_of(filed: StoredLetter) -> Job:
    """The job that is another try of a buried one.

    Its id is made from what names the buried job, so that a retry of which nobody knows whether it went through can
    be made again, and is one job. The deadline is left out: it was that of the first try.

    Raises:
        NotRetryable: when it was retried already, was cut, or does not validate.
    """
    letter = filed.letter
    if letter.retried_as:
        raise NotRetryable(f"it was retried already, as {letter.retried_as}")
    if letter.truncated:
        raise NotRetryable(
            f"its {', '.join(letter.truncated)} was over the size limit, and only the beginning was kept"
        )
    name = "\n".join((letter.queue, letter.job, letter.fields.get("id", "")))
    fields = {key: value for key, value in letter.fields.items() if key not in {"deadline", "retry_of"}}
    fields["id"] = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:32]
    try:
        job = parse_job({key.encode(): value.encode() for key, value in fields.items()}, _NO_LIMIT)
    except InvalidJob as problem:
        raise NotRetryable(f"its job does not validate: {problem}") from None
    return msgspec.structs.replace(job, retry_of=filed.request_id)


class DeadLetters:
    """The stream of dead letters."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._key = keys.dead

    async def newest(self, limit: int, wanted: Wanted) -> list[StoredLetter]:
        """The newest letters that are wanted, the newest of all last."""
        found: list[StoredLetter] = []
        last = "+"
        while len(found) < limit and (page := await self._redis.xrevrange(self._key, max=last, count=_PAGE)):
            filed = [_filed(raw) for raw in cast("list[_RawEntry]", page)]
            found += [one for one in filed if wanted.takes(one.letter)]
            last = f"({filed[-1].id}"
        return found[:limit][::-1]

    async def every(self, wanted: Wanted) -> AsyncIterator[StoredLetter]:
        """All letters that are wanted, the oldest first."""
        last = "-"
        while page := await self._redis.xrange(self._key, min=last, count=_PAGE):
            for raw in cast("list[_RawEntry]", page):
                filed = _filed(raw)
                last = f"({filed.id}"
                if wanted.takes(filed.letter):
                    yield filed

    async def get(self, letter_id: EntryId) -> StoredLetter | None:
        """One letter, or nothing where there is none of this id."""
        raw = cast("list[_RawEntry]", await self._redis.xrange(self._key, str(letter_id), str(letter_id)))
        return _filed(raw[0]) if raw else None

    async def drop(self, letter_id: EntryId) -> bool:
        """Drop a letter; whether it was there."""
        return bool(await self._redis.xdel(self._key, str(letter_id)))

    async def retried(self, filed: StoredLetter, request_id: str) -> str:
        """Put a letter that names its retry in the place of one that was put back.

        It is a new entry of the stream; gives its id, or nothing where the letter is gone.
        """
        after = msgspec.structs.replace(filed.letter, retried_as=request_id)
        while True:
            async with self._redis.pipeline() as pipe:
                await pipe.watch(self._key)
                if not await pipe.xrange(self._key, filed.id, filed.id):
                    return ""  # somebody else did, or it was dropped meanwhile
                pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
                pipe.xadd(self._key, after.to_fields())  # type: ignore[arg-type]  # dict is invariant
                pipe.xdel(self._key, filed.id)
                try:
                    added, _ = await pipe.execute()
                except WatchError:
                    continue  # another letter came meanwhile
                return cast("bytes", added).decode()


def _filed(raw: _RawEntry) -> StoredLetter:
    entry_id, fields = raw
    return StoredLetter(entry_id.decode(), DeadLetter.read(fields), len(fields.get(b"fields", b"")))

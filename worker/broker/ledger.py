"""What is kept beside the logs: the lifecycle stream, the dead letters and the line of each worker."""

from collections.abc import Mapping
from contextlib import suppress
from typing import cast

import msgspec
from redis.asyncio import Redis

from worker.broker.jobs import Delivery
from worker.contract.entries import Fields, to_json
from worker.contract.job import FIELDS, RawFields, size_of
from worker.contract.keys import Keys
from worker.contract.records import DeadLetter, Lifecycle, WorkerLine

_LIFECYCLE_LENGTH = 100_000
_DEAD_LENGTH = 1000
_LATEST = 50
_CUT = 1024


class Ledger:
    """Writes the records that are not the log of one request."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def lifecycle(self, line: Lifecycle) -> None:
        """Add a line to the lifecycle stream, which keeps the last hundred thousand."""
        await _add(self._redis, self._keys.lifecycle, line.to_fields(), _LIFECYCLE_LENGTH)

    async def bury(self, delivery: Delivery, reason: str, time: int, most: int) -> None:
        """Put a job among the dead letters, once: a job that is there already is not put there again.

        It is kept as it was, ready to be put back, where it has at most so many bytes. Else what is not in the
        contract is left out, and if that does not do, long fields are cut. The newest thousand letters are kept.

        All letters since the job was added are looked at only when another worker had the job before; otherwise the
        latest, for the case that this is repeated after a lost reply.
        """
        count = None if delivery.again else _LATEST
        for _, fields in await self._redis.xrevrange(self._keys.dead, min=f"{delivery.enqueued}-0", count=count) or ():
            seen = cast("Mapping[bytes, bytes]", fields)
            if (seen.get(b"queue"), seen.get(b"job")) == (delivery.queue.encode(), delivery.id.encode()):
                return
        kept, cut = _kept(delivery.fields, most)
        letter = DeadLetter(reason=reason, queue=delivery.queue, job=delivery.id, time=time, fields=kept, cut=cut)
        await _add(self._redis, self._keys.dead, letter.to_fields(), _DEAD_LENGTH)

    async def forget(self, before: int) -> None:
        """Drop the dead letters that were written before a time in Unix ms: they hold prompts."""
        await self._redis.xtrim(self._keys.dead, minid=str(max(0, before)), approximate=False)

    async def beat(self, line: WorkerLine, stale_after: float) -> None:
        """Renew this worker's line, and drop those of workers that have not renewed theirs for so many seconds."""
        await self._redis.hset(self._keys.workers, line.name, to_json(line))
        for name, raw in (await self._redis.hgetall(self._keys.workers)).items():
            if line.beat - _beat_of(raw) > stale_after * 1000:
                await self._redis.hdel(self._keys.workers, name)

    async def workers(self) -> set[str]:
        """The names of all workers that show themselves."""
        return {
            name.decode("utf-8", "replace") for name in cast("list[bytes]", await self._redis.hkeys(self._keys.workers))
        }

    async def lines(self) -> dict[str, WorkerLine]:
        """The lines of all workers that show themselves, by name; those that cannot be read are left out."""
        lines = {}
        for name, raw in cast("dict[bytes, bytes]", await self._redis.hgetall(self._keys.workers)).items():
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                lines[name.decode("utf-8", "replace")] = msgspec.json.decode(raw, type=WorkerLine)
        return lines

    async def leave(self, worker: str) -> None:
        """Remove a worker's line."""
        await self._redis.hdel(self._keys.workers, worker)


class _Beat(msgspec.Struct):
    """All that is read of another worker's line, which a later version may have written."""

    beat: int = 0


def _beat_of(raw: bytes | str) -> int:
    try:
        return msgspec.json.decode(raw, type=_Beat).beat
    except (msgspec.DecodeError, UnicodeDecodeError):
        return 0  # no worker's line: as stale as can be


def _kept(fields: RawFields, most: int) -> tuple[Fields, tuple[str, ...]]:
    """What a letter holds of a job, and which fields of it are cut.

    JSON that is text in JSON takes up to twice its bytes, what is no JSON may take more.
    """
    known = {name: fields[name] for name in FIELDS if name in fields}
    for whole in (fields, known):
        if size_of(whole) <= most and len(to_json(readable := _readable(whole)).encode()) <= 2 * most:
            return readable, ()
    longest = min(_CUT, most)
    cut = tuple(name.decode() for name, value in known.items() if len(value) > longest)
    return _readable({name: value[:longest] for name, value in known.items()}), cut


def _readable(fields: RawFields) -> Fields:
    return {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in fields.items()}


async def _add(redis: Redis, key: str, fields: Fields, length: int) -> None:
    await redis.xadd(key, fields, maxlen=length, approximate=True)  # type: ignore[arg-type]  # dict is invariant

"""What is kept beside the logs: the lifecycle stream, the dead letters and the line of each worker.

Where Redis refuses one of these records (another type of key, a right), the metric `records_refused` counts it.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeAlias, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError, WatchError

from ..contract.entries import Fields, to_json
from ..contract.job import FIELDS, RawFields, size_of
from ..contract.keys import Keys
from ..contract.records import DeadLetter, Lifecycle, WorkerRecord
from ..redisio.errors import is_lost_connection, is_transient
from ..redisio.pipelined import PipelinedConnection
from ..telemetry.metrics import Metrics
from .job_queue import Delivery
from .lifecycle import LifecycleWriter

_DEAD_LENGTH = 1000
_LATEST = 50
_CUT = 1024

_Letters: TypeAlias = list[tuple[bytes, Mapping[bytes, bytes]]]


class Ledger:
    """Writes the records that are not the log of one request. `lifecycle_length` is in lines."""

    def __init__(
        self, redis: Redis, keys: Keys, metrics: Metrics | None = None, lifecycle_length: int = 100_000,
        *, connection_type: type[PipelinedConnection] = PipelinedConnection,
    ) -> None:  # fmt: skip
        self._redis = redis
        self._metrics = metrics or Metrics()
        self._keys = keys
        self._lifecycle = LifecycleWriter(redis, keys, self._metrics, lifecycle_length, connection_type)
        self._burying = asyncio.Lock()

    def lifecycle(self, line: Lifecycle) -> "asyncio.Future[None]":
        """Add a line to the lifecycle stream, which keeps the latest ones. See `LifecycleWriter.write`."""
        return self._lifecycle.write(line)

    async def aclose(self) -> None:
        """Write no more lines of the lifecycle."""
        await self._lifecycle.aclose()

    async def bury(self, delivery: Delivery, reason: str, time: int, most: int) -> None:
        """Put a job among the dead letters, once: a job that is there already is not put there again.

        It is kept as it was, ready to be put back, where it has at most so many bytes. Else what is not in the
        contract is left out, and if that does not do, long fields are cut. The newest thousand letters are kept.

        All letters since the job was added are looked at only when another worker had the job before; otherwise the
        latest, for the case that this is repeated after a lost reply. Look and write are one step: two workers may have
        the job at once, when a lease has run out. One process writes one letter at a time, for it would only be in its
        own way; of several processes one gets on whenever another must look again, at no more than what is new.
        """
        kept, cut = _kept(delivery.fields, most)
        letter = DeadLetter(reason=reason, queue=delivery.queue, job=delivery.id, time=time, fields=kept, truncated=cut)
        since, count = f"{delivery.enqueued}-0", None if delivery.again else _LATEST
        with self._counted("dead"):
            async with self._burying:
                while (last := await self._bury(letter, since, count)) is not None:
                    since, count = last, None

    async def _bury(self, letter: DeadLetter, since: str, count: int | None) -> str | None:
        """Look for the letter of a job and write it where there is none, unless another letter comes in between.

        Gives nothing when it is there by now, else from where on there is more to look at.
        """
        async with self._redis.pipeline() as pipe:
            await pipe.watch(self._keys.dead)
            newest = cast("_Letters", await pipe.xrevrange(self._keys.dead, min=since, count=count) or [])
            named = (letter.queue.encode(), letter.job.encode())
            if any((fields.get(b"queue"), fields.get(b"job")) == named for _, fields in newest):
                return None
            pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
            pipe.xadd(self._keys.dead, letter.to_fields(), maxlen=_DEAD_LENGTH)  # type: ignore[arg-type]  # likewise
            try:
                await pipe.execute()
            except WatchError as error:
                if is_lost_connection(error):
                    raise
                return f"({newest[0][0].decode()}" if newest else since
        return None

    async def forget(self, before: int) -> None:
        """Drop the dead letters that were written before a time in Unix ms: they hold prompts."""
        with self._counted("dead"):
            await self._redis.xtrim(self._keys.dead, minid=str(max(0, before)), approximate=False)

    async def beat(self, line: WorkerRecord, stale_after: float) -> dict[str, int]:
        """Renew this worker's line, and drop those of workers that have not renewed theirs for so many seconds.

        A line as far in the future is dropped too: Redis's clock has stepped back, and a live worker writes a new one.
        Gives the beat of every worker that is left, in Unix ms.
        """
        with self._counted("workers"):
            await self._redis.hset(self._keys.workers, line.name, to_json(line))
        beats: dict[str, int] = {}
        for name, raw in cast("dict[bytes, bytes]", await self._redis.hgetall(self._keys.workers)).items():
            beat = _beat_of(raw)
            if abs(line.beat - beat) > stale_after * 1000:
                await self._redis.hdel(self._keys.workers, name)
            else:
                beats[name.decode("utf-8", "replace")] = beat
        return beats

    async def workers(self) -> set[str]:
        """The names of all workers that show themselves."""
        return {
            name.decode("utf-8", "replace") for name in cast("list[bytes]", await self._redis.hkeys(self._keys.workers))
        }

    async def lines(self) -> dict[str, WorkerRecord]:
        """The lines of all workers that show themselves, by name; those that cannot be read are left out."""
        lines = {}
        for name, raw in cast("dict[bytes, bytes]", await self._redis.hgetall(self._keys.workers)).items():
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                lines[name.decode("utf-8", "replace")] = msgspec.json.decode(raw, type=WorkerRecord)
        return lines

    async def leave(self, worker: str) -> None:
        """Remove a worker's line; where Redis refuses that, it is dropped as stale by others."""
        with suppress(ResponseError):
            await self._redis.hdel(self._keys.workers, worker)

    @contextmanager
    def _counted(self, record: str) -> Iterator[None]:
        try:
            yield
        except ResponseError as error:
            if not is_transient(error):
                self._metrics.refused(record)
            raise


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

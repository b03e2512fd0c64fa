"""The hash of worker records: each worker keeps its own record up to date, and drops the records of dead workers."""

from collections.abc import Iterable
from contextlib import suppress
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.entries import to_json
from ..contract.keys import Keys
from ..contract.records import WorkerRecord
from ..telemetry.events import NO_TELEMETRY, Telemetry
from .refusals import reports_refusal


class _Beat(msgspec.Struct):
    """The only field read from another worker's record, since a later version may write the rest differently."""

    beat: int = 0


class WorkerRegistry:
    """The records of all workers, by worker name."""

    def __init__(self, redis: Redis, keys: Keys, telemetry: Telemetry = NO_TELEMETRY) -> None:
        self._redis = redis
        self._key = keys.workers
        self._queues = keys.queues
        self._telemetry = telemetry

    async def beat(self, record: WorkerRecord, stale_after: float) -> dict[str, int]:
        """Write this worker's record, and drop records that were not renewed for `stale_after` seconds.

        A record that is more than `stale_after` seconds in the future is dropped too: Redis's clock was set back, and a
        live worker writes a new record soon. Returns the beat of every remaining worker, in Unix ms.
        """
        await self.write(record)
        beats: dict[str, int] = {}
        for name, raw in cast("dict[bytes, bytes]", await self._redis.hgetall(self._key)).items():
            try:
                beat = msgspec.json.decode(raw, type=_Beat).beat
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                beat = 0  # not a worker's record: it counts as stale
            if abs(record.beat - beat) > stale_after * 1000:
                await self._redis.hdel(self._key, name)
            else:
                beats[name.decode("utf-8", "replace")] = beat
        return beats

    async def write(self, record: WorkerRecord) -> None:
        """Write this worker's record, between two beats."""
        with reports_refusal(self._telemetry, "workers"):
            await self._redis.hset(self._key, record.name, to_json(record))

    async def add_queues(self, queues: Iterable[str]) -> None:
        """Add a worker's queues to the set of all queues in use."""
        await self._redis.sadd(self._queues, *queues)

    async def names(self) -> set[str]:
        """The names of all workers that have a record."""
        return {name.decode("utf-8", "replace") for name in cast("list[bytes]", await self._redis.hkeys(self._key))}

    async def records(self) -> dict[str, WorkerRecord]:
        """All records that can be read, by the worker's name."""
        raws = cast("dict[bytes, bytes]", await self._redis.hgetall(self._key))
        records = {name.decode("utf-8", "replace"): WorkerRecord.read(raw) for name, raw in raws.items()}
        return {name: record for name, record in records.items() if record is not None}

    async def remove(self, name: str) -> None:
        """Remove a worker's record. If Redis refuses that, other workers drop the record as stale."""
        with suppress(ResponseError):
            await self._redis.hdel(self._key, name)

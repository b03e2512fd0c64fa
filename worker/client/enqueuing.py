"""Adds a job to its queue once. The same step begins the log, by which a repeated call is recognized."""

from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from ..broker.client_seals import redis_time_ms
from ..broker.log_pages import RawEntry
from ..contract.entries import Cancelled, Queued, Started, parse_leniently, to_fields
from ..contract.ids import QUEUED
from ..contract.job import Job, digest, is_digest_of
from ..contract.keys import Keys
from ..contract.records import Tombstone
from ..redisio.cluster import ClusterClient
from ..redisio.errors import is_lost_connection
from .errors import Conflict

_DAY = 24 * 3600
_RETENTION = 3600
"""Seconds that a log is kept after its end if the job has no `retention`: the default of WORKER_RETENTION."""


class Enqueuer:
    """Adds jobs to queues."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def add(self, job: Job, queue: str, within: float | None) -> None:
        """Add a job, unless the same request was added before. `within` is seconds until its deadline.

        Raises:
            Conflict: when the id belongs to another request.
            RedisError: when Redis returns an error. Repeating this after a lost reply is safe.
        """
        log, ended = self._keys.tokens(job.id), self._keys.ended(job.id)
        request_digest = digest(job.request, job.fallbacks)
        is_cluster = isinstance(self._redis, ClusterClient)
        while True:
            async with self._redis.pipeline() as pipe:
                await pipe.watch(log, ended)
                is_repeated = await self._is_repeated(pipe, job)
                if is_repeated and not (is_cluster and await self._is_only_queued(pipe, log)):
                    return
                now = await redis_time_ms(pipe)
                if within is not None:
                    job = msgspec.structs.replace(job, deadline=now + int(within * 1000))
                deadline = job.deadline or now + _DAY * 1000
                expire_at = deadline + (job.retention or _RETENTION) * 1000
                pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
                if not is_repeated:
                    queued = Queued(id=QUEUED, digest=request_digest, deadline=deadline, queue=queue, time=now)
                    pipe.xadd(log, to_fields(queued), id=str(QUEUED))  # type: ignore[arg-type]  # dict is invariant
                    pipe.pexpireat(log, expire_at)
                if not is_cluster:
                    pipe.xadd(self._keys.jobs(queue), job.to_fields())  # type: ignore[arg-type]  # dict is invariant
                try:
                    await pipe.execute()
                except WatchError as error:
                    if is_lost_connection(error):  # this may happen each time, so the caller decides how often to retry
                        raise
                    continue
            if is_cluster:
                await self.add_to_queue(job, queue)
            return

    async def add_to_queue(self, job: Job, queue: str) -> None:
        """Add the job in a separate step, since log and job stream are in different slots of a cluster.

        A client that dies between the two steps leaves a log with only `queued`. A repeated call finds that log and
        adds the job. It cannot know whether the job is in the stream already, so the job may be there twice: workers
        acknowledge the second one without running it. Without another call, the log expires with the deadline.
        """
        await self._redis.xadd(self._keys.jobs(queue), job.to_fields())  # type: ignore[arg-type]  # dict is invariant

    async def _is_only_queued(self, pipe: Pipeline, log: str) -> bool:
        """Whether a log holds only `queued`."""
        ((entry_id, _),) = cast("list[RawEntry]", await pipe.xrevrange(log, count=1)) or [(b"", {})]
        return entry_id == str(QUEUED).encode()

    async def _is_repeated(self, pipe: Pipeline, job: Job) -> bool:
        """Whether the same request was enqueued before, read on the connection that watches its keys.

        Raises:
            Conflict: when the id belongs to another request.
        """
        raw = cast("list[RawEntry]", await pipe.xrange(self._keys.tokens(job.id), count=2))
        first_entries = [parse_leniently(*entry) for entry in raw]  # `queued` and `started`, if the log has both
        tombstone = await pipe.get(self._keys.ended(job.id))
        if not first_entries and tombstone is None:
            return False
        if not first_entries:
            known = msgspec.json.decode(cast("bytes", tombstone), type=Tombstone).digest
        else:  # `queued` of another client may have no digest
            digests = [entry.digest for entry in first_entries if isinstance(entry, Queued | Started)]
            known = next(filter(None, digests), "")
        if first_entries and isinstance(first_entries[0], Cancelled):
            raise Conflict(f"the id {job.id} was cancelled before it was enqueued: choose another id")
        if not known and first_entries and isinstance(first_entries[-1], Queued):
            raise Conflict(
                f"the id {job.id} is enqueued, and its client omitted the digest that shows whether it is the same "
                "request: choose another id"
            )
        if not is_digest_of(known, job.request, job.fallbacks):
            raise Conflict(f"the id {job.id} belongs to another request: omit the id, or choose another")
        return True

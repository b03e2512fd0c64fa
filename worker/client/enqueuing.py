"""Adding a job to its queue, once: the log is begun in the same step, and tells that a second call is one."""

from typing import TypeAlias, cast

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from ..broker.client_seals import now_of
from ..contract.entries import AnyEntry, Cancelled, Queued, Started, parse_leniently, to_fields
from ..contract.ids import QUEUED
from ..contract.job import Job, digest, is_digest_of
from ..contract.keys import Keys
from ..contract.records import Tombstone
from ..redisio.cluster import ClusterClient
from ..redisio.errors import is_lost_connection
from .errors import Conflict

_DAY = 24 * 3600
_RETENTION = 3600
"""Seconds that a log is kept where nobody says how long, as WORKER_RETENTION is by default."""

_RawEntry: TypeAlias = tuple[bytes, dict[bytes, bytes]]


class Enqueuer:
    """Adds jobs."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def add(self, job: Job, queue: str, within: float | None) -> None:
        """Add a job, or nothing where the same request was added before. `within` is seconds until its deadline.

        Raises:
            Conflict: when the id belongs to another request.
            RedisError: what Redis says; repeating this after a lost reply is safe.
        """
        log, ended = self._keys.tokens(job.id), self._keys.ended(job.id)
        asked = digest(job.request, job.fallbacks)
        is_cluster = isinstance(self._redis, ClusterClient)
        while True:
            async with self._redis.pipeline() as pipe:
                await pipe.watch(log, ended)
                attaches = await self._attaches(pipe, job)
                if attaches and not (is_cluster and await self._waits(pipe, log)):
                    return
                now = await now_of(pipe)
                if within is not None:
                    job = msgspec.structs.replace(job, deadline=now + int(within * 1000))
                deadline = job.deadline or now + _DAY * 1000
                expire_at = deadline + (job.retention or _RETENTION) * 1000
                pipe.multi()  # type: ignore[no-untyped-call]  # redis-py 8.1 leaves this one without types
                if not attaches:
                    queued = Queued(id=QUEUED, digest=asked, deadline=deadline)
                    pipe.xadd(log, to_fields(queued), id=str(QUEUED))  # type: ignore[arg-type]  # dict is invariant
                    pipe.pexpireat(log, expire_at)
                if not is_cluster:
                    pipe.xadd(self._keys.jobs(queue), job.to_fields())  # type: ignore[arg-type]  # dict is invariant
                try:
                    await pipe.execute()
                except WatchError as error:
                    if is_lost_connection(error):  # possibly each time: the caller decides how long to go on
                        raise
                    continue
            if is_cluster:
                await self._add_after_log(job, queue)
            return

    async def _add_after_log(self, job: Job, queue: str) -> None:
        """Add the job where one MULTI cannot hold both: log and job stream are in different slots of a cluster.

        Whoever dies between the two leaves a log with nothing but `queued`, and the same call made again finds that
        and adds the job. It cannot tell whether the job is there and waits, so there may be two of it: workers
        acknowledge the second one without running it. Where nobody calls again, the log expires with the deadline.
        """
        await self._redis.xadd(self._keys.jobs(queue), job.to_fields())  # type: ignore[arg-type]  # dict is invariant

    async def _waits(self, pipe: Pipeline, log: str) -> bool:
        """Whether a log holds `queued` and nothing else."""
        ((entry_id, _),) = cast("list[_RawEntry]", await pipe.xrevrange(log, count=1)) or [(b"", {})]
        return entry_id == str(QUEUED).encode()

    async def _attaches(self, pipe: Pipeline, job: Job) -> bool:
        """Whether the same request was enqueued before, read on the connection that watches its keys."""
        begin = await self._begin(pipe, job.id)
        raw = await pipe.get(self._keys.ended(job.id))
        if not begin and raw is None:
            return False
        if not begin:
            known = msgspec.json.decode(cast("bytes", raw), type=Tombstone).digest
        else:  # `queued` by another client may come without one
            known = next((entry.digest for entry in begin if isinstance(entry, Queued | Started) and entry.digest), "")
        if begin and isinstance(begin[0], Cancelled):
            raise Conflict(f"the id {job.id} was cancelled before it was enqueued: choose another")
        if not known and begin and isinstance(begin[-1], Queued):
            raise Conflict(
                f"the id {job.id} is enqueued, and its client left out the digest that would tell whether it is "
                "the same request: choose another"
            )
        if not is_digest_of(known, job.request, job.fallbacks):
            raise Conflict(f"the id {job.id} belongs to another request: leave the id out, or choose another")
        return True

    async def _begin(self, redis: Redis, request_id: str) -> list[AnyEntry]:
        """The first two entries of a log: `queued` and `started`, where it has both."""
        raw = cast("list[_RawEntry]", await redis.xrange(self._keys.tokens(request_id), count=2))
        return [parse_leniently(*entry) for entry in raw]

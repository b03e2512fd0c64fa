"""Estimates how many jobs are before a waiting one in its queue, for the heartbeat of a stream that has no text yet.

Redis does not rank the entries of a stream. A queue is measured once a second at most, whatever the number of waiting
streams: how many jobs no worker has read, and when the first and the last of them were added. The place of a job is
interpolated by the time at which it was added. It is exact for the first and the last job, and in between as far as
jobs were added evenly. Workers take parked jobs before new ones. Every replica gets the same estimate, because all of
it comes from Redis.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..broker.log_pages import RawEntry
from ..broker.queue_depth import Backlog, backlog_of, jobs_before
from ..contract.entries import Queued, parse_leniently
from ..contract.keys import DEFAULT_QUEUE, Keys
from ..redisio.shared_call import SharedCall

_FRESH = 1.0
"""Seconds for which the measure of a queue is used."""
_MOST_QUEUES = 1000


class QueuePositions:
    """The places of waiting jobs. `clock` is in seconds."""

    def __init__(self, redis: Redis, keys: Keys, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._keys = keys
        self._clock = clock
        self._backlogs: dict[str, tuple[float, Backlog]] = {}
        """The backlog of each queue, and when it was measured."""
        self._queries: dict[str, SharedCall[Backlog]] = {}

    async def position(self, request_id: str) -> int | None:
        """Estimate how many jobs are before this one. None if the job does not wait, or if nothing is known.

        Nothing is known of a job that was added without `Client`: its log has no `queued` entry. Nor is anything known
        while Redis does not answer.
        """
        try:
            last = cast("list[RawEntry]", await self._redis.xrevrange(self._keys.tokens(request_id), count=1))
            queued = parse_leniently(*last[0]) if last else None
            if not isinstance(queued, Queued) or not queued.time:
                return None
            return jobs_before(queued.time, await self._backlog(queued.queue or DEFAULT_QUEUE))
        except (RedisError, OSError):
            return None

    async def _backlog(self, queue: str) -> Backlog:
        measured_at, backlog = self._backlogs.get(queue, (-_FRESH, Backlog()))
        if self._clock() - measured_at < _FRESH:
            return backlog
        query = self._queries.get(queue)
        if query is None:
            if len(self._queries) >= _MOST_QUEUES:
                self._queries.clear()
                self._backlogs.clear()
            query = self._queries[queue] = SharedCall(partial(self._measure, queue))
        return await query()

    async def _measure(self, queue: str) -> Backlog:
        backlog = await backlog_of(self._redis, self._keys.jobs(queue))
        self._backlogs[queue] = (self._clock(), backlog)
        return backlog

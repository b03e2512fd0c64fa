"""Lists the running requests with their progress, from what Redis knows of them without their content.

The groups' pending entries have the job, its worker and nothing of the request. The lifecycle's `started` names the
request of a job. A script returns the length and the last id of each log: the id has the attempt, and what a log has
grown by between two reads is the rate. No prompt and no text leaves Redis.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from redis.asyncio import Redis

from ..broker.consumers import consumers_of, is_line
from ..broker.log_pages import RawEntry
from ..contract.ids import SEAL, EntryId
from ..contract.keys import GROUP, Keys
from ..contract.records import Lifecycle
from ..redisio.batching import CommandBatcher
from ..redisio.scripts import Script

LIMIT = 1000
"""The most requests in a picture. Of more, the oldest of each worker are in it."""

_PAGES = 5
"""The most pages of the lifecycle that are read for one picture."""

_MOST_STARTS = 200_000
"""The most starts to remember: those whose end was trimmed from the lifecycle would stay for ever."""

_BEFORE_FIRST_TOKEN = 3
"""The entries of a log before its first token: `queued`, `started` and `opened`."""

_MEASURE = Script("""
local last = call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
return {call('XLEN', KEYS[1]), last and last[1] or ''}
""")
"""Returns the length of a log and the id of its last entry, without the entry."""


class _Job(NamedTuple):
    """A job, by its queue and the id of its entry there."""

    queue: str
    entry: str


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A job that a worker has, or that was handed over, and what is known of its request. Times are in seconds.

    `request_id` is empty while the lifecycle has no record of its start. `worker` is the consumer that has the job.
    `age` is the time since its start; while that is unknown, the time since the job was added, which is more, and
    `has_started` is false. `tokens` is approximate: the number of the log's entries but the three before the first
    token. `rate` is that of tokens a second. `silence` is how long the log has had no new entry; it counts from the
    first picture that has the request, and until the log grows `has_grown` is false. `attempt` is 0 if the log is empty
    or has ended.
    """

    queue: str
    job: str
    worker: str
    age: float
    request_id: str = ""
    has_started: bool = False
    tokens: int | None = None
    rate: float | None = None
    silence: float | None = None
    has_grown: bool = False
    attempt: int = 0
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class RunningPicture:
    """The running requests at one moment. `total` is how many there are, which may be more than are listed."""

    requests: tuple[RunningRequest, ...] = ()
    total: int = 0


@dataclass(frozen=True, slots=True)
class _Progress:
    """A log in a picture: its length, its last id, when both were read, and when the length changed.

    Times are those of the event loop. `rate` is None in the first picture that has the log.
    """

    length: int
    last: str
    read: float
    changed: float
    rate: float | None = None
    has_grown: bool = False


class RunningRequests:
    """Lists the running requests, again and again. Each list is compared with the one before.

    `limit` is the most requests in a list, `page` the number of lifecycle records that are read at once.
    """

    def __init__(self, redis: Redis, keys: Keys, *, limit: int = LIMIT, page: int = 1000) -> None:
        self._redis = redis
        self._keys = keys
        self._limit = limit
        self._batcher = CommandBatcher(redis)
        self._starts = _Starts(redis, keys, page)
        self._progress: dict[str, _Progress] = {}

    async def read(self, queues: Iterable[str]) -> RunningPicture:
        """The running requests of some queues, oldest job first.

        Raises:
            RedisError: when Redis returns an error or does not answer.
        """
        workers, total = await self._pending(queues)
        starts = await self._starts.find(workers)
        requests = sorted({start.request_id for start in starts.values()})
        keys = [self._keys.tokens(request_id) for request_id in requests]
        replies = await asyncio.gather(*[_MEASURE.run(self._batcher, [key], ()) for key in keys])
        seconds, micros = await self._redis.time()
        now = int(seconds) + int(micros) / 1e6
        self._progress = {
            request_id: _advanced(self._progress.get(request_id), int(length), last.decode())
            for request_id, (length, last) in zip(requests, replies, strict=True)
        }
        found = [
            self._request(job, worker, now, starts.get(job))
            for job, worker in sorted(workers.items(), key=lambda item: EntryId.parse(item[0].entry))
        ]
        return RunningPicture(tuple(found), total)

    async def aclose(self) -> None:
        """Close the connections to logs; the client stays open."""
        await self._batcher.aclose()

    async def _pending(self, queues: Iterable[str]) -> tuple[dict[_Job, str], int]:
        """The consumers of pending jobs without those that are parked, and the number of such jobs in all."""
        places = [
            (queue, consumer)
            for queue in queues
            for consumer in await consumers_of(self._redis, self._keys.jobs(queue))
            if not is_line(consumer.name)
        ]
        pipe = self._redis.pipeline(transaction=False)
        for (queue, consumer), share in zip(
            places, shares([consumer.pending for _, consumer in places], self._limit), strict=True
        ):
            pipe.xpending_range(self._keys.jobs(queue), GROUP, "-", "+", max(1, share), consumer.name)
        replies = await pipe.execute() if places else []
        workers = {
            _Job(queue, entry["message_id"].decode()): consumer.name
            for (queue, consumer), entries in zip(places, replies, strict=True)
            for entry in entries
        }
        return workers, max(len(workers), sum(consumer.pending for _, consumer in places))

    def _request(self, job: _Job, worker: str, now: float, start: "_Start | None") -> RunningRequest:
        added = EntryId.parse(job.entry).attempt / 1000
        if start is None:
            return RunningRequest(job.queue, job.entry, worker, max(0.0, now - added))
        progress = self._progress[start.request_id]
        tail = EntryId.parse(progress.last) if progress.last else None
        return RunningRequest(
            job.queue,
            job.entry,
            worker,
            age=max(0.0, now - (start.time / 1000 or added)),
            request_id=start.request_id,
            has_started=bool(start.time),
            tokens=max(0, progress.length - _BEFORE_FIRST_TOKEN),
            rate=progress.rate,
            silence=progress.read - progress.changed,
            has_grown=progress.has_grown,
            attempt=tail.attempt if tail and tail != SEAL else 0,
            has_ended=tail == SEAL,
        )


def _advanced(before: _Progress | None, length: int, last: str) -> _Progress:
    """What is known of a log now, from what was known in the picture before."""
    now = asyncio.get_running_loop().time()
    if before is None:
        return _Progress(length, last, now, now)
    has_changed = length != before.length
    return _Progress(
        length,
        last,
        now,
        changed=now if has_changed else before.changed,
        rate=max(0, length - before.length) / max(now - before.read, 1e-3),
        has_grown=has_changed or before.has_grown,
    )


@dataclass(frozen=True, slots=True)
class _Start:
    """The request of a job. `time` is that of its start in Unix ms; 0 if only its end is known."""

    request_id: str
    time: int


class _Starts:
    """The requests of jobs, by the lifecycle's records. The stream is read backwards, a few pages in each call.

    Nothing is read while every job is known. What was not read yet is kept as ranges of ids, the newest last.
    """

    def __init__(self, redis: Redis, keys: Keys, page: int) -> None:
        self._redis = redis
        self._key = keys.lifecycle
        self._page = page
        self._known: dict[_Job, _Start] = {}
        self._ended: set[_Job] = set()
        """Jobs whose end was read, and perhaps not yet their start."""
        self._newest = "-"
        self._unread: list[tuple[str, str]] = []
        """The ranges, each with its lower and its upper bound as XREVRANGE has them."""

    async def find(self, jobs: Iterable[_Job]) -> dict[_Job, _Start]:
        """The starts of these jobs, as far as they are known by now."""
        wanted = set(jobs)
        if not (self._unread and self._unread[-1][1] == "+"):
            self._unread.append((self._newest, "+"))
        for _ in range(_PAGES):
            missing = wanted - self._known.keys()
            if not (missing and self._unread):
                break
            lower, upper = self._unread[-1]
            oldest = min(EntryId.parse(job.entry).attempt for job in missing)
            if upper != "+" and EntryId.parse(upper[1:]).attempt < oldest:  # a job starts after it was added
                break
            page = cast(
                "list[RawEntry]", await self._redis.xrevrange(self._key, max=upper, min=lower, count=self._page)
            )
            self._unread.pop()
            if page and upper == "+":
                self._newest = f"({page[0][0].decode()}"
            if len(page) == self._page:
                self._unread.append((lower, f"({page[-1][0].decode()}"))
            self._learn(page, wanted)
        found = {job: self._known[job] for job in wanted if job in self._known}
        if not self._unread:
            self._ended.clear()
        for job in list(self._known)[: max(0, len(self._known) - _MOST_STARTS)]:
            del self._known[job]
        return found

    def _learn(self, page: Sequence[RawEntry], wanted: set[_Job]) -> None:
        """Take the records of a page, newest first. Jobs that have ended are forgotten unless they are wanted."""
        for entry_id, fields in page:
            record = Lifecycle.read(entry_id.decode(), fields)
            job = _Job(record.queue, record.job)
            if not record.id:
                continue
            if record.type == "finished":
                self._ended.add(job)
                if job not in wanted:
                    self._known.pop(job, None)
                    continue
            elif job in self._ended and job not in wanted:
                continue
            self._known[job] = _Start(record.id, record.time if record.type == "started" else 0)


def shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Divide a limit among parts of these sizes: none gets more than its size, and small parts get all."""
    result, left = [0] * len(sizes), limit
    for rank, place in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        result[place] = min(sizes[place], left // (len(sizes) - rank))
        left -= result[place]
    return result

"""The story of one request, from its log, tombstone, lifecycle, queue and dead letter, without any content."""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeAlias, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..broker.consumers import HANDED_OVER, ConsumerState, is_line
from ..broker.control import Control
from ..broker.dead_letters import DeadLetters
from ..broker.parked_jobs import lines_among
from ..broker.queue_depth import backlog_of, is_served, jobs_before
from ..contract.entries import (
    AnyEntry,
    Claimed,
    Delta,
    Failed,
    Object,
    Opened,
    Queued,
    Restarted,
    Resumed,
    Started,
    Terminal,
    Usage,
    parse_leniently,
)
from ..contract.ids import SEAL
from ..contract.keys import DEFAULT_QUEUE, GROUP, Keys
from ..contract.records import Lifecycle, Tombstone
from ..engine.outline import BETWEEN_MODELS
from ..redisio.errors import is_permission_denied
from ..redisio.scripts import Script
from .queues import find_queues, used_queues
from .suspects import request_ids
from .units import printable

State: TypeAlias = Literal["unknown", "waiting", "running", "ended", "expired"]

_PAGE = 1000
_SEARCHED_FOR = 2000
"""Milliseconds after the `queued` entry in which the job was added to its queue: the script adds both at once."""

_LETTER_BEFORE_END = 60_000
"""Milliseconds that a dead letter may be older than its request's end: the seal comes before the letter."""

_RECORD_BEFORE_END = 1000
"""Milliseconds that the lifecycle's record may be older than the request's end: their clocks are not quite the same."""

_SEARCH_STEP = 100
_MOST_SEARCHED = 10_000
"""The most jobs of a queue, or records of the lifecycle, that are searched for a request, and how many a step reads."""

_FIND = Script("""
local last = ''
for _, entry in ipairs(call('XRANGE', KEYS[1], ARGV[2], ARGV[3], 'COUNT', ARGV[4])) do
  last = entry[1]
  for field = 1, #entry[2], 2 do
    if entry[2][field] == 'id' and entry[2][field + 1] == ARGV[1] then return {last, last} end
  end
end
return {'', last}
""")
"""The id of a request's first entry among some of a stream, or an empty text, and that of the last one read.

It returns no prompt. ARGV: the request, the first and the last id, the number of entries."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at a request: who made it, why, and what it wrote.

    `began` is Unix ms, 0 if only the lifecycle has the attempt. `delivery` is how often the job had been delivered by
    then; 0 if that is not known. `reason` is empty for the first attempt. `kept` is the id up to which a resumed
    attempt kept the former text; `restarted` is whether it made the former text void. `model` is that of vLLM's answer,
    empty before that.
    """

    number: int
    worker: str = ""
    began: int = 0
    reason: str = ""
    delivery: int = 0
    kept: str = ""
    restarted: bool = False
    model: str = ""
    deltas: int = 0


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request. Times are Unix ms, 0 if they are not known; what ends with `_for` is seconds.

    `waits` is what a waiting request waits for, `before` how many jobs are about before it (None if that is not known).
    `outcome`, `code`, `finish_reason`, `usage` and `timings` are those of its end, `server` is the address of the vLLM
    server that last streamed to it, and is known once it has ended. `buried` is the reason of its dead
    letter, and `letter` the letter's id.
    """

    id: str
    state: State = "unknown"
    queue: str = ""
    job: str = ""
    queued: int = 0
    deadline: int = 0
    started: int = 0
    ended: int = 0
    waits: str = ""
    before: int | None = None
    attempts: tuple[Attempt, ...] = ()
    outcome: str = ""
    code: str = ""
    finish_reason: str = ""
    server: str = ""
    usage: Usage = msgspec.field(default_factory=Usage)
    timings: Object = msgspec.field(default_factory=dict)
    buried: str = ""
    letter: str = ""
    log_for: float | None = None
    tombstone_for: float | None = None

    @property
    def waited(self) -> float | None:
        """Seconds from the job's addition to its start; None if one of them is not known."""
        return max(0, self.started - self.queued) / 1000 if self.started and self.queued else None


class AmbiguousJob(Exception):
    """Jobs of several requests have this id, in different queues. The message names them."""


async def explain(redis: Redis, keys: Keys, request_id: str) -> Story:
    """Tell what is known of a request. `request_id` may also be the id of its job, as operators see it.

    Raises:
        AmbiguousJob: when it is the id of jobs of several requests.
        RedisError: when Redis does not answer, or denies the right to read the log.
    """
    story = await _tell(redis, keys, request_id)
    if story.state != "unknown":
        return story
    by_queue = await _requests_of_job(redis, keys, request_id)
    if len(set(by_queue.values())) > 1:
        found = ", ".join(f"request {of_job} in queue {queue}" for queue, of_job in by_queue.items())
        raise AmbiguousJob(
            printable(f"several requests have a job with the id {request_id}: {found}. Give the id of a request")
        )
    return await _tell(redis, keys, next(iter(by_queue.values()))) if by_queue else story


async def _tell(redis: Redis, keys: Keys, request_id: str) -> Story:
    pipe = redis.pipeline(transaction=False)
    pipe.get(keys.ended(request_id))
    pipe.pttl(keys.ended(request_id))
    pipe.pttl(keys.tokens(request_id))
    stone, stone_for, log_for = await pipe.execute()
    tombstone = Tombstone.read(stone) if stone is not None else None
    story = await _read_log(redis, keys, request_id)
    story = msgspec.structs.replace(
        story,
        tombstone_for=stone_for / 1000 if stone_for >= 0 else None,
        log_for=log_for / 1000 if log_for >= 0 else None,
        ended=tombstone.time if tombstone else 0,
    )
    if story.state == "unknown" and tombstone is not None:
        story = msgspec.structs.replace(story, state="expired", outcome=tombstone.outcome)
    if story.ended and (record := await _finished_record(redis, keys, request_id, story.ended)):
        story = _completed(story, record)
    if story.state == "unknown":
        story = await _search_queues(redis, keys, story)
    if story.state in {"waiting", "running"}:
        return await _locate(redis, keys, story)
    if story.code and story.job:
        since = story.ended or story.queued
        letter, reason = await DeadLetters(redis, keys).find(story.queue, story.job, since - _LETTER_BEFORE_END)
        return msgspec.structs.replace(story, letter=letter, buried=reason)
    return story


async def _read_log(redis: Redis, keys: Keys, request_id: str) -> Story:
    attempts: list[Attempt] = []
    story = Story(id=request_id)
    async for entry in _entries(redis, keys.tokens(request_id)):
        match entry:
            case Queued():
                queue = entry.queue or DEFAULT_QUEUE
                story = msgspec.structs.replace(
                    story, state="waiting", queue=queue, queued=entry.time, deadline=entry.deadline
                )
            case Started() | Claimed():
                is_first = isinstance(entry, Started)
                queued = story.queued or int(entry.job.partition("-")[0] or 0)
                story = msgspec.structs.replace(
                    story,
                    state="running",
                    queue=entry.queue,
                    job=entry.job,
                    queued=queued,
                    started=entry.time if is_first else story.started,
                )
                attempts.append(
                    Attempt(
                        number=entry.id.attempt,
                        worker=entry.worker,
                        began=entry.time,
                        reason="" if isinstance(entry, Started) else entry.reason,
                        delivery=entry.delivery,
                    )
                )
            case Terminal():
                story = msgspec.structs.replace(
                    story,
                    state="ended",
                    outcome=entry.type,
                    code=entry.code if isinstance(entry, Failed) else "",
                    finish_reason=entry.finish_reason,
                    usage=entry.usage,
                    timings=entry.timings,
                )
            case _ if attempts:
                attempts[-1] = _extended(attempts[-1], entry)
    return msgspec.structs.replace(story, attempts=tuple(attempts))


def _extended(attempt: Attempt, entry: AnyEntry) -> Attempt:
    match entry:
        case Delta():
            return msgspec.structs.replace(attempt, deltas=attempt.deltas + 1)
        case Opened():
            return msgspec.structs.replace(attempt, model=entry.model)
        case Resumed():
            return msgspec.structs.replace(attempt, kept=entry.after)
        case Restarted():
            return msgspec.structs.replace(attempt, restarted=True)
        case _:
            return attempt


async def _entries(redis: Redis, key: str) -> AsyncIterator[AnyEntry]:
    after = "-"
    while page := cast("Sequence[tuple[bytes, dict[bytes, bytes]]]", await redis.xrange(key, after, count=_PAGE)):
        for entry_id, fields in page:
            yield (entry := parse_leniently(entry_id, fields))
            if entry.id == SEAL:  # no id is greater, so Redis would refuse the next page
                return
        after = f"({page[-1][0].decode()}"


async def _requests_of_job(redis: Redis, keys: Keys, job: str) -> dict[str, str]:
    """The requests of the jobs with an id, by their queue: all queues in use that have the job and are readable."""
    found = dict[str, str]()
    if re.fullmatch(r"\d{1,15}-\d{1,15}", job):
        with suppress(ResponseError):
            for queue in sorted(await used_queues(redis, keys)):
                with suppress(ResponseError):  # the key of a queue may have another type
                    if request_id := (await request_ids(redis, keys.jobs(queue), [job]))[0]:
                        found[queue] = request_id
    return found


async def _search_queues(redis: Redis, keys: Keys, story: Story) -> Story:
    """Find a job that was added without a `queued` entry, as by a plain XADD, and that no worker has started.

    A search of all keys for queues follows only if the job is in none of those in use.
    """
    searched = set[str]()
    for find in (used_queues, find_queues):
        queues: set[str] | None = None
        with suppress(ResponseError):  # the user may lack the right
            queues = await find(redis, keys)
        for queue in sorted((queues or set()) - searched):
            searched.add(queue)
            if job := await _find(redis, keys.jobs(queue), story.id):
                queued = int(job.partition("-")[0])
                return msgspec.structs.replace(story, state="waiting", queue=queue, job=job, queued=queued)
    return story


async def _finished_record(redis: Redis, keys: Keys, request_id: str, ended: int) -> Lifecycle | None:
    """The lifecycle's record of a request's end; None if it has been removed, is too far behind, or is not readable."""
    after = str(ended - _RECORD_BEFORE_END)
    while line := await _find(redis, keys.lifecycle, request_id, after):
        found = cast("Sequence[tuple[bytes, dict[bytes, bytes]]]", await redis.xrange(keys.lifecycle, line, line))
        for _, fields in found:
            if (record := Lifecycle.read(line, fields)).type == "finished":
                return record
        after = f"({line}"
    return None


def _completed(story: Story, record: Lifecycle) -> Story:
    """Add what only the lifecycle's record has: the server, and what an expired log no longer has."""
    story = msgspec.structs.replace(story, server=record.server)
    if story.state != "expired":
        return story
    attempt = Attempt(number=record.attempt, worker=record.worker, model=record.model)
    return msgspec.structs.replace(
        story, queue=record.queue, job=record.job, attempts=(attempt,), usage=record.usage, timings=record.timings
    )


async def _find(redis: Redis, key: str, request_id: str, after: str = "-") -> str:
    """The id of a request's first entry in a stream; empty if it is not found or not readable."""
    for _ in range(0, _MOST_SEARCHED, _SEARCH_STEP):
        try:
            found, last = await _FIND.run_on(redis, [key], [request_id, after, "+", str(_SEARCH_STEP)])
        except ResponseError as error:
            if not is_permission_denied(error) and "WRONGTYPE" not in str(error):
                raise
            return ""
        if found or not last:
            return cast("bytes", found).decode()
        after = f"({last.decode()}"
    return ""


async def _hindrance_of(redis: Redis, keys: Keys, queue: str) -> str:
    """What an unread job of a queue waits for."""
    seconds, _ = await redis.time()
    try:
        pauses = (await Control(redis, keys, lambda: seconds * 1000).read()).pauses
        if queue in pauses:
            return f"the end of the queue's pause (worker resume {queue})"
        if not await is_served(redis, keys, queue):
            return "a worker that serves the queue: none does"
    except ResponseError as error:
        if not is_permission_denied(error):
            raise
    return "a worker that takes the job"


async def _locate(redis: Redis, keys: Keys, story: Story) -> Story:
    """Find where the job of an unfinished request is: unread, parked, handed over, or with a worker."""
    key, job = keys.jobs(story.queue), story.job
    try:
        if not job and story.queued:
            window = [str(story.queued - 1), str(story.queued + _SEARCHED_FOR)]
            found, _ = await _FIND.run_on(redis, [key], [story.id, *window, str(_PAGE)])
            job = cast("bytes", found).decode()
        pending = cast("list[dict[str, Any]]", await redis.xpending_range(key, GROUP, job, job, 1) if job else [])
    except ResponseError as error:
        if is_permission_denied(error):
            return msgspec.structs.replace(story, job=job)
        if not str(error).startswith("NOGROUP"):
            raise
        pending = []  # no worker has ever served the queue
    consumer = pending[0]["consumer"].decode("utf-8", "replace") if pending else ""
    waits, before = "", None
    if is_line(consumer):
        (line,) = lines_among(story.queue, [ConsumerState(consumer, 1)])
        model, _, _ = line.model.partition(BETWEEN_MODELS)
        waits = f"room at a vLLM server for {model or 'any model'}: the job is parked"
    elif consumer == HANDED_OVER:
        waits = "another worker, which continues the job in a moment"
    elif story.state == "waiting" and consumer:
        waits = f"its first entry by worker {consumer}, which has taken the job"
    elif story.state == "waiting":
        waits = await _hindrance_of(redis, keys, story.queue)
        before = jobs_before(story.queued, await backlog_of(redis, key)) if story.queued else None
    return msgspec.structs.replace(story, job=job, waits=waits, before=before)

"""Ownership of logs: a process acquires a request's log, continues it under a later attempt, seals and finalizes it.

Every decision is based on the log itself. What must not change between decision and write is compared and written by
one script. Each method may therefore be repeated after a lost reply: it finds the entries that were written and
continues from them. Each raises LogRefused if the log's key holds another type.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from redis.exceptions import ResponseError

from ..contract.entries import TAKEOVER, Claimed, Entry, Started, Terminal, parse_leniently, to_fields, to_json
from ..contract.ids import SEAL, EntryId
from ..contract.keys import Keys
from ..contract.records import Tombstone
from ..redisio.batching import CommandBatcher
from ..redisio.scripts import Script
from .acquisition import (
    Acquired,
    AcquireResult,
    AlreadyEnded,
    DuplicateJob,
    IdReused,
    LeaseLost,
    acquired,
    attempt_number_after,
    job_of,
    was_written_by,
)
from .cluster_publisher import AnyPublisher
from .feed import encode
from .job_queue import Delivery, JobQueue
from .log_pages import RawEntry, read_raw_entries
from .log_scripts import BEGIN, CLAIM, FINALIZE, LOOK, SEAL_LOG, SEAL_UNOWNED, LogState, raw_entry
from .log_writer import LogDiverged, LogFenced, LogOver, LogRefused, LogWriter, loss_from_tail, refusal_from
from .publisher import Publisher
from .replicas import Replicas

_NO_END = "its end was deleted, and Redis takes no other"


class LogOwnership:
    """Acquires, continues, seals and finalizes the logs of requests for this process.

    `worker` is the worker's name. `nonce` distinguishes the process from every other one, including an earlier one of
    the same worker name. `replicas` must have the end of a log before its job is acknowledged. `now` returns Redis's
    time in Unix ms.
    """

    def __init__(
        self, batcher: CommandBatcher, keys: Keys, jobs: JobQueue, publisher: AnyPublisher, *, worker: str,
        nonce: str, now: Callable[[], int], replicas: Replicas | None = None,
    ) -> None:  # fmt: skip
        self._batcher = batcher
        self._keys = keys
        self._jobs = jobs
        self._publisher = publisher
        # In a cluster, the keys of a job are on several servers.
        self._feed = publisher.feed if isinstance(publisher, Publisher) else None
        self.worker = worker
        self._nonce = nonce
        self._now = now
        self._replicas = replicas or Replicas()

    async def acquire(
        self, request_id: str, delivery: Delivery, expires: int, digest: str = "",
        matches_digest: Callable[[str], bool] = lambda _: True, started_record: Sequence[str] = (),
    ) -> AcquireResult:  # fmt: skip
        """Acquire the log of a delivered job, or find out why this process must not own it.

        `expires` (Unix ms) is when a log that is never sealed expires. `digest` is the request's.
        `matches_digest` decides whether a stored digest belongs to the same request: that digest may be empty, or from
        an earlier version. `started_record` is the lifecycle's record of a first attempt, as the words of an XADD.
        `Acquired.is_start_recorded` is whether it was written in the same step. In a cluster it never is, since the
        lifecycle is in another slot.

        Raises:
            LogExhausted: when no attempt can follow.
        """
        while True:
            state = await self._begin(request_id, delivery, expires, digest, started_record)
            result = state if isinstance(state, Acquired) else await self._take_over(
                request_id, delivery, matches_digest, state
            )  # fmt: skip
            if result is not None:
                return result

    async def _take_over(
        self, request_id: str, delivery: Delivery, matches_digest: Callable[[str], bool], state: LogState
    ) -> AcquireResult | None:
        """Acquire a log that was begun, or find out why not; None if the log changed meanwhile.

        The decision uses the greatest id that the log ever had, because entries may have been deleted.
        """
        greatest, holder = state.greatest, state.holder
        if state.has_ended:
            return IdReused() if _is_reused(state, delivery, matches_digest) else AlreadyEnded()
        if greatest is None:
            return None
        if greatest == SEAL:
            raise LogRefused(_NO_END)
        is_same_job = isinstance(holder, Started | Claimed) and job_of(holder) == job_of(delivery)
        if not is_same_job and _is_reused(state, delivery, matches_digest):
            return IdReused()
        # This process has begun the attempt already if the reply was lost, or if the log could not be read afterwards.
        # After an earlier delivery to this process it begins another: entries of that run may still be on the way to
        # Redis.
        nothing_follows_the_claim = greatest.n == 0
        if nothing_follows_the_claim and was_written_by(holder, self._nonce, delivery, delivery.count):
            return acquired(self._writer(request_id, greatest.attempt), await self._read(request_id))
        if (obstacle := await self._obstacle(holder, delivery)) is not None:
            return obstacle
        attempt = attempt_number_after(greatest.attempt)
        if isinstance(await self._claim(request_id, attempt, delivery, TAKEOVER, delivery.count), LogState):
            return None
        return acquired(self._writer(request_id, attempt), await self._read(request_id), greatest)

    async def _obstacle(self, holder: Entry | None, delivery: Delivery) -> DuplicateJob | LeaseLost | None:
        """Why this process must not take over a log from its holder; None when it may."""
        named = job_of(holder) if isinstance(holder, Started | Claimed) and holder.job else None
        if named and named != job_of(delivery):
            # Another job of the same request holds the log. This job is a duplicate while that job is not done.
            return DuplicateJob() if await self._jobs.is_outstanding(*named) else None
        return None if await self._jobs.is_held(delivery) else LeaseLost()

    async def recreate(self, log: LogWriter, delivery: Delivery, expires: int, digest: str = "") -> None:
        """Recreate this process's log that is gone though the request has not ended, as after a failover.

        The new log begins with `1-0`. The owner then continues under a later attempt than it had, so that a reader of
        the lost log sees that the new entries are new. A log that has, or had, an attempt is not changed.

        Raises:
            LogOver: when the request has ended: its log was deleted or has expired.
            LogFenced: when this process no longer has the job.
        """
        if not await self._jobs.is_held(delivery):
            raise LogFenced("Redis does not hold the log as it was, and this worker no longer has the job")
        state = await self._begin(log.request_id, delivery, expires, digest)
        if isinstance(state, LogState) and state.last is None and state.tombstone is not None:
            raise LogOver("the request has ended")

    async def next_attempt(self, log: LogWriter, delivery: Delivery, reason: str) -> None:
        """Continue this process's log under its next attempt.

        Raises:
            LogExhausted: when no attempt can follow.
            LogLost: when this process no longer owns the log.
        """
        attempt = attempt_number_after(log.attempt)
        state = await self._claim(log.request_id, attempt, delivery, reason)
        if isinstance(state, LogState):
            lost = loss_from_tail(state.tail, attempt, EntryId(attempt, 0))
            if isinstance(lost, LogDiverged) and state.greatest is not None and state.greatest >= (attempt, 0):
                lost = LogRefused(_NO_END) if state.greatest == SEAL else LogFenced(f"attempt {attempt} had begun")
            if lost is not None:
                raise lost
            if not was_written_by(state.holder, self._nonce, delivery, 0):
                raise LogFenced(f"attempt {attempt} has begun")
        log.begin_attempt(attempt, (state.length if isinstance(state, LogState) else state) - 1)

    async def seal(
        self, log: LogWriter, delivery: Delivery, end: Terminal, tombstone: Tombstone, *, retention: int,
        remember: int, finished_record: Sequence[str] = (),
    ) -> tuple[Entry, bool]:  # fmt: skip
        """Write the terminal entry with expiry and tombstone in one step; returns the terminal entry of the log.

        The log's last entry is compared with the last one of this owner. `retention` and `remember` are seconds.

        `finished_record` is the lifecycle's record of the end, as the words of an XADD. With it, the same step settles
        the job: it also publishes the end and acknowledges the job. The second result is whether all of this was done.
        If not, for any reason, the caller does the steps one by one, and the lifecycle may get the record twice. In a
        cluster, and where replicas must have the end before the acknowledgement, nothing but the log is settled.

        The number of entries is compared too. A log from which entries were deleted must not be sealed as a complete
        answer. Nor must one that was renamed away and back while another was begun in its place: it may have the right
        number of entries, but lacks the first one of the attempt. A log that was trimmed at its front is sealed: its
        followers have all of it, and the ids show later readers that entries are missing.

        Raises:
            LogLost: when this process no longer owns the log.
        """
        await log.wait_drained()
        last, length, first, seal = log.accepted, log.length, EntryId(log.attempt, 0), to_fields(end)
        words = [str(retention), to_json(tombstone), str(remember), str(2 * len(seal)), *chain(*seal.items())]
        if finished_record and self._feed and not self._replicas.count:
            message = self._feed.take_last_message(log, seal)
            words += log.feed, message, self._keys.jobs(delivery.queue), delivery.id, *finished_record
        while True:
            state = await self._run(SEAL_LOG, log.request_id, str(last), str(length), str(first), *words)
            if not isinstance(state, LogState):
                return end, bool(state[0])
            if state.last and state.tail == SEAL:
                return state.last, False
            if (lost := loss_from_tail(state.tail, log.attempt, log.accepted)) is not None:
                raise lost
            if state.greatest == SEAL:
                raise LogRefused(_NO_END)
            is_whole = state.length == log.length and state.holder is not None
            if not is_whole and not _is_trimmed(state, log):
                what = (
                    f"{state.length} entries of the log" if state.holder else "a log without its attempt's first entry"
                )
                raise LogDiverged(f"Redis holds {what}, and has acknowledged {log.length} entries")
            last, length = state.tail or last, state.length
            first = state.first.id if state.first and not is_whole else first

    async def seal_unowned(self, request_id: str, delivery: Delivery, end: Terminal, expires: int) -> bool:
        """Seal the log of a job that this process cannot run, with any contents.

        Returns true also if the request had ended before. Returns false if this process must not seal the log: another
        job of the request is not done, or another worker has this job. `expires` is Unix ms; settlement adds the
        tombstone.
        """
        seal = [*chain(*to_fields(end).items())]
        state = await self._run(LOOK, request_id)
        while isinstance(state, LogState) and not state.has_ended:
            if state.greatest == SEAL:
                raise LogRefused(_NO_END)
            if await self._obstacle(state.holder, delivery) is not None:
                return False
            state = await self._run(SEAL_UNOWNED, request_id, str(state.tail or ""), str(expires), *seal)
        return True

    async def finalize(self, request_id: str, tombstone: Tombstone, *, retention: int, remember: int) -> bool:
        """Check before the acknowledgement that the request has its end, and add a missing expiry and tombstone.

        The end is the seal, or the tombstone of a log that is gone. Returns false if the end is lost, as after a
        failover. No tombstone is added then: it would prevent all workers from writing the end again.

        Raises:
            TooFewReplicas: when too few replicas have the end.
        """
        words = str(retention), to_json(tombstone), str(remember)
        with _raises_log_refused():
            return bool(await self._replicas.run(FINALIZE, self._batcher, self._log_keys(request_id), words))

    async def read_entries(self, request_id: str) -> list[Entry]:
        """The whole log. An entry that cannot be read is returned as `Unknown`."""
        return [parse_leniently(*entry) for entry in await self._read(request_id)]

    def _writer(self, request_id: str, attempt: int) -> LogWriter:
        key, feed = self._keys.tokens(request_id), self._keys.feed(request_id)
        return LogWriter(request_id, key, feed, attempt, self._publisher)

    async def _read(self, request_id: str) -> list[RawEntry]:
        with _raises_log_refused():
            return await read_raw_entries(self._batcher.redis, self._keys.tokens(request_id))

    async def _run(self, script: Script, request_id: str, *words: str) -> LogState | list[Any]:
        """Run a script on a log. Returns the log's state if the script wrote nothing, else what it returns after 1."""
        with _raises_log_refused():
            has_written, *reply = await script.run(self._batcher, self._log_keys(request_id), words)
        return reply if has_written else LogState.read(*reply)

    def _log_keys(self, request_id: str) -> tuple[str, str]:
        return self._keys.tokens(request_id), self._keys.ended(request_id)

    async def _begin(
        self, request_id: str, delivery: Delivery, expires: int, digest: str, started_record: Sequence[str] = ()
    ) -> Acquired | LogState:
        """Write `1-0` into a log that has, and had, no attempt, unless the request has ended. Else return its state."""
        started = Started(
            id=EntryId(1, 0), queue=delivery.queue, job=delivery.id, worker=self.worker, owner=self._nonce,
            time=self._now(), digest=digest, delivery=delivery.count,
        )  # fmt: skip
        fields = to_fields(started)
        record = started_record if self._feed else ()
        message = encode([(str(started.id), fields)]).decode()
        publish = "SPUBLISH" if self._publisher.has_shards else "PUBLISH", self._keys.feed(request_id), message
        words = str(expires), *publish, str(2 * len(fields)), *chain(*fields.items()), *record
        reply = await self._run(BEGIN, request_id, *words)
        if isinstance(reply, LogState):
            return reply
        is_recorded, before = reply
        # `queued` alone comes before, unless another client wrote the log.
        history = [raw_entry(entry) for entry in before] if len(before) < 2 else await self._read(request_id)
        return acquired(self._writer(request_id, 1), history, is_start_recorded=bool(is_recorded))

    async def _claim(
        self, request_id: str, attempt: int, delivery: Delivery, reason: str, count: int = 0
    ) -> int | LogState:
        """Write `<attempt>-0`, which fences every earlier attempt. Returns the log's length; if refused, its state."""
        claimed = Claimed(
            id=EntryId(attempt, 0), queue=delivery.queue, job=delivery.id, worker=self.worker, owner=self._nonce,
            time=self._now(), reason=reason, delivery=count,
        )  # fmt: skip
        fields = to_fields(claimed)
        reply = await self._run(CLAIM, request_id, str(claimed.id), *chain(*fields.items()))
        if isinstance(reply, LogState):
            return reply
        self._publisher.publish(self._keys.feed(request_id), [(str(claimed.id), fields)])
        return int(reply[0])


@contextmanager
def _raises_log_refused() -> Iterator[None]:
    """Raises LogRefused in place of Redis's error for a key of another type."""
    try:
        yield
    except ResponseError as error:
        refusal = refusal_from(error)
        if refusal is None:
            raise
        raise refusal from error


def _is_reused(state: LogState, delivery: Delivery, matches_digest: Callable[[str], bool]) -> bool:
    """Whether a log, or the tombstone of an expired log, belongs to another job and another request."""
    if isinstance(state.started, Started):
        return job_of(state.started) != job_of(delivery) and not matches_digest(state.started.digest)
    return state.tombstone is not None and not matches_digest(state.tombstone.digest)


def _is_trimmed(state: LogState, log: LogWriter) -> bool:
    """Whether a log lacks entries only at its front. Only its current attempt is checked."""
    first = state.first.id if state.first else None
    return first is not None and first.attempt == log.attempt and state.length == log.accepted.n - first.n + 1

"""Ownership of logs: a process acquires a request's log, continues it under a later attempt, seals and finalizes it.

Every decision is based on the log itself, under a WATCH if two keys must agree. Each method may therefore be repeated
after a lost reply: it finds the entries that were written and continues from them. Each raises LogRefused if the log's
key holds another type.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from redis.exceptions import ResponseError, WatchError

from ..contract.entries import TAKEOVER, Claimed, Entry, Started, Terminal, parse, parse_leniently, to_fields, to_json
from ..contract.ids import QUEUED, SEAL, EntryId
from ..contract.keys import Keys
from ..contract.records import Tombstone
from ..redisio.transactions import Transaction, Transactions
from .acquisition import (
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
from .job_queue import Delivery, JobQueue
from .log_commands import (
    command,
    entry_at,
    expire,
    expire_at,
    first_of,
    greatest_id,
    has_ended,
    id_of,
    is_id_taken,
    is_trimmed,
    read_last,
    watch_end,
    xadd,
)
from .log_pages import RawEntry, read_raw_entries
from .log_writer import LogDiverged, LogFenced, LogOver, LogRefused, LogWriter, loss_from_tail, refusal_from
from .replicas import Replicas

_NO_END = "its end was deleted, and Redis takes no other"


class LogOwnership:
    """Acquires, continues, seals and finalizes the logs of requests for this process.

    `nonce` distinguishes the process from every other one, including an earlier one of the same worker name. `replicas`
    must have the end of a log before its job is acknowledged. `now` returns Redis's time in Unix ms.
    """

    def __init__(
        self, transactions: Transactions, keys: Keys, jobs: JobQueue, publisher: AnyPublisher, *, worker: str,
        nonce: str, now: Callable[[], int], replicas: Replicas | None = None,
    ) -> None:  # fmt: skip
        self._transactions = transactions
        self._keys = keys
        self._jobs = jobs
        self._publisher = publisher
        self._worker = worker
        self._nonce = nonce
        self._now = now
        self._replicas = replicas or Replicas()

    async def acquire(
        self, request_id: str, delivery: Delivery, expires: int, digest: str = "",
        matches_digest: Callable[[str], bool] = lambda _: True,
    ) -> AcquireResult:  # fmt: skip
        """Acquire the log of a delivered job, or find out why this process must not own it.

        `expires` (Unix ms) is when a log that is never sealed expires. `digest` is the request's.
        `matches_digest` decides whether a stored digest belongs to the same request: that digest may be empty, or from
        an earlier version.

        Raises:
            LogExhausted: when no attempt can follow.
        """
        key, ended = self._keys.tokens(request_id), self._keys.ended(request_id)
        while True:
            try:
                async with self._transaction(key) as transaction:
                    last, is_over = await watch_end(transaction, key, ended)
                    tail = id_of(last)
                    if tail == SEAL or is_over:
                        is_reused = await self._is_reused(transaction, request_id, delivery, matches_digest)
                        return IdReused() if is_reused else AlreadyEnded()
                    is_started = (tail is None or tail.attempt == 0) and await self._start(
                        transaction, request_id, delivery, expires, digest
                    )
            except WatchError:
                continue
            # The connection is returned before another is requested. Callers that each hold a connection and wait for a
            # second one would wait forever.
            if is_started:
                log = self._writer(request_id, 1)
                if last is None:
                    return acquired(log, [])
                # If the last entry was `queued`, it was the only one.
                return acquired(log, [last] if tail == QUEUED else await self._read(key))
            if (result := await self._take_over(request_id, delivery, matches_digest)) is not None:
                return result

    async def _take_over(
        self, request_id: str, delivery: Delivery, matches_digest: Callable[[str], bool]
    ) -> AcquireResult | None:
        """Acquire a log that was started, or find out why not; None if the log changed meanwhile.

        The decision uses the greatest id that the log ever had, because entries may have been deleted.
        """
        key = self._keys.tokens(request_id)
        async with self._transaction(key) as transaction:
            greatest = await greatest_id(transaction, key)
            if greatest is None:
                return None
            if greatest == SEAL:
                if await entry_at(transaction, key, SEAL):
                    return None
                raise LogRefused(_NO_END)
            holder = await entry_at(transaction, key, EntryId(greatest.attempt, 0))
            is_same_job = isinstance(holder, Started | Claimed) and job_of(holder) == job_of(delivery)
            if not is_same_job and await self._is_reused(transaction, request_id, delivery, matches_digest):
                return IdReused()
        # This process has begun the attempt already if the reply was lost, or if the log could not be read afterwards.
        # After an earlier delivery to this process it begins another: entries of that run may still be on the way to
        # Redis.
        nothing_follows_the_claim = greatest.n == 0
        if nothing_follows_the_claim and was_written_by(holder, self._nonce, delivery, delivery.count):
            return acquired(self._writer(request_id, greatest.attempt), await self._read(key))
        if (obstacle := await self._obstacle(holder, delivery)) is not None:
            return obstacle
        attempt = attempt_number_after(greatest.attempt)
        if not await self._claim(request_id, attempt, delivery, TAKEOVER, delivery.count):
            return None
        return acquired(self._writer(request_id, attempt), await self._read(key), greatest)

    async def _is_reused(
        self, transaction: Transaction, request_id: str, delivery: Delivery, matches_digest: Callable[[str], bool]
    ) -> bool:
        """Whether a log, or the tombstone of an expired log, belongs to another job and another request."""
        first = await entry_at(transaction, self._keys.tokens(request_id), EntryId(1, 0))
        if isinstance(first, Started):
            return job_of(first) != job_of(delivery) and not matches_digest(first.digest)
        (tombstone,) = await transaction.query(command("GET", self._keys.ended(request_id)))
        return tombstone is not None and not matches_digest(Tombstone.read(tombstone).digest)

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
        the lost log sees that the new entries are new. An existing log is not changed.

        Raises:
            LogOver: when the request has ended: its log was deleted or has expired.
            LogFenced: when this process no longer has the job.
        """
        ended = self._keys.ended(log.request_id)
        while await self._jobs.is_held(delivery):
            async with self._transaction(log.key) as transaction:
                last, is_over = await watch_end(transaction, log.key, ended)
                if last is not None:
                    return
                if is_over:
                    raise LogOver("the request has ended")
                with suppress(WatchError):
                    await self._start(transaction, log.request_id, delivery, expires, digest)
                    return
        raise LogFenced("Redis does not hold the log as it was, and this worker no longer has the job")

    async def next_attempt(self, log: LogWriter, delivery: Delivery, reason: str) -> None:
        """Continue this process's log under its next attempt.

        Raises:
            LogExhausted: when no attempt can follow.
            LogLost: when this process no longer owns the log.
        """
        attempt = attempt_number_after(log.attempt)
        if not await self._claim(log.request_id, attempt, delivery, reason):
            async with self._transaction(log.key) as transaction:
                (reply,) = await transaction.query(read_last(log.key))
                first = await entry_at(transaction, log.key, EntryId(attempt, 0))
                greatest = await greatest_id(transaction, log.key)
            lost = loss_from_tail(id_of(first_of(reply)), attempt, EntryId(attempt, 0))
            if isinstance(lost, LogDiverged) and greatest is not None and greatest >= (attempt, 0):
                lost = LogRefused(_NO_END) if greatest == SEAL else LogFenced(f"attempt {attempt} had begun")
            if lost is not None:
                raise lost
            if not was_written_by(first, self._nonce, delivery, 0):
                raise LogFenced(f"attempt {attempt} has begun")
        async with self._transaction(log.key) as transaction:
            (length,) = await transaction.query(command("XLEN", log.key))
        log.begin_attempt(attempt, length - 1)

    async def seal(
        self, log: LogWriter, end: Terminal, tombstone: Tombstone, *, retention: int, remember: int
    ) -> Entry:
        """Write the terminal entry with expiry and tombstone in one step; returns the terminal entry of the log.

        The seal's id is greater than that of any attempt, so the seal needs a fence of its own: the log is watched
        while its last entry is compared with the last one of this owner. `retention` and `remember` are seconds.

        The number of entries is compared too. A log from which entries were deleted, or that was renamed away and back
        while another was begun in its place, must not be sealed as a complete answer. A log that was trimmed at its
        front is sealed: its followers have all of it, and the ids show later readers that entries are missing.

        Raises:
            LogLost: when this process no longer owns the log.
        """
        await log.wait_drained()
        ended = self._keys.ended(log.request_id)
        while True:
            async with self._transaction(log.key) as transaction:
                reply, length = await transaction.watch([log.key], read_last(log.key), command("XLEN", log.key))
                last = first_of(reply)
                if last and id_of(last) == SEAL:
                    return parse_leniently(*last)
                lost = loss_from_tail(id_of(last), log.attempt, log.accepted)
                if lost is not None:
                    raise lost
                if length != log.length and not await is_trimmed(transaction, log, length):
                    raise LogDiverged(f"Redis holds {length} entries of the log, and has acknowledged {log.length}")
                try:
                    await transaction.execute(
                        xadd(log.key, SEAL, to_fields(end), create=False),
                        expire(log.key, retention),
                        command("SET", ended, to_json(tombstone), "EX", str(remember)),
                    )
                except WatchError:
                    continue  # the log was cancelled or touched meanwhile, or only the reply was lost
                except ResponseError as error:
                    if not is_id_taken(error):
                        raise
                    raise LogRefused(_NO_END) from error
            return parse(str(SEAL), to_fields(end))

    async def seal_unowned(self, request_id: str, delivery: Delivery, end: Terminal, expires: int) -> bool:
        """Seal the log of a job that this process cannot run, with any contents.

        Returns true also if the request had ended before. Returns false if this process must not seal the log: another
        job of the request is not done, or another worker has this job. `expires` is Unix ms; settlement adds the
        tombstone.
        """
        key, ended = self._keys.tokens(request_id), self._keys.ended(request_id)
        while True:
            async with self._transaction(key) as transaction:
                last, is_over = await watch_end(transaction, key, ended)
                tail = id_of(last)
                if tail == SEAL or is_over:
                    return True
                holder = await entry_at(transaction, key, EntryId(tail.attempt, 0)) if tail else None
            if await self._obstacle(holder, delivery) is not None:
                return False
            async with self._transaction(key) as transaction:
                last, is_over = await watch_end(transaction, key, ended)
                if id_of(last) != tail or is_over:
                    continue
                try:
                    await transaction.execute(xadd(key, SEAL, to_fields(end), create=True), expire_at(key, expires))
                except WatchError:
                    continue
                except ResponseError as error:
                    if not is_id_taken(error):
                        raise
                    raise LogRefused(_NO_END) from error
            return True

    async def finalize(self, request_id: str, tombstone: Tombstone, *, retention: int, remember: int) -> bool:
        """Check before the acknowledgement that the request has its end, and add a missing expiry and tombstone.

        The end is the seal, or the tombstone of a log that is gone. Returns false if the end is lost, as after a
        failover. No tombstone is added then: it would prevent all workers from writing the end again.

        Raises:
            TooFewReplicas: when too few replicas have the end.
        """
        key, ended = self._keys.tokens(request_id), self._keys.ended(request_id)
        while True:
            async with self._transaction(key) as transaction:
                if not has_ended(await transaction.watch([key], read_last(key), command("EXISTS", ended))):
                    return False
                add_tombstone = command("SET", ended, to_json(tombstone), "EX", str(remember), "NX")
                try:
                    await transaction.execute(expire(key, retention), add_tombstone)
                except WatchError:
                    continue  # somebody else set the expiry meanwhile
            if not self._replicas.count:
                return True
            async with self._replicas.slot(), self._transaction(key) as transaction:
                return await self._replicas.have_end(transaction, key, ended, retention)

    async def read_entries(self, request_id: str) -> list[Entry]:
        """The whole log. An entry that cannot be read is returned as `Unknown`."""
        return [parse_leniently(*entry) for entry in await self._read(self._keys.tokens(request_id))]

    def _writer(self, request_id: str, attempt: int) -> LogWriter:
        key, feed = self._keys.tokens(request_id), self._keys.feed(request_id)
        return LogWriter(request_id, key, feed, attempt, self._publisher)

    async def _read(self, key: str) -> list[RawEntry]:
        with _raises_log_refused():
            return await read_raw_entries(self._transactions.redis, key)

    @asynccontextmanager
    async def _transaction(self, key: str) -> AsyncIterator[Transaction]:
        """A connection to the server of a log's key, for that log and its tombstone."""
        with _raises_log_refused():
            async with self._transactions.begin(key) as transaction:
                yield transaction

    async def _start(
        self, transaction: Transaction, request_id: str, delivery: Delivery, expires: int, digest: str
    ) -> bool:
        """Write `1-0` into a log that has no attempt. Returns false if it had one whose entries were deleted.

        Raises:
            WatchError: when the log or its tombstone was touched meanwhile.
        """
        started = Started(
            id=EntryId(1, 0), queue=delivery.queue, job=delivery.id, worker=self._worker, owner=self._nonce,
            time=self._now(), digest=digest, delivery=delivery.count,
        )  # fmt: skip
        key = self._keys.tokens(request_id)
        try:
            await transaction.execute(xadd(key, started.id, to_fields(started), create=True), expire_at(key, expires))
        except ResponseError as error:
            if not is_id_taken(error):
                raise
            return False
        self._publish(request_id, started)
        return True

    async def _claim(self, request_id: str, attempt: int, delivery: Delivery, reason: str, count: int = 0) -> bool:
        """Write `<attempt>-0`, which fences every earlier attempt. Returns false if Redis refused it."""
        claimed = Claimed(
            id=EntryId(attempt, 0), queue=delivery.queue, job=delivery.id, worker=self._worker, owner=self._nonce,
            time=self._now(), reason=reason, delivery=count,
        )  # fmt: skip
        key = self._keys.tokens(request_id)
        try:
            async with self._transaction(key) as transaction:
                (written,) = await transaction.query(xadd(key, claimed.id, to_fields(claimed), create=False))
        except ResponseError as error:
            if is_id_taken(error):
                return False
            raise
        if written is not None:
            self._publish(request_id, claimed)
        return written is not None

    def _publish(self, request_id: str, entry: Entry) -> None:
        self._publisher.publish(self._keys.feed(request_id), [(str(entry.id), to_fields(entry))])


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

"""How a process comes to own the log of a request, goes on under a later attempt, and seals it.

Every decision is read from the log itself, under a WATCH where two keys must agree, so each of these may be repeated
after a lost reply: what is already there is found and taken for what it is. Each raises LogRefused where a key of
another type stands in the log's place.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from redis.exceptions import ResponseError, WatchError

from ..contract.entries import (
    TAKEOVER,
    BadEntry,
    Claimed,
    Entry,
    Started,
    Terminal,
    parse,
    parse_leniently,
    to_fields,
    to_json,
)
from ..contract.history import fault_in
from ..contract.ids import BEFORE_ALL, QUEUED, SEAL, EntryId
from ..contract.keys import Keys
from ..contract.records import Tombstone
from ..redisio.transactions import Transaction, Transactions
from .acquisition import (
    Acquired,
    AlreadyEnded,
    DuplicateJob,
    IdReused,
    LeaseLost,
    Taken,
    attempt_after,
    job_of,
)
from .cluster_publisher import AnyPublisher
from .job_queue import Delivery, JobQueue
from .log_commands import (
    command,
    entry_at,
    expire,
    first_of,
    greatest_id,
    has_ended,
    id_of,
    is_taken,
    is_trimmed,
    last_of,
    look,
    pexpireat,
    xadd,
    xlen,
)
from .log_pages import RawEntry, read_all
from .log_writer import LogDiverged, LogFenced, LogOver, LogRefused, LogWriter, judge, refusal_of
from .replicas import Replicas

_NO_END = "its end was deleted, and Redis takes no other"


class LogOwnership:
    """What this process does with the logs of requests. `nonce` tells it from every other process, and life of one.

    `replicas` must have the end of a log before it is confirmed.
    """

    def __init__(
        self, lines: Transactions, keys: Keys, jobs: JobQueue, publisher: AnyPublisher, *, worker: str, nonce: str,
        now: Callable[[], int], replicas: int = 0,
    ) -> None:  # fmt: skip
        self._lines = lines
        self._keys = keys
        self._jobs = jobs
        self._publisher = publisher
        self._worker = worker
        self._nonce = nonce
        self._now = now
        self._replicas = Replicas(replicas)

    async def acquire(
        self, request_id: str, delivery: Delivery, expire_at: int, digest: str = "",
        is_same: Callable[[str], bool] = lambda _: True,
    ) -> Taken:  # fmt: skip
        """Come to own the log of a delivered job, or find why not.

        `expire_at` (Unix ms) is when a log that is never sealed expires; `digest` is the request's, and `is_same` tells
        whether another digest is: there may be none, and it may be of an earlier version's making.

        Raises:
            LogExhausted: when no attempt can follow.
        """
        key, ended = self._keys.tokens(request_id), self._keys.ended(request_id)
        while True:
            try:
                async with self._line(key) as line:
                    last, is_over = await look(line, key, ended)
                    tail = id_of(last)
                    if tail == SEAL or is_over:
                        return (
                            IdReused() if await self._is_reused(line, request_id, delivery, is_same) else AlreadyEnded()
                        )
                    if tail is None or tail.attempt == 0:
                        is_ours = await self._start(line, request_id, delivery, expire_at, digest)
                    else:
                        is_ours = False
            except WatchError:
                continue
            # The connection is given back before more is asked: callers that each hold one and wait for a second
            # would wait for ever.
            if is_ours:
                # What was seen under the WATCH is all there was before `1-0`, if nobody but a client wrote there.
                return await self._owned(request_id, 1, [last] if last and tail == QUEUED else None if last else [])
            if (taken := await self._take_over(request_id, delivery, is_same)) is not None:
                return taken

    async def _take_over(self, request_id: str, delivery: Delivery, is_same: Callable[[str], bool]) -> Taken | None:
        """Come to own a log that was begun, or find why not; nothing where it has changed meanwhile.

        It goes by the greatest id that the log ever had: the entries that had it may have been deleted.
        """
        key = self._keys.tokens(request_id)
        async with self._line(key) as line:
            greatest = await greatest_id(line, key)
            if greatest is None:
                return None
            if greatest == SEAL:
                if await entry_at(line, key, SEAL):
                    return None
                raise LogRefused(_NO_END)
            holder = await entry_at(line, key, EntryId(greatest.attempt, 0))
            is_ours = isinstance(holder, Started | Claimed) and job_of(holder) == job_of(delivery)
            if not is_ours and await self._is_reused(line, request_id, delivery, is_same):
                return IdReused()
        # Not where this process had the job before: what that run sent may still be on its way to Redis.
        if greatest.n == 0 and self._wrote(holder, delivery, delivery.count):
            return await self._owned(request_id, greatest.attempt)  # its reply was lost, or the reading failed
        if (refusal := await self._refusal(holder, delivery)) is not None:
            return refusal
        attempt = attempt_after(greatest.attempt)
        if not await self._claim(request_id, attempt, delivery, TAKEOVER, delivery.count):
            return None
        return await self._owned(request_id, attempt, greatest=greatest)

    async def seal_unowned(self, request_id: str, delivery: Delivery, end: Terminal, expire_at: int) -> bool:
        """Seal the log of a job with which this process cannot deal, knowing no more of it than its last id.

        True as well where the request has ended before. False where this is not ours to do: another job of the request
        is at work, or another worker has this one. `expire_at` is Unix ms; the rest is given to the log by whoever
        settles it.
        """
        key, ended = self._keys.tokens(request_id), self._keys.ended(request_id)
        while True:
            async with self._line(key) as line:
                last, is_over = await look(line, key, ended)
                tail = id_of(last)
                if tail == SEAL or is_over:
                    return True
                holder = await entry_at(line, key, EntryId(tail.attempt, 0)) if tail else None
            if await self._refusal(holder, delivery) is not None:
                return False
            async with self._line(key) as line:
                last, is_over = await look(line, key, ended)
                if id_of(last) != tail or is_over:
                    continue
                try:
                    await line.execute(xadd(key, SEAL, to_fields(end), create=True), pexpireat(key, expire_at))
                except WatchError:
                    continue
                except ResponseError as error:
                    if not is_taken(error):
                        raise
                    raise LogRefused(_NO_END) from error
            return True

    async def _is_reused(
        self, line: Transaction, request_id: str, delivery: Delivery, is_same: Callable[[str], bool]
    ) -> bool:
        """Whether a log, or the tombstone that is left of it, is of another job and another request."""
        began = await entry_at(line, self._keys.tokens(request_id), EntryId(1, 0))
        if isinstance(began, Started):
            return job_of(began) != job_of(delivery) and not is_same(began.digest)
        (stone,) = await line.query(command("GET", self._keys.ended(request_id)))
        return stone is not None and not is_same(Tombstone.read(stone).digest)

    async def _refusal(self, holder: Entry | None, delivery: Delivery) -> DuplicateJob | LeaseLost | None:
        """Why a log that was begun is not ours to take over, or nothing when it is."""
        named = job_of(holder) if isinstance(holder, Started | Claimed) and holder.job else None
        if named and named != job_of(delivery):
            # Another job of the same request began it: this one is a duplicate for as long as that one is to be done.
            return DuplicateJob() if await self._jobs.is_outstanding(*named) else None
        return None if await self._jobs.is_held(delivery) else LeaseLost()

    async def recreate(self, log: LogWriter, delivery: Delivery, expire_at: int, digest: str = "") -> None:
        """Make one's own log anew where it is gone though the request has not ended, as after a failover.

        It begins with `1-0`; its owner then goes on under a later attempt than it had, so that whoever has read the
        log that was lost sees what is new. Nothing is done to a log that is there.

        Raises:
            LogOver: when the request has ended: its log was deleted or has expired.
            LogFenced: when the job is not ours any more.
        """
        ended = self._keys.ended(log.request_id)
        while await self._jobs.is_held(delivery):
            async with self._line(log.key) as line:
                last, is_over = await look(line, log.key, ended)
                if last is not None:
                    return
                if is_over:
                    raise LogOver("the request has ended")
                with suppress(WatchError):
                    await self._start(line, log.request_id, delivery, expire_at, digest)
                    return
        raise LogFenced("Redis does not hold the log as it was, and the job is not with this worker any more")

    async def next_attempt(self, log: LogWriter, delivery: Delivery, reason: str) -> None:
        """Go on under the next attempt of one's own log.

        Raises:
            LogExhausted: when no attempt can follow.
            LogLost: when the log is no longer ours.
        """
        attempt = attempt_after(log.attempt)
        if not await self._claim(log.request_id, attempt, delivery, reason):
            async with self._line(log.key) as line:
                (reply,) = await line.query(last_of(log.key))
                first = await entry_at(line, log.key, EntryId(attempt, 0))
                greatest = await greatest_id(line, log.key)
            lost = judge(id_of(first_of(reply)), attempt, EntryId(attempt, 0))
            if isinstance(lost, LogDiverged) and greatest is not None and greatest >= (attempt, 0):
                lost = LogRefused(_NO_END) if greatest == SEAL else LogFenced(f"attempt {attempt} had begun")
            if lost is not None:
                raise lost
            if not self._wrote(first, delivery, 0):
                raise LogFenced(f"attempt {attempt} has begun")
        async with self._line(log.key) as line:
            (length,) = await line.query(xlen(log.key))
        log.begin_attempt(attempt, length - 1)

    async def seal(
        self, log: LogWriter, end: Terminal, tombstone: Tombstone, *, retention: int, remember: int
    ) -> Entry:
        """Write the terminal entry with expiry and tombstone, all at once; gives the one that stands.

        The seal's id is above every attempt's, so it has a fence of its own: the log is watched while its last entry
        is compared with what this owner has written. `retention` and `remember` are seconds.

        So is the number of its entries: a log from which somebody deleted some, or that was renamed away and back while
        another was begun in its place, is not sealed as a whole answer. One that was trimmed at its front is:
        its followers have all of it, and later readers see in the ids what is missing.

        Raises:
            LogLost: when the log is no longer ours.
        """
        await log.wait_drained()
        ended, stone = self._keys.ended(log.request_id), to_json(tombstone)
        while True:
            async with self._line(log.key) as line:
                reply, length = await line.watch([log.key], last_of(log.key), xlen(log.key))
                last = first_of(reply)
                if last and id_of(last) == SEAL:
                    return parse_leniently(*last)
                lost = judge(id_of(last), log.attempt, log.accepted)
                if lost is not None:
                    raise lost
                if length != log.length and not await is_trimmed(line, log, length):
                    raise LogDiverged(f"Redis holds {length} entries of the log, and has acknowledged {log.length}")
                try:
                    await line.execute(
                        xadd(log.key, SEAL, to_fields(end), create=False),
                        expire(log.key, retention),
                        command("SET", ended, stone, "EX", str(remember)),
                    )
                except WatchError:
                    continue  # cancelled meanwhile, or touched by somebody: look again
                except ResponseError as error:
                    if not is_taken(error):
                        raise
                    raise LogRefused(_NO_END) from error
            return parse(str(SEAL), to_fields(end))

    async def finalize(self, request_id: str, tombstone: Tombstone, *, retention: int, remember: int) -> bool:
        """Before the acknowledgement: is the seal still there? Gives expiry and tombstone where they are missing.

        A log that is gone has its tombstone left. False when the end is lost, as after a failover: a tombstone then
        would keep everybody from writing another.

        Raises:
            TooFewReplicas: when it is not yet on as many replicas as it must be.
        """
        key, ended = self._keys.tokens(request_id), self._keys.ended(request_id)
        while True:
            async with self._line(key) as line:
                if not has_ended(await line.watch([key], last_of(key), command("EXISTS", ended))):
                    return False
                try:
                    await line.execute(
                        expire(key, retention), command("SET", ended, to_json(tombstone), "EX", str(remember), "NX")
                    )
                except WatchError:
                    continue  # somebody else set the expiry: look again
            if not self._replicas.count:
                return True
            async with self._replicas.turn(), self._line(key) as line:
                return await self._replicas.have_end(line, key, ended, retention)

    async def read_entries(self, request_id: str) -> list[Entry]:
        """The whole log. Entries that cannot be read are in it as such of an unknown type."""
        return [parse_leniently(*entry) for entry in await self._raw(request_id)]

    async def _owned(
        self, request_id: str, attempt: int, known: list[RawEntry] | None = None, greatest: EntryId | None = None
    ) -> Acquired:
        """The log under an attempt of ours, with what was written before: it is read where it is not `known`.

        `greatest` is the greatest id that the log had before the attempt.
        """
        key = self._keys.tokens(request_id)
        log = LogWriter(request_id, key, self._keys.feed(request_id), attempt, self._publisher)
        raw = await self._raw(request_id) if known is None else known
        try:
            entries = [parse(*entry) for entry in raw]
        except BadEntry as error:
            log.entries_before = sum(EntryId.parse(entry_id).attempt < attempt for entry_id, _ in raw)
            return Acquired(log, [], f"the log cannot be read: {error}")
        history: list[Entry] = [entry for entry in entries if entry.id.attempt < attempt]
        log.entries_before = len(history)
        last = history[-1].id if history else BEFORE_ALL
        is_cut = greatest is not None and last < greatest
        return Acquired(log, history, fault=f"entries are missing after {last}" if is_cut else fault_in(history))

    async def _raw(self, request_id: str) -> list[RawEntry]:
        with _of_the_log():
            return await read_all(self._lines.redis, self._keys.tokens(request_id))

    @asynccontextmanager
    async def _line(self, key: str) -> AsyncIterator[Transaction]:
        """A connection to the server of a log's key, to ask about that log and its tombstone alone."""
        with _of_the_log():
            async with self._lines.begin(key) as line:
                yield line

    async def _start(self, line: Transaction, request_id: str, delivery: Delivery, expire_at: int, digest: str) -> bool:
        """Write `1-0` into a log that has no attempt. False where it had one, whose entries somebody has deleted.

        Raises:
            WatchError: when the log or its tombstone was touched meanwhile.
        """
        started = Started(
            id=EntryId(1, 0), queue=delivery.queue, job=delivery.id, worker=self._worker, owner=self._nonce,
            time=self._now(), digest=digest, delivery=delivery.count,
        )  # fmt: skip
        key = self._keys.tokens(request_id)
        try:
            await line.execute(xadd(key, started.id, to_fields(started), create=True), pexpireat(key, expire_at))
        except ResponseError as error:
            if not is_taken(error):
                raise
            return False
        self._announce(request_id, started)
        return True

    async def _claim(self, request_id: str, attempt: int, delivery: Delivery, reason: str, count: int = 0) -> bool:
        """Write `<attempt>-0`, which fences every earlier attempt. False when Redis refused: look again."""
        claimed = Claimed(
            id=EntryId(attempt, 0), queue=delivery.queue, job=delivery.id, worker=self._worker, owner=self._nonce,
            time=self._now(), reason=reason, delivery=count,
        )  # fmt: skip
        key = self._keys.tokens(request_id)
        try:
            async with self._line(key) as line:
                (written,) = await line.query(xadd(key, claimed.id, to_fields(claimed), create=False))
        except ResponseError as error:
            if is_taken(error):
                return False
            raise
        if written is not None:
            self._announce(request_id, claimed)
        return written is not None

    def _announce(self, request_id: str, entry: Entry) -> None:
        self._publisher.publish(self._keys.feed(request_id), [(str(entry.id), to_fields(entry))])

    def _wrote(self, entry: Entry | None, delivery: Delivery, count: int) -> bool:
        """Whether an entry is this process's own, for a job's delivery of this `count`: 0 where none led to it."""
        return (
            isinstance(entry, Started | Claimed)
            and (entry.owner, entry.delivery, *job_of(entry)) == (self._nonce, count, *job_of(delivery))
        )  # fmt: skip


@contextmanager
def _of_the_log() -> Iterator[None]:
    """Raises LogRefused where a key of another type stands in a log's place."""
    try:
        yield
    except ResponseError as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raise refusal from error

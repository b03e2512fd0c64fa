"""The asynchronous client, for other Python services: enqueue a chat job, follow it, get its answer, cancel it."""

import asyncio
import enum
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import ParamSpec, Self, TypeVar, Unpack

import msgspec

from ..broker.client_seals import cancel, may_be_overdue
from ..broker.log_pages import PageSize
from ..broker.queue_depth import is_served, waiting_in
from ..contract.answer import Answer
from ..contract.entries import AnyEntry, Entry, Idle, is_terminal, parse_leniently
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from ..contract.keys import DEFAULT_QUEUE, Keys
from ..contract.records import Lifecycle, Tombstone
from ..redisio.batching import CommandBatcher
from ..redisio.clients import command_client
from ..redisio.environment import url_from_environment
from ..redisio.urls import database_of
from .enqueuing import Enqueuer
from .errors import (
    MAPPED,
    InvalidArgument,
    MappedRetry,
    Misused,
    QueueFull,
    Refused,
    Unavailable,
    check_id,
    mapped,
    missing_log_error,
    parse_entry_id,
)
from .following.follower import Follower
from .following.followers import Followers
from .new_job import JobOptions, new_job
from .timings import Timings

_P = ParamSpec("_P")
_T = TypeVar("_T")


class State(enum.Enum):
    """The state of a request."""

    UNKNOWN = "unknown"
    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a request. Once it has ended, `outcome` is done, error or cancelled."""

    state: State
    outcome: str = ""


class Client:
    """An asynchronous client. Use it as a context manager, or call `aclose` at the end.

    A method may raise other errors of `worker.client.errors` than it lists. Each is a `ClientError`.

    Args:
        redis_url: the workers' Redis. Without it, REDIS_URL of the environment, or the content of the file that
            REDIS_URL_FILE names, or else redis://127.0.0.1:6379/0.
        prefix: the workers' prefix.
        patience: seconds without an answer of Redis until `Unavailable` is raised.
        queue_limit: how many jobs may wait in a queue; 0 for no limit. The limit is soft: concurrent callers may exceed
            it by their number, and on Redis 6.2 the number of waiting jobs is approximate.
    """

    def __init__(
        self, redis_url: str | None = None, *, prefix: str = "chat", patience: float = 30.0, queue_limit: int = 0
    ) -> None:
        try:
            url = redis_url or url_from_environment()
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop of the first call: the connections belong to it."""
        self._is_closed = False
        self._retry = MappedRetry(patience)
        self._queue_limit = queue_limit
        try:
            self._keys = Keys(prefix, database_of(url))
            self._redis = command_client(url)
            self._commands = CommandBatcher(self._redis)
            self._enqueuer = Enqueuer(self._redis, self._commands, self._keys)
            self._following = Followers.connect(url, self._keys, self._retry, Timings())
        except ValueError as error:
            raise InvalidArgument(f"the URL of Redis {error}") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection. Calls that still wait, and all later ones, raise `Unavailable`."""
        if self._is_closed:
            return
        self._check_usable()
        self._is_closed = True
        try:
            await self._following.aclose()
        finally:
            await self._close_commands()

    async def ping(self) -> None:
        """Send Redis one PING, without retries.

        Raises:
            Unavailable: when Redis does not answer.
            Refused: when Redis refuses, for example the password.
        """
        self._check_usable()
        try:
            await self._redis.ping()
        except MAPPED as error:
            raise mapped(error) from error
        finally:
            if self._is_closed:  # PING may have connected while the client was closed
                await self._close_commands()

    async def enqueue(self, request: Mapping[str, object], **options: Unpack[JobOptions]) -> str:
        """Add a chat job; returns its request id, with which it can be followed.

        The same request with the same id is added once, so a call whose reply was lost can be repeated.

        Raises:
            InvalidJob: when the request or an option is invalid.
            Conflict: when the id belongs to another request.
            QueueFull: when too many jobs wait. A request that was enqueued before is not refused for this reason.
            Unavailable: when Redis does not answer.
        """
        job, queue, timeout = new_job(request, **options)
        await self._check_room(queue, job.id)
        await self._call(self._enqueuer.add, job, queue, timeout)
        return job.id

    async def submit(self, request: Mapping[str, object], **options: Unpack[JobOptions]) -> "RequestHandle":
        """Add a chat job; returns a handle to follow and cancel it. Raises the errors of `enqueue`."""
        return RequestHandle(await self.enqueue(request, **options), self)

    async def follow(
        self, request_id: str, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> AsyncGenerator[AnyEntry]:
        """Yield every entry of the log up to the terminal one: from the start, or after an entry's id.

        A log that does not exist yet has `wait` seconds to appear: a job that was added without `queued` has no log
        until a worker starts it. With `idle`, an `Idle` is yielded after each `idle` seconds without an entry, for
        example for a heartbeat.

        Raises:
            UnknownRequest: when the id has neither a log nor a tombstone.
            Expired: when the request has ended and its log has expired.
            IncompleteLog: when entries, or the entry `after`, are missing and the log has ended. Before its end,
                entries after a hole are withheld: a worker that notices the hole writes `restarted`, or `resumed` from
                before the hole.
            Refused: when no worker took the job before its deadline, and this user may not write that end.
            Unavailable: when Redis does not answer.
        """
        if idle is not None and not idle > 0:
            raise InvalidArgument(f"idle is {idle:g}: it must be more than 0 seconds")
        follower = self._follower(request_id, after, wait)
        try:
            while not follower.is_over:
                if idle is None:
                    await follower.wait_ready()
                elif not await follower.wait_ready_within(idle):
                    yield Idle(id=follower.end)
                for entry in follower.drain():
                    yield entry
        finally:
            await follower.leave()

    async def open(
        self, request_id: str, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> AsyncGenerator[AnyEntry]:
        """Check that the log can be followed; returns the entries as `follow` does. Raises the errors of `follow`.

        The log must exist and, if it has ended, must have the entry `after`. A server can thus report an error before
        it begins a response.
        """
        self._check_usable()
        after_id = BEFORE_ALL if after is None else parse_entry_id(after)
        await self._following.logs.check(check_id(request_id), after_id, wait)
        return self.follow(request_id, after=after_id, idle=idle)

    async def pour(
        self,
        request_id: str,
        into: Callable[[AnyEntry], object],
        *,
        after: str | EntryId | None = None,
        wait: float = 0.0,
    ) -> None:
        """Call `into` with every entry that `follow` would yield, in the step in which the entry is received.

        This costs less if one process follows many requests, since no task wakes for each entry. `into` is called from
        the event loop, mostly outside this task and its context variables, and must not block the loop. An error that
        `into` raises ends this call and is raised from it. Also raises the errors of `follow`.
        """
        follower = self._follower(request_id, after, wait)
        try:
            await follower.pour(into)
        finally:
            await follower.leave()

    async def pages(
        self, request_id: str, *, after: str | EntryId | None = None, first: int = 16
    ) -> AsyncGenerator[Iterable[AnyEntry]]:
        """Yield the entries that the log has now, in pages, and end at its present end or at its terminal entry.

        Iterating over a page parses its entries. If entries are missing and the log has not ended, this ends before
        the hole. Raises the errors of `follow`, also while a page is iterated over.

        The first page has `first` entries at most, since their size is not known, and a caller may read many logs at a
        time. Later pages have about 256 KiB.
        """
        self._check_usable()
        place, is_first, size = BEFORE_ALL if after is None else parse_entry_id(after), True, PageSize(first)
        while place != SEAL:  # Redis refuses a range that begins after the greatest id
            page = await self._following.logs.read(check_id(request_id), place, size, is_first=is_first)
            if page is None:
                return
            yield page.entries
            if not page.is_full or page.is_at_hole:
                return
            place, is_first = page.last, False

    def expect(self, request_id: str) -> Callable[[], None]:
        """Prepare to follow a request that is about to be enqueued, so that its first entries arrive without delay.

        Returns a function that ends this. Call it once the request is followed.
        """
        self._check_usable()
        return self._following.expect(check_id(request_id))

    def is_subscribed(self, request_id: str) -> bool:
        """Return whether Redis has confirmed a subscription of this client to the feed of a request."""
        return self._following.is_subscribed(check_id(request_id))

    def _follower(self, request_id: str, after: str | EntryId | None, wait: float) -> Follower:
        self._check_usable()
        return self._following.follow(
            check_id(request_id), BEFORE_ALL if after is None else parse_entry_id(after), wait
        )

    async def generate(self, request: Mapping[str, object], **options: Unpack[JobOptions]) -> AsyncGenerator[AnyEntry]:
        """Submit a job and follow it. Raises the errors of `submit` and `follow`."""
        handle = await self.submit(request, **options)
        async with aclosing(handle.entries()) as entries:
            async for entry in entries:
                yield entry

    async def lifecycle(self, *, after: str | EntryId | None = None) -> AsyncGenerator[Lifecycle]:
        """Yield the starts and ends of all requests: every stored record, and then each new one.

        The iterator does not end. To continue later, pass the `line` of the last record as `after`; a time in Unix ms
        works too. Each record comes at least once. The oldest go once there are WORKER_LIFECYCLE_LENGTH later ones.

        Raises:
            Unavailable: when Redis does not answer.
        """
        self._check_usable()
        after_id = BEFORE_ALL if after is None else parse_entry_id(after)
        async with aclosing(self._following.logs.lifecycle(after_id)) as records:
            async for record in records:
                yield record

    async def result(self, request_id: str) -> Answer:
        """Wait for the end; returns the whole answer with any outcome. Raises the errors of `follow`."""
        answer = Answer()
        await self.pour(request_id, answer.add)
        return answer

    async def status(self, request_id: str) -> Status:
        """Return the state of a request.

        If its deadline passed some seconds ago and no worker has started it, this call ends the request.

        Raises:
            Unavailable: when Redis does not answer.
        """
        check_id(request_id)
        tail, tombstone = await self._call(self._read_state, request_id)
        if may_be_overdue(tail):
            with suppress(Refused):  # for a user with the right to read only, the request stays `queued`
                await self._following.logs.end_overdue(request_id)
            tail, tombstone = await self._call(self._read_state, request_id)
        if tail is None:
            return Status(State.EXPIRED, tombstone.outcome) if tombstone else Status(State.UNKNOWN)
        if is_terminal(tail):
            return Status(State.ENDED, Answer([tail]).outcome)
        return Status(State.RUNNING if tail.id.attempt else State.QUEUED)

    async def cancel(self, request_id: str, *, must_exist: bool = False) -> Status:
        """Cancel a request that waits or runs; returns its state before that. An ended request is not changed.

        An unknown id is cancelled too, because its job may still be added. With `must_exist` it is not. A public
        endpoint needs `must_exist`: otherwise users could fill Redis with the ends of requests that never existed.

        Raises:
            UnknownRequest: with `must_exist`, when the id has neither a log nor a tombstone.
            Unavailable: when Redis does not answer.
        """
        before = await self.status(request_id)
        if must_exist and before.state is State.UNKNOWN:
            raise missing_log_error(request_id, None)
        if before.state not in (State.ENDED, State.EXPIRED) and not await self._call(
            cancel, self._redis, self._keys, request_id
        ):
            return await self.status(request_id)
        return before

    async def is_served(self, queue: str = DEFAULT_QUEUE) -> bool:
        """Return whether a live worker serves a queue. Without a worker, the queue's jobs wait until one is started.

        Raises:
            Unavailable: when Redis does not answer.
        """
        return await self._call(is_served, self._redis, self._keys, queue)

    async def _call(self, operation: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call an operation until Redis answers or the client is closed. Raises the errors of `MappedRetry`."""

        async def call_unless_closed() -> _T:
            self._check_usable()
            return await operation(*args, **kwargs)

        try:
            return await self._retry(call_unless_closed)
        finally:
            if self._is_closed:  # the operation may have connected again while the client was closed
                await self._close_commands()

    async def _close_commands(self) -> None:
        await self._commands.aclose()
        await self._redis.aclose()

    def _check_usable(self) -> None:
        if self._is_closed:
            raise Unavailable("the client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise Misused("this Client belongs to another event loop: create one in each loop")

    async def _check_room(self, queue: str, request_id: str) -> None:
        if not self._queue_limit:
            return
        waiting = await self._call(waiting_in, self._redis, self._keys.jobs(queue))
        if waiting >= self._queue_limit and (await self.status(request_id)).state is State.UNKNOWN:
            raise QueueFull(queue, waiting, self._queue_limit)

    async def _read_state(self, request_id: str) -> tuple[Entry | None, Tombstone | None]:
        # Not in a MULTI, which Redis refuses when it has no memory. The tombstone is read first. It is written with the
        # seal, so a request without a tombstone has a log to read afterwards, unless the request is unknown.
        pipe = self._redis.pipeline(transaction=False)
        pipe.get(self._keys.ended(request_id))
        pipe.xrevrange(self._keys.tokens(request_id), count=1)
        tombstone, tail = await pipe.execute()
        if tail:
            return parse_leniently(*tail[0]), None
        return None, msgspec.json.decode(tombstone, type=Tombstone) if tombstone is not None else None


@dataclass(frozen=True, slots=True)
class RequestHandle:
    """A handle to a request, from `Client.submit`. Its only state is the id, which is enough for another process."""

    id: str
    _client: Client = field(repr=False)

    def entries(
        self, *, after: str | EntryId | None = None, wait: float = 0.0, idle: float | None = None
    ) -> AsyncGenerator[AnyEntry]:
        """See `Client.follow`."""
        return self._client.follow(self.id, after=after, wait=wait, idle=idle)

    async def result(self) -> Answer:
        """See `Client.result`."""
        return await self._client.result(self.id)

    async def cancel(self) -> Status:
        """See `Client.cancel`."""
        return await self._client.cancel(self.id)

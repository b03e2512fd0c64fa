"""One follower of a request: it drives a `FollowMachine`, reads the log, and wakes the task that waits for entries."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from ...broker.client_seals import may_be_overdue
from ...broker.log_pages import PageSize
from ...contract.entries import AnyEntry
from ...contract.ids import BEFORE_ALL, QUEUED, EntryId
from ..errors import Expired, IncompleteLog, Refused, UnknownRequest
from ..log_reader import LogReader
from .idle_clock import IdleClock
from .machine import FeedState, FollowMachine, FollowState, Page, Read

_LISTENING = FollowState.LISTENING
"""A constant, because looking up a member of an enum is slow in Python 3.11, and this one is used for every message."""


class FollowedRequest(Protocol):
    """What the followers of one request share: a subscription to its feed."""

    id: str
    followers: "dict[Follower, None]"
    feed: FeedState

    def subscribe(self) -> None:
        """Subscribe to the feed, unless that was done."""

    def leave(self, follower: "Follower") -> None:
        """Remove a follower. The last one ends the subscription."""


class Follower:
    """One follower of a request. Call `wait_ready` and `drain` in turn, or `pour`; and `leave` at the end.

    The log is read in the task that waits for entries. Messages of the feed wake this task, or are poured in the step
    in which they are received.
    """

    def __init__(self, logs: LogReader, request: FollowedRequest, after: EntryId, wait: float = 0.0) -> None:
        timings = logs.timings
        self.machine = FollowMachine(
            after,
            tick_weight=random.uniform(0.8, 1.2),  # noqa: S311 - jitter, no secret
            first_pause=timings.first_pause,
            longest_pause=timings.longest_pause,
        )
        self.drain: Callable[[], Iterable[AnyEntry]] = self.machine.drain
        """Returns the next entries. Iterating over them raises `Unreadable` at an entry that cannot be read.

        This is the machine's own method, which saves a call.
        """
        self.is_over = False
        """Whether the seal was drained, or is among the entries that are ready."""
        self._logs = logs
        self._request = request
        request.followers[self] = None
        self._wait = wait
        """Seconds that the log may take to appear."""
        self._page_size = PageSize()
        self._awaits_feed = False
        """Whether the log is polled because Redis refuses the subscription."""
        self._pour_into: Callable[[AnyEntry], object] | None = None
        """The function to which `on_message` passes entries directly, while `pour` waits."""
        self._error: BaseException | None = None
        """The error that this function raised; `pour` raises it."""
        self._new_future: Callable[[], asyncio.Future[None]] = asyncio.get_running_loop().create_future
        self._waiter: asyncio.Future[None] | None = None
        self._idle = IdleClock(self._wake)
        self._reading: asyncio.Task[None] | None = None
        """The task that reads the log for `wait_ready_within`. It may take longer than one wait."""

    @property
    def end(self) -> EntryId:
        """The id of the last entry that was drained, if no more entries are ready."""
        return self.machine.end

    @property
    def is_waiting(self) -> bool:
        """Whether a task waits for the feed."""
        return self._waiter is not None and not self._waiter.done()

    def wait_ready(self) -> Awaitable[None]:
        """Return an awaitable that ends when there may be entries to `drain`. It is cheap while the feed delivers them.

        Raises, when it is awaited:
            UnknownRequest: when the request has neither a log nor a tombstone.
            Expired: when the request has ended and its log has expired.
            IncompleteLog: when entries are missing that are not void, and the log has ended.
            Refused: when no worker took the job before its deadline, and this user may not write the end.
            Unavailable: when Redis does not answer, or the client is closed.
        """
        machine = self.machine
        if machine.ready or machine.state is not _LISTENING:
            return self._catch_up()
        self._waiter = waiter = self._new_future()
        return waiter

    async def wait_ready_within(self, seconds: float) -> bool:
        """Wait as `wait_ready` does. Returns false after each `seconds` without an entry.

        It may return true without entries to `drain`. One timer serves many waits.
        """
        machine, idle = self.machine, self._idle
        if machine.ready and self._reading is None:
            idle.restart(seconds)
            return True
        idle.start(seconds)
        if self._reading is None and machine.state is _LISTENING:
            idle.wake_at_end()
            await self.wait_ready()
        else:
            self._reading = self._reading or asyncio.ensure_future(self._catch_up())
            await asyncio.wait([self._reading], timeout=idle.seconds_left)
            if self._reading.done():
                done, self._reading = self._reading, None
                done.result()
        has_entries = bool(machine.ready or machine.page)
        is_idle = not has_entries and idle.is_over and not self.is_over
        if has_entries or is_idle:
            idle.restart(seconds)
        return not is_idle

    async def pour(self, into: Callable[[AnyEntry], object]) -> None:
        """Call `into` with every entry up to the seal. Entries of the feed are passed in the step of their message.

        Raises the errors of `wait_ready`, `drain` and `into`.
        """
        while not self.is_over:
            self._pour_into = into
            try:
                await self.wait_ready()
            finally:
                self._pour_into = None
            if self._error is not None:
                raise self._error
            for entry in self.drain():
                into(entry)

    async def leave(self) -> None:
        """Stop following."""
        self._request.leave(self)
        self._idle.stop()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def on_message(self, entries: Sequence[AnyEntry], size: int) -> None:
        """Handle entries of the feed, from a message of `size` bytes. Other followers may share them."""
        machine = self.machine
        machine.on_message(entries, size)
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        into = self._pour_into
        if into is None or machine.state is not _LISTENING:
            waiter.set_result(None)
            return
        # Other followers share this step, so an error of `into` is raised in the task that waits.
        try:
            for entry in machine.drain():
                into(entry)
                if waiter.cancelled():
                    break
        except BaseException as error:  # noqa: BLE001 - includes cancellation; a future cannot hold StopIteration
            self._error = error
            self._wake()

    def look_up(self) -> None:
        """Read the log soon, because the feed may have omitted entries."""
        self.machine.look_up()
        self._wake()

    def fall_back(self) -> None:
        """Poll the log, without the feed, until `return_to_feed` is called: Redis refuses the subscription."""
        self._awaits_feed = True
        self.machine.fall_back()
        self._wake()

    def return_to_feed(self) -> None:
        """Use the feed again after `fall_back`."""
        if self._awaits_feed:
            self._awaits_feed = False
            self.machine.return_to_feed()

    def on_tick(self) -> None:
        """Handle a tick, at which silence is counted."""
        machine = self.machine
        if machine.on_tick(waits=self.is_waiting, feed=self._request.feed):
            self._wake()
        elif self.is_waiting and machine.end == QUEUED and may_be_overdue(machine.queued):
            self.look_up()  # a reader of a job that nobody takes gets its end soon, and not after a long silence

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _catch_up(self) -> None:
        """Read the log if the machine requests it."""
        machine = self.machine
        if machine.ready or machine.page:
            return
        if machine.pause:
            await asyncio.sleep(machine.pause)
        read = machine.next_read()
        if read is None:
            return
        try:
            page = await self._read(read)
        except BaseException:
            machine.on_read_failed()
            raise
        machine.on_page(page)
        self.is_over = machine.state is FollowState.ENDED
        if machine.polls:
            if not self._awaits_feed:
                self._request.leave(self)
        elif machine.wants_feed and not self.is_over:
            self._request.subscribe()
        if may_be_overdue(machine.queued):
            await self._end_overdue()

    async def _end_overdue(self) -> None:
        """End a request whose deadline has passed before a worker took it."""
        try:
            if await self._logs.end_overdue(self._request.id):
                self.machine.look_up()
        except Refused:
            if not self.machine.page:
                raise
            self.machine.look_up()  # the entries that were read are drained first

    async def _read(self, read: Read) -> Page | None:
        request_id, logs = self._request.id, self._logs
        if read.waits:
            return await logs.poll(request_id, read.after, self._page_size)
        try:
            if self._wait and read.is_first:
                await logs.check(request_id, read.after, self._wait)
                self._wait = 0.0
            return await logs.read(
                request_id, read.after, self._page_size, must_exist=read.must_exist, is_first=read.is_first
            )
        except (UnknownRequest, Expired) as error:
            if not read.is_at_hole:
                raise
            is_cursor = read.is_first and read.after != BEFORE_ALL
            raise IncompleteLog(request_id, read.after, is_cursor=is_cursor) from error

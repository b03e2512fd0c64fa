"""One who follows a request: what was told and what was read become one sequence, each entry once and in order."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from ..broker.client_seals import may_be_overdue
from ..broker.log_pages import PageSize
from ..contract.entries import AnyEntry, Queued
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .errors import Expired, IncompleteLog, Refused, UnknownRequest
from .log_reader import FIRST_PAUSE, LONGEST_PAUSE, LogReader, Page

if TYPE_CHECKING:
    from .following import RequestFollowers

_FIRST_TICKS, _SILENT_TICKS = 1, 10
"""After so many in silence, give or take a fifth, the log is read; sooner where the feed has not told anything yet."""

_MISSES = 2
"""So often in a row may the log have what a silent feed has not told, until the feed is not relied on any more."""

_KEPT_BYTES = 32 * 1024
"""Of messages, for a follower that does not take them. Beyond this they are dropped, and read from the log in time."""


class Follower:
    """One who follows a request. The log is read in the task that asks for more; the rest leaves word, or pours."""

    def __init__(self, logs: LogReader, request: "RequestFollowers", last: EntryId, wait: float = 0.0) -> None:
        self._logs = logs
        self._request = request
        request.followers[self] = None
        self.is_over = False
        self._attempt, self._n = last
        """The end of what is ready."""
        self._wait = wait
        """Seconds that the log may take to appear."""
        self._has_read, self._page_size = False, PageSize()
        self._queued: Queued | None = None
        """Where there is nothing but that so far."""
        self._read_on: Iterable[AnyEntry] = ()
        """What was read from the log; it comes before what is ready."""
        self._ready: list[AnyEntry] = []
        """What was told: one attempt's, without a gap."""
        self._bytes = 0
        self._held: list[tuple[list[AnyEntry], int]] | None = None
        """What is told while the log is read."""
        self._is_behind = self._is_alone = False
        """Whether the log is to be read; and without the feed, where it always is."""
        self._must_be_alive = False
        self._is_at_hole, self._pause = False, FIRST_PAUSE
        """Whether what comes next is missing and may be called void yet; and seconds until the log is read again."""
        self._into: Callable[[AnyEntry], object] | None = None
        """What takes entries as they are told, while it waits for more."""
        self._error: BaseException | None = None
        """What that raised."""
        self._new_future: Callable[[], asyncio.Future[None]] = asyncio.get_running_loop().create_future
        self._waiter: asyncio.Future[None] | None = None
        self._place = last
        self._silent, self._silent_most = 0.0, float(_FIRST_TICKS)
        self._doubts = False
        self._misses, self._missed = 0, last
        """How often in a row a silent feed had left something out, and the end of what was read last."""
        self._idle_at = 0.0
        """When it will have been idle for as long as it asks to wait, by the event loop's clock."""
        self._alarm: asyncio.TimerHandle | None = None
        self._reading: asyncio.Task[None] | None = None
        """The reading of the log, which may outlast that."""
        self.look_up(alive=True)

    @property
    def end(self) -> EntryId:
        """The last entry that was taken, once all that is ready is."""
        return EntryId(self._attempt, self._n)

    def news(self) -> Awaitable[None]:
        """What to wait for before there can be something to `take`. It is made to cost little.

        Raises:
            UnknownRequest: when nothing is known of the request.
            Expired: when it has ended and its log is gone.
            IncompleteLog: when entries are missing, and the log has ended without calling them void.
            Refused: when nobody took the job before its deadline, and this user may not write the end.
            Unavailable: when Redis does not answer, or the client is closed.
        """
        if self._ready or self._is_behind:
            return self._catch_up()
        self._waiter = waiter = self._new_future()
        return waiter

    async def news_within(self, seconds: float) -> bool:
        """Wait as `news` does; false once nothing has come for so many seconds, and again after each so many more.

        It may be true with nothing to `take`. One timer serves many waits.
        """
        loop = asyncio.get_running_loop()
        if self._ready and self._reading is None:
            self._idle_at = loop.time() + seconds
            return True
        self._idle_at = self._idle_at or loop.time() + seconds
        if self._reading is None and not self._is_behind:
            if self._alarm is None:
                self._alarm = loop.call_at(self._idle_at, self._ring)
            await self.news()
        else:
            self._reading = self._reading or asyncio.ensure_future(self._catch_up())
            await asyncio.wait([self._reading], timeout=self._idle_at - loop.time())
            if self._reading.done():
                done, self._reading = self._reading, None
                done.result()
        has_news, now = bool(self._ready or self._read_on), loop.time()
        is_idle = not has_news and now >= self._idle_at and not self.is_over
        if has_news or is_idle:
            self._idle_at = now + seconds
        return not is_idle

    def _ring(self) -> None:
        self._alarm = None
        if self._waiter is None or self._waiter.done():
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._idle_at:
            self._waiter.set_result(None)
        else:  # something has come since
            self._alarm = loop.call_at(self._idle_at, self._ring)

    def take(self) -> Iterable[AnyEntry]:
        """The next entries, if there are any; `is_over` says that the seal is among them.

        Raises:
            Unreadable: while they are taken, when one cannot be read.
        """
        if self._read_on:
            entries, self._read_on = self._read_on, ()
            return entries
        ready, self._ready, self._bytes = self._ready, [], 0
        return ready

    async def pour(self, into: Callable[[AnyEntry], object]) -> None:
        """Hand over all there is to `take`, up to the seal: what is told, in the step in which it is told.

        Raises what `news` and `take` do, and what `into` does.
        """
        while not self.is_over:
            self._into = into
            try:
                await self.news()
            finally:
                self._into = None
            if self._error is not None:
                raise self._error
            for entry in self.take():
                into(entry)

    async def leave(self) -> None:
        """Follow no more."""
        self._request.leave(self)
        if self._alarm is not None:
            self._alarm.cancel()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def tell(self, entries: list[AnyEntry], size: int) -> None:
        """The feed says that the log has these, in a message of so many bytes. They may be shared with others."""
        if self._held is not None:
            self._held.append((entries, size))
        elif not self._is_behind:
            for entry in entries:
                attempt, n = entry.id
                if n == self._n + 1 and attempt == self._attempt:
                    self._n = n
                    self._ready.append(entry)
                elif (attempt, n) > (self._attempt, self._n):
                    self._is_behind = True
                    break
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            if self._into is None or self._is_behind:
                waiter.set_result(None)
            else:
                self._hand_over(self._into, waiter)
            return
        self._bytes += size
        if self._bytes > _KEPT_BYTES:
            self._drop()

    def _hand_over(self, into: Callable[[AnyEntry], object], waiter: "asyncio.Future[None]") -> None:
        """In the step of the connection, which others share: so nothing is raised here, but in the task that waits."""
        try:
            for entry in self.take():
                into(entry)
                if waiter.cancelled():
                    break
        except BaseException as error:  # noqa: BLE001 - a future takes no StopIteration, and a cancellation is one too
            self._error = error
            self._wake()

    def look_up(self, *, alive: bool = False) -> None:
        """Read the log before anything else that is told; if `alive`, it has to be there."""
        self._is_behind = True
        self._must_be_alive |= alive
        self._wake()

    def go_alone(self) -> None:
        """Read without the feed from now on."""
        self._is_alone = True
        self._request.leave(self)
        self.look_up()

    def tick(self) -> None:
        """Another `_TICK` is over. A follower that waits at the same place as before has heard nothing."""
        if self._waiter is None or self._waiter.done() or self._place != (self._attempt, self._n):
            self._place, self._silent = EntryId(self._attempt, self._n), 0.0
            self._silent_most = _SILENT_TICKS if self._request.has_told else _FIRST_TICKS
            return
        self._silent += random.uniform(0.8, 1.2)  # noqa: S311 - jitter, no secret
        if self._silent >= self._silent_most:
            self._silent_most += min(2 * self._silent_most, _SILENT_TICKS)
            self._doubts = self._request.is_settled
            self.look_up(alive=self._silent_most > _SILENT_TICKS)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _drop(self) -> None:
        """Keep nothing: it is in the log."""
        self._n -= len(self._ready)
        self._ready, self._bytes = [], 0
        self._is_behind = True
        if self._held is not None:
            self._held = []

    async def _catch_up(self) -> None:
        if self._ready:
            return
        if self._is_at_hole:
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if self._is_alone and self._has_read and not self._is_at_hole:
            where = EntryId(self._attempt, self._n)
            self._go_on(await self._logs.wait(self._request.id, where, self._page_size))
        else:
            await self._read()
        if may_be_overdue(self._queued):
            try:
                self._is_behind |= await self._logs.end_overdue(self._request.id)
            except Refused:
                if not self._read_on:
                    raise
                self._is_behind = True  # what was read is given first

    async def _read(self) -> None:
        """Read the log on from where this one is; what is told meanwhile comes after that."""
        where = EntryId(self._attempt, self._n)
        doubts, self._doubts = self._doubts, False
        alive, self._must_be_alive = self._must_be_alive or self._is_at_hole, False
        self._is_behind, self._held, self._bytes = False, [], 0
        try:
            page = await self._page(where, alive=alive)
        finally:
            held, self._held, self._bytes = self._held, None, 0
        self._go_on(page)
        if page is not None:
            if doubts:
                self._misses = self._misses + 1 if self._missed == where else 1
            self._missed = page.last
        if self._attempt == SEAL.attempt and not self.is_over:
            self.go_alone()  # the seal's id may be the next one, and what is told does not end the log
        elif page is not None and (page.is_full or page.is_at_hole):
            self._is_behind = True
        elif not self.is_over and not self._is_alone:
            self._request.subscribe()
        for entries, size in held:
            self.tell(entries, size)
        if self._misses >= _MISSES:
            self.go_alone()

    async def _page(self, where: EntryId, *, alive: bool) -> Page | None:
        request_id, first = self._request.id, not self._has_read
        try:
            if self._wait and first:
                await self._logs.check(request_id, where, self._wait)
                self._wait = 0.0
            page = await self._logs.read(request_id, where, self._page_size, alive=alive, first=first)
        except (UnknownRequest, Expired) as error:
            if not self._is_at_hole:
                raise
            raise IncompleteLog(request_id, where, is_cursor=first and where != BEFORE_ALL) from error
        self._has_read |= page is None or not page.is_at_hole or page.last != where
        return page

    def _go_on(self, page: Page | None) -> None:
        """All of it has been read from the log."""
        if page is not None:
            self._read_on = page.entries
            self._queued = page.queued
            self._attempt, self._n = page.last
            self.is_over = page.last == SEAL
        self._is_at_hole = page is not None and page.is_at_hole
        if self._is_at_hole:
            self._is_behind = True
        else:
            self._pause = FIRST_PAUSE

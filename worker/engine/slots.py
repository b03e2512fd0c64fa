"""The slots of a process: how many more jobs it may take, and from which queue."""

import asyncio

_LONGEST_WAIT_EVERY = 8
"""One of this many grants goes to the reader that has waited longest, so that less important queues do not starve."""

MOST_PER_READ = 16
"""The most jobs in one read. Each may hold megabytes, and one that kills the process fails all of them."""


class Slots:
    """Counts the free slots and grants them to the readers of queues. A lower rank is more important."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._lent = 0
        """Slots of readers that wait for jobs. A parked job may take such a slot."""
        self._grants = 0
        self._is_closed = False
        self._waiting: dict[float, asyncio.Future[int]] = {}
        self._borrowers: set[float] = set()
        """The ranks of those who wait and may get lent slots."""
        self.most_per_read = MOST_PER_READ
        """The most slots that are granted to one read."""
        self.freed = asyncio.Event()
        """Set when slots become free."""

    async def reserve(self, rank: float, *, may_borrow: bool = False) -> int:
        """Wait for free slots, or with `may_borrow` for lent ones.

        Returns how many are granted: at least one, or 0 after `close`.
        """
        if self._is_closed:
            return 0
        if self._free > 0 and not self._waiting:
            return self._grant()
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[rank] = waiter
        if may_borrow:
            self._borrowers.add(rank)
        return await waiter

    def reserve_now(self, most: int) -> int:
        """Reserve up to `most` slots without waiting, also lent ones. Returns how many are granted; may be 0."""
        count = 0 if self._is_closed else max(0, min(most, self.most_per_read, self._free + self._lent))
        self._free -= count
        return count

    def lend(self, count: int) -> None:
        """Lend reserved slots while a reader waits for jobs, which may not come."""
        self._lent += count
        for rank in sorted(self._borrowers):
            if granted := self.reserve_now(MOST_PER_READ):
                self._borrowers.discard(rank)
                self._answer(self._waiting.pop(rank), granted)

    def take_back(self, count: int) -> int:
        """Take lent slots back. Returns how many of them are still there; jobs beyond that exceed the slots."""
        self._lent -= count
        return max(0, count + min(0, self._free))

    def release(self, count: int) -> None:
        """Free slots, which are granted to waiting readers. A negative count takes slots, even if none is free."""
        if self._free + count > 0:
            self.freed.set()
        self.give_back(count)

    def give_back(self, count: int) -> None:
        """Return slots that were reserved in this step of the event loop and are not needed: `freed` is not set.

        Who waits for `freed` before another try would otherwise be woken by that try itself.
        """
        self._free += count
        while self._free > 0 and self._waiting:
            self._grants += 1
            rank = next(iter(self._waiting)) if self._grants % _LONGEST_WAIT_EVERY == 0 else min(self._waiting)
            self._borrowers.discard(rank)
            self._answer(self._waiting.pop(rank), self._grant())

    def adapt(self, *, too_slow: bool) -> None:
        """Grant half as many slots per read after a read that took too long, and twice as many after any other.

        Leases begin when a read is sent. If megabytes arrive slowly, the leases of many jobs would have expired before
        all of them have arrived.
        """
        most = self.most_per_read
        self.most_per_read = max(1, most // 2) if too_slow else min(MOST_PER_READ, 2 * most)

    def close(self) -> None:
        """Grant no more slots."""
        self._is_closed = True
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_result(0)
        self._waiting.clear()
        self._borrowers.clear()

    def _answer(self, waiter: "asyncio.Future[int]", granted: int) -> None:
        if waiter.done():  # it was cancelled
            self._free += granted
        else:
            waiter.set_result(granted)

    def _grant(self) -> int:
        # Half of the free slots: a reader that waits at an empty queue leaves slots to the others.
        count = min(self.most_per_read, max(1, self._free // 2))
        self._free -= count
        return count

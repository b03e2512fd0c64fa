"""The slots of a process: how many jobs it may still take, and which queue may take them."""

import asyncio

_OLDEST_EVERY = 8
"""One grant in so many goes to whoever has waited longest, lest the less important starve."""

_AT_ONCE = 16
"""The most jobs of one read: each may hold megabytes, and a process that dies of one takes the others along."""


class Slots:
    """Counts free slots and hands them to whoever takes jobs; a lower rank is more important."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._grants = 0
        self._at_once = _AT_ONCE
        self._closed = False
        self._waiting: dict[int, asyncio.Future[int]] = {}

    async def reserve(self, rank: int) -> int:
        """Wait for free slots and take some, at least one; 0 when no more jobs are to be taken."""
        if self._closed:
            return 0
        if self._free and not self._waiting:
            return self._grant()
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[rank] = waiter
        return await waiter

    def release(self, count: int) -> None:
        """Give slots back; a reader that waits gets them."""
        self._free += count
        while self._free and self._waiting:
            self._grants += 1
            rank = next(iter(self._waiting)) if self._grants % _OLDEST_EVERY == 0 else min(self._waiting)
            waiter = self._waiting.pop(rank)
            if not waiter.done():
                waiter.set_result(self._grant())

    def adapt(self, *, too_slow: bool) -> None:
        """Grant half as many at once after a read that took too long, and twice as many after one that did not.

        Leases count from the sending of a read: where megabytes come slowly, those of many jobs would have run out by
        the time that all are there.
        """
        self._at_once = max(1, self._at_once // 2) if too_slow else min(_AT_ONCE, 2 * self._at_once)

    def close(self) -> None:
        """Hand out no more."""
        self._closed = True
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_result(0)
        self._waiting.clear()

    def _grant(self) -> int:
        # Half of what is free: a reader that waits on an empty queue leaves slots to the others.
        count = min(self._at_once, max(1, self._free // 2))
        self._free -= count
        return count

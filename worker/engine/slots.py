"""The slots of a process: how many more jobs it may take, and from which queue."""

import asyncio

_LONGEST_WAIT_EVERY = 8
"""One of this many grants goes to the reader that has waited longest, so that less important queues do not starve."""

_MOST_PER_READ = 16
"""The most jobs in one read. Each may hold megabytes, and one that kills the process fails all of them."""


class Slots:
    """Counts the free slots and grants them to the readers of queues. A lower rank is more important."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._grants = 0
        self._most_per_read = _MOST_PER_READ
        self._is_closed = False
        self._waiting: dict[int, asyncio.Future[int]] = {}

    async def reserve(self, rank: int) -> int:
        """Wait for free slots. Returns how many are granted: at least one, or 0 after `close`."""
        if self._is_closed:
            return 0
        if self._free and not self._waiting:
            return self._grant()
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[rank] = waiter
        return await waiter

    def release(self, count: int) -> None:
        """Return slots, which are granted to waiting readers."""
        self._free += count
        while self._free and self._waiting:
            self._grants += 1
            rank = next(iter(self._waiting)) if self._grants % _LONGEST_WAIT_EVERY == 0 else min(self._waiting)
            waiter = self._waiting.pop(rank)
            if not waiter.done():
                waiter.set_result(self._grant())

    def adapt(self, *, too_slow: bool) -> None:
        """Grant half as many slots per read after a read that took too long, and twice as many after any other.

        Leases begin when a read is sent. If megabytes arrive slowly, the leases of many jobs would have expired before
        all of them have arrived.
        """
        most = self._most_per_read
        self._most_per_read = max(1, most // 2) if too_slow else min(_MOST_PER_READ, 2 * most)

    def close(self) -> None:
        """Grant no more slots."""
        self._is_closed = True
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_result(0)
        self._waiting.clear()

    def _grant(self) -> int:
        # Half of the free slots: a reader that waits at an empty queue leaves slots to the others.
        count = min(self._most_per_read, max(1, self._free // 2))
        self._free -= count
        return count

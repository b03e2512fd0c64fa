"""Waits until replicas of Redis have the end of a log, before its job is acknowledged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..redisio.errors import TooFewReplicas
from ..redisio.transactions import Transaction
from .log_commands import command, expire, has_ended, read_last

_MAX_WAITING = 8
"""How many connections may wait for replicas at once. The others stay free, as for the renewal of leases."""


class Replicas:
    """The number of replicas that must have the end of a log; a `count` of 0 disables the check.

    `wait` is how long one check waits, in seconds. A connection is occupied meanwhile. Afterwards the caller tries
    again.
    """

    def __init__(self, count: int = 0, wait: float = 1.0) -> None:
        self.count = count
        self._wait = wait
        self._slots = asyncio.Semaphore(_MAX_WAITING)

    async def have_end(self, transaction: Transaction, key: str, ended: str, retention: int) -> bool:
        """Wait until enough replicas have the end of a log. False if the log has no end. `retention` is seconds.

        WAIT counts the replicas that have the last write of its own connection, which is the EXPIRE. A replica that has
        the EXPIRE also has the seal, which was written earlier.

        Raises:
            TooFewReplicas: when too few replicas have the end in time.
        """
        if not has_ended(await transaction.query(read_last(key), command("EXISTS", ended))):
            return False
        wait_ms = str(int(self._wait * 1000))
        _, there = await transaction.query(expire(key, retention), command("WAIT", str(self.count), wait_ms))
        if there < self.count:
            raise TooFewReplicas(f"{there} of {self.count} replicas have the end of a log: its job is kept")
        return True

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """One of the few slots for waiting. The wait for a slot is limited too, so that a caller can be stopped.

        Raises:
            TooFewReplicas: when no slot becomes free in time.
        """
        try:
            async with asyncio.timeout(self._wait):
                await self._slots.acquire()
        except TimeoutError:
            raise TooFewReplicas("the ends of other logs wait for replicas: the job is kept") from None
        try:
            yield
        finally:
            self._slots.release()

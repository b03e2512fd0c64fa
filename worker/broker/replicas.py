"""Waiting until replicas of Redis have the end of a log, before its job is acknowledged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..redisio.errors import TooFewReplicas
from ..redisio.transactions import Transaction
from .log_commands import command, expire, has_ended, last_of

_WAIT_MS = 1000
"""How long replicas may take to have the end of a log, until it is asked for again; a connection waits meanwhile."""

_MAX_WAITING = 8
"""How many connections may wait for replicas at once: the renewals of leases need one of the rest."""


class Replicas:
    """How many of them must have the end of a log; 0 is none."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._may_wait = asyncio.Semaphore(_MAX_WAITING)

    async def have_end(self, line: Transaction, key: str, ended: str, retention: int) -> bool:
        """Wait until replicas have the end of a log; false when it is not there. `retention` is seconds.

        WAIT counts what its own connection has written, hence the EXPIRE: whoever has that has the seal, which was
        written before it.

        Raises:
            TooFewReplicas: when it is not yet on as many replicas as it must be.
        """
        if not has_ended(await line.query(last_of(key), command("EXISTS", ended))):
            return False
        _, there = await line.query(expire(key, retention), command("WAIT", str(self.count), str(_WAIT_MS)))
        if there < self.count:
            raise TooFewReplicas(f"{there} of {self.count} replicas have the end of a log: its job is kept")
        return True

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A turn that does not come soon is no turn: whoever is told to stop meanwhile must see it.

        Raises:
            TooFewReplicas: when it does not come.
        """
        try:
            async with asyncio.timeout(_WAIT_MS / 1000):
                await self._may_wait.acquire()
        except TimeoutError:
            raise TooFewReplicas("the ends of other logs wait for replicas: this one's job is kept") from None
        try:
            yield
        finally:
            self._may_wait.release()

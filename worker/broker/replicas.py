"""Waits until replicas of Redis have the end of a log, before its job is acknowledged."""

import asyncio
from collections.abc import Sequence
from typing import Any

from ..redisio.batching import CommandBatcher
from ..redisio.cluster import server_of
from ..redisio.errors import TooFewReplicas
from ..redisio.scripts import Script

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

    async def run(self, script: Script, batcher: CommandBatcher, keys: Sequence[str], arguments: Sequence[str]) -> Any:  # noqa: ANN401 - the script's own reply
        """Run a script, and wait until enough replicas have what it wrote and all that was there before.

        WAIT counts the replicas that have the last write of its own connection, so both go out in one write. The script
        goes out with its source: a pipeline could not send it after Redis has replied that it does not know it. A
        script that wrote nothing returns 0, and its replicas do not matter.

        Raises:
            TooFewReplicas: when too few replicas have it in time, or too many callers wait for that.
        """
        if not self.count:
            return await script.run(batcher, keys, arguments)
        try:
            async with asyncio.timeout(self._wait):  # so that a caller can be stopped
                await self._slots.acquire()
        except TimeoutError:
            raise TooFewReplicas("the ends of other logs wait for replicas: the job is kept") from None
        try:
            pipe = (await server_of(batcher.redis, keys[0])).pipeline(transaction=False)
            pipe.eval(script.source, len(keys), *keys, *arguments)
            pipe.execute_command("WAIT", self.count, int(self._wait * 1000))
            reply, there = await pipe.execute()
        finally:
            self._slots.release()
        if reply and there < self.count:
            raise TooFewReplicas(f"{there} of {self.count} replicas have the end of a log: its job is kept")
        return reply

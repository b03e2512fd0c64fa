"""Waiting for conditions."""

import asyncio
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis


async def eventually(condition: Callable[[], Awaitable[object]], within: float = 300.0, every: float = 0.01) -> None:
    """Wait until a condition holds, which is queried `every` so many seconds.

    The limit is only for a test that would otherwise hang: on a busy machine a process took 30 s to start.
    """
    async with asyncio.timeout(within):
        while not await condition():  # noqa: ASYNC110 - the condition is about another process
            await asyncio.sleep(every)


async def has_run_for(redis: Redis, seconds: int) -> None:
    """Wait until a Redis has run for so long: no worker counts as silent for longer than its Redis has run."""

    async def is_up() -> bool:
        return int(str((await redis.info("server"))["uptime_in_seconds"])) >= seconds

    await eventually(is_up)

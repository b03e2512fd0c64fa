"""Redis's clock, which all workers share, since the clock of a machine may be set at any time."""

import time

from redis.asyncio import Redis


class Clock:
    """Redis's time, computed from its difference to the monotonic clock. Only `sync` does I/O."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._offset = 0.0

    async def sync(self) -> None:
        """Read Redis's time.

        Raises:
            RedisError: when Redis does not answer.
        """
        seconds, micros = await self._redis.time()
        self._offset = seconds + micros / 1e6 - time.monotonic()

    def now(self) -> int:
        """Unix milliseconds."""
        return int((time.monotonic() + self._offset) * 1000)

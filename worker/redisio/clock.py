"""Redis's clock, which all workers share; a machine's own may be set at any time."""

import time

from redis.asyncio import Redis


class Clock:
    """Tells Redis's time without asking each time."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._ahead = 0.0

    async def sync(self) -> None:
        """Ask Redis for the time."""
        seconds, micros = await self._redis.time()
        self._ahead = seconds + micros / 1e6 - time.monotonic()

    def now(self) -> int:
        """Unix milliseconds."""
        return int((time.monotonic() + self._ahead) * 1000)

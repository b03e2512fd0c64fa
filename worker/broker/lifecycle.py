"""The lifecycle stream: a line when a request starts, and one when it is finished.

Lines are written beside all else: a job waits for its line only where a later step needs it. One master of a cluster
has the stream, and the logs and jobs of the others go on while it is away.
"""

import asyncio
from collections import deque
from itertools import chain, islice

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from ..contract.keys import Keys
from ..contract.records import Lifecycle
from ..redisio.batching import CommandBatcher
from ..redisio.clients import Backoff, Voice
from ..redisio.errors import is_transient
from ..redisio.pipelined import PipelinedConnection, pack
from ..telemetry.metrics import Metrics

_AT_ONCE = 100
"""Lines in one write."""


class LifecycleWriter:
    """Writes the lines of a process in the order in which they come, each at least once. `length` is in lines."""

    def __init__(
        self, redis: Redis, keys: Keys, metrics: Metrics, length: int,
        connection_type: type[PipelinedConnection] = PipelinedConnection,
    ) -> None:  # fmt: skip
        self._together = CommandBatcher(redis, connection_type)
        self._key = keys.lifecycle
        self._metrics = metrics
        self._add = ("XADD", self._key, "MAXLEN", "~", str(length), "*")
        self._refused = Voice("lifecycle_refused")
        self._waiting: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._is_closed = False

    def write(self, line: Lifecycle) -> "asyncio.Future[None]":
        """Add a line; what this gives is done once Redis has the line, and stays open while Redis is away.

        A line that Redis refuses is left out, and that is logged: it must not keep a job from its end.
        """
        words = (*self._add, *chain(*line.to_fields().items()))
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((pack(*[word.encode() for word in words]), written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        return written

    async def aclose(self) -> None:
        """Write no more."""
        self._is_closed = True
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])

    async def _write_all(self) -> None:
        backoff = Backoff("lifecycle_delayed")
        while self._waiting and not self._is_closed:
            batch = list(islice(self._waiting, _AT_ONCE))
            try:
                await self._together.execute(self._key, b"".join([packed for packed, _ in batch]), len(batch))
            except Exception as error:  # noqa: BLE001 - whatever it is, no job waits for ever
                is_away = isinstance(error, RedisError | OSError) and not isinstance(error, ResponseError)
                if is_away or is_transient(error):
                    await backoff.wait(error)  # some may be written by now: they come twice then
                    continue
                for _ in batch:
                    self._metrics.refused("lifecycle")
                self._refused.complain(error)
            else:
                backoff.reset()
                self._refused.relent()
            for _, written in batch:
                self._waiting.popleft()
                if not written.done():
                    written.set_result(None)

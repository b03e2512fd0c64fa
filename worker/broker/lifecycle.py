"""The lifecycle stream: one record when a request starts, and one when it is finished.

Records are written in the background: a job waits for its record only if a later step depends on it. In a cluster one
master holds the stream. While that master is down, the logs and jobs of the other masters continue.
"""

import asyncio
from collections import deque
from itertools import chain, islice

from redis.exceptions import RedisError, ResponseError

from ..contract.keys import Keys
from ..contract.records import Lifecycle
from ..redisio.batching import CommandBatcher
from ..redisio.errors import is_transient
from ..redisio.pipelined import pack
from ..redisio.retry import Backoff, failing
from ..telemetry.events import NO_TELEMETRY, RecordRefused, Recovered, Telemetry

_BATCH = 100
"""Records in one write."""

_REFUSED = "lifecycle_refused"


class LifecycleWriter:
    """Writes the records of a process in order, each at least once. `LifecycleTrimmer` removes old ones."""

    def __init__(self, batcher: CommandBatcher, keys: Keys, telemetry: Telemetry = NO_TELEMETRY) -> None:
        self._batcher = batcher
        self._key = keys.lifecycle
        self._telemetry = telemetry
        self._waiting: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._is_closed = False

    def words(self, record: Lifecycle) -> tuple[str, ...]:
        """The words of the XADD that writes a record."""
        return (self._key, "*", *chain(*record.to_fields().items()))

    def write(self, record: Lifecycle) -> "asyncio.Future[None]":
        """Add a record. The future is done once Redis has the record, and stays open while Redis is unavailable.

        A record that Redis refuses is dropped and reported, so that the job can end.
        """
        words = ("XADD", *self.words(record))
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((pack(*[word.encode() for word in words]), written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        return written

    async def aclose(self) -> None:
        """Stop writing. Records that are still waiting are lost."""
        self._is_closed = True
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])

    async def _write_all(self) -> None:
        backoff = Backoff("lifecycle_delayed", self._telemetry)
        while self._waiting and not self._is_closed:
            batch = list(islice(self._waiting, _BATCH))
            try:
                await self._batcher.execute(self._key, b"".join([packed for packed, _ in batch]), len(batch))
            except Exception as error:  # noqa: BLE001 - for any error: no job may wait forever
                is_unavailable = isinstance(error, RedisError | OSError) and not isinstance(error, ResponseError)
                if is_unavailable or is_transient(error):
                    await backoff.wait(error)
                    continue  # Redis may have some of the records, which are then written twice
                for _ in batch:
                    self._telemetry.emit(RecordRefused("lifecycle"))
                self._telemetry.emit(failing(_REFUSED, error))
            else:
                backoff.reset()
                self._telemetry.emit(Recovered(_REFUSED))
            for _, written in batch:
                self._waiting.popleft()
                if not written.done():
                    written.set_result(None)

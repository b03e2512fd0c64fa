"""The simulated vLLM's scheduler: how many answers it generates at once, which requests wait, and how busy it is."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

__all__ = ["Scheduler", "ServerClock"]


class ServerClock:
    """Real time. A test may give a server another clock, so that its answers take no account of a busy machine."""

    def now(self) -> float:
        """Seconds since a fixed moment."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Scheduler:
    """Generates at most `most` answers at once, None for any number. Further requests wait in order of arrival."""

    def __init__(self, clock: ServerClock, most: int | None) -> None:
        self.admitted = 0
        """Requests in the server: running, waiting, or about to be."""
        self.running = 0
        """Answers that are generated now."""
        self._most = most
        self._clock = clock
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        self._since = clock.now()
        self._busy = 0.0
        self._capacity = 0.0

    @property
    def waiting(self) -> int:
        """Requests that wait for others to end."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """The time that answers have been generated, summed over the answers."""
        self._measure()
        return self._busy

    @property
    def capacity_seconds(self) -> float:
        """The time that answers could have been generated, summed over the answers; 0 for any number at once."""
        self._measure()
        return self._capacity

    def resize(self, most: int | None) -> None:
        """Generate this many answers at once from now on. Those that run continue."""
        self._measure()
        self._most = most
        self._start_waiting()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request as one in the server, within the context."""
        self.admitted += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.admitted -= 1
            if not self.admitted:
                self._idle.set()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until the request's answer may be generated. It is generated within the context."""
        if self._waiting or not self._has_room():
            await self._wait()
        else:
            self._start()
        try:
            yield
        finally:
            self._end()

    async def wait_idle(self) -> None:
        """Wait until no request is in the server."""
        await self._idle.wait()

    def _has_room(self) -> bool:
        return self._most is None or self.running < self._most

    def _start(self) -> None:
        self._measure()
        self.running += 1

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif not turn.cancelled():  # the turn came as the client left
                self._end()
            raise

    def _end(self) -> None:
        self._measure()
        self.running -= 1
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self._waiting and self._has_room():
            turn = self._waiting.popleft()
            if not turn.done():  # else its client has left
                turn.set_result(None)
                self._start()

    def _measure(self) -> None:
        now = self._clock.now()
        passed, self._since = now - self._since, now
        self._busy += self.running * passed
        self._capacity += (self._most or 0) * passed

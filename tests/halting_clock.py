"""A clock of simulated servers whose answers halt in the middle, however late a busy machine lets a test see that."""

import asyncio
from weakref import WeakKeyDictionary

from worker.sandbox.simulator.scheduler import ServerClock


class HaltingClock(ServerClock):
    """Real time, but each answer halts after so many tokens, until the test lets the answers continue."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._changed = asyncio.Event()
        self._sleeps: WeakKeyDictionary[asyncio.Task[object], int] = WeakKeyDictionary()
        """How often each answer has slept: once before its first token, and once before each token."""

    def allow(self, tokens: int) -> None:
        """Let each answer continue up to so many tokens."""
        self._tokens = tokens
        self._changed.set()
        self._changed = asyncio.Event()

    def release(self) -> None:
        """Let all answers continue to their ends."""
        self.allow(2**31)

    async def sleep(self, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._sleeps[task] = self._sleeps.get(task, 0) + 1
        while self._sleeps[task] - 1 > self._tokens:
            await self._changed.wait()
        await super().sleep(seconds)

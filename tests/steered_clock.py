"""Time of simulated servers that a test steers: answers halt, or end, where the test needs it on any machine."""

import asyncio
from contextlib import suppress
from weakref import WeakKeyDictionary

from worker.sandbox.simulator.scheduler import ServerClock

_ALL = 2**31


class SteeredClock(ServerClock):
    """Real time, but each answer halts after so many tokens, until the test lets the answers continue."""

    def __init__(self, halt_after: int = _ALL) -> None:
        self._tokens = halt_after
        self._changed = asyncio.Event()
        self._hurries = asyncio.Event()
        self._sleeps: WeakKeyDictionary[asyncio.Task[object], int] = WeakKeyDictionary()
        """How often each answer has slept: once before its head, and once before each token."""

    def allow(self, tokens: int) -> None:
        """Let each answer continue up to so many tokens."""
        self._tokens = tokens
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """Halt all answers where they are. Servers accept requests and send no head."""
        self.allow(-1)

    def release(self) -> None:
        """Let all answers continue to their ends, at their rate."""
        self.allow(_ALL)

    def hurry(self) -> None:
        """Let servers send the rest of their answers, and all later ones, without pauses."""
        self._hurries.set()
        self.release()

    async def sleep(self, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._sleeps[task] = self._sleeps.get(task, 0) + 1
        while self._sleeps[task] - 1 > self._tokens:
            await self._changed.wait()
        if self._hurries.is_set() or not seconds:
            await asyncio.sleep(0)
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurries.wait(), seconds)

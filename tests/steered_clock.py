"""Time of simulated servers that a test steers, so that answers end when the test lets them end on any machine."""

import asyncio
from contextlib import suppress

from worker.sandbox.simulator.scheduler import ServerClock


class SteeredClock(ServerClock):
    """Real time, which a test may stop: servers then accept requests and stream nothing. Or it ends all pauses."""

    def __init__(self) -> None:
        self._runs = asyncio.Event()
        self._runs.set()
        self._hurries = asyncio.Event()

    def stop(self) -> None:
        self._runs.clear()

    def go_on(self) -> None:
        self._runs.set()

    def hurry(self) -> None:
        """Let servers send the rest of their answers, and all later ones, without pauses."""
        self._hurries.set()

    async def sleep(self, seconds: float) -> None:
        if self._hurries.is_set():
            await asyncio.sleep(0)
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurries.wait(), seconds)
        await self._runs.wait()

"""Does what operators ask of this worker: reads the control hash three times a lease, and at each hint.

Workers use the channel of these hints too, to say that they have handed jobs over.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..broker.consumers import HANDED_OVER
from ..broker.control import Control
from ..broker.hints import HintListener
from ..broker.worker_registry import WorkerRegistry
from ..contract.records import ControlEntry, WorkerRecord
from ..redisio.retry import Backoff
from ..telemetry.events import ControlHintsRefused, DrainRequested, Telemetry
from .queue_pauses import QueuePauses


class ControlWatch:
    """Keeps the pauses of this worker's queues up to date, and drains it when an operator asks for that.

    While Redis does not answer, or refuses to read the hash, what was read last holds.

    Args:
        control: the hash.
        registry: the records of workers. A drain of a worker without a record is removed.
        hints: the client for the subscription, and the channel.
        pauses: what is kept up to date.
        record: returns this worker's record.
        drain: called once when this worker is to drain.
        on_handed_over: called when another worker has handed jobs over. This hint may be lost, too.
        interval: the longest time between two reads, in seconds.
        telemetry: the receiver of events.
    """

    def __init__(  # noqa: PLR0913 - hints are about all of these
        self,
        control: Control,
        registry: WorkerRegistry,
        hints: tuple[Redis, str],
        pauses: QueuePauses,
        *,
        record: Callable[[], WorkerRecord],
        drain: Callable[[], None],
        on_handed_over: Callable[[], None],
        interval: float,
        telemetry: Telemetry,
    ) -> None:
        self._control = control
        self._registry = registry
        self._pauses = pauses
        self._record = record
        self._drain = drain
        self._on_handed_over = on_handed_over
        self._interval = interval
        self._telemetry = telemetry
        self._changed, self._is_stopping = asyncio.Event(), False
        self._is_drained = False
        """Whether this worker was asked to drain."""
        self._hints = HintListener(
            *hints,
            self._on_hint,
            self._changed.set,
            name="control_hints",
            refused=ControlHintsRefused,
            telemetry=telemetry,
        )

    def stop(self) -> None:
        """End `run`."""
        self._is_stopping = True
        self._changed.set()

    def _on_hint(self, hint: str) -> None:
        if hint == HANDED_OVER:
            self._on_handed_over()
        else:
            self._changed.set()

    async def run(self) -> None:
        """Read the hash regularly and at hints, until stopped."""
        backoff = Backoff("control_failed", self._telemetry)
        listening = asyncio.create_task(self._hints.run())
        try:
            while not self._is_stopping:
                self._changed.clear()
                try:
                    await self.read()
                    backoff.reset()
                except (RedisError, OSError) as error:
                    await backoff.wait(error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(self._interval, self._pauses.next_end)):
                        await self._changed.wait()
        finally:
            self._hints.stop()
            await listening

    async def read(self) -> None:
        """Read the hash once, and do what it says.

        Raises:
            RedisError: when Redis does not answer, or refuses to read the hash.
        """
        state = await self._control.read()
        self._pauses.replace(state.pauses)
        if state.drains:
            await self._heed_drains(state.drains)
        await self._control.remove_ended(state)

    async def _heed_drains(self, drains: Mapping[str, ControlEntry]) -> None:
        """Drain if this worker is among these. Drains of workers that are gone are removed."""
        own = self._record()
        if (drain := drains.get(own.name)) and not self._is_drained:
            if drain.since < own.started <= own.beat:  # it was for an earlier process of the same name
                await self._control.end_drain(own.name)
            else:
                self._is_drained = True
                self._telemetry.emit(DrainRequested(by=drain.by, why=drain.why))
                self._drain()
        if others := drains.keys() - {own.name}:
            for name in others - await self._registry.names():
                await self._control.end_drain(name)

    async def sign_off(self) -> None:
        """Remove the drain of this worker, which is leaving."""
        if self._is_drained:
            await self._control.end_drain(self._record().name)

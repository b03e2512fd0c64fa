"""Servers with room that a test sets, in place of a `ServerPool`."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from worker.vllm.servers.circuit import Caller
from worker.vllm.servers.room import Demand, Demands


class FakeServers:
    """Room by model, of servers that share no room. A model without an entry is listed by no server."""

    def __init__(self, **rooms: int) -> None:
        self.rooms = rooms
        self.generation = 0
        self.away: set[str] = set()
        self.demands = Demands()
        self.is_available = True
        self.servers: tuple[()] = ()
        self._changed = asyncio.Event()

    def set_room(self, model: str, room: int) -> None:
        """Change the room of a model, of which those who wait learn."""
        self.rooms[model] = room
        self._changed.set()
        self._changed = asyncio.Event()

    def room(self, model: str) -> int:
        if model not in self.rooms:
            return self.total_room()
        return max(0, self.rooms[model] - self.demands.by_model[model])

    def total_room(self) -> int:
        return sum(self.room(model) for model in self.rooms)

    def expect(self, model: str) -> Demand:
        return Demand(self.demands, model)

    def servers_for(self, model: str) -> Sequence[object]:
        return [model] if model in self.rooms else []

    def should_fall_back(self, model: str, others: Sequence[str], caller: Caller) -> bool:
        del caller
        return model in self.away and any(self.rooms.get(other) for other in others)

    async def wait_changed(self, within: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), within)

    async def wait_available(self, model: str) -> None:
        while not self.is_available and model == "":
            await self.wait_changed(0.1)

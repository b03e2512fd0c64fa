"""Admission: decides which jobs have a place at a vLLM server now, and keeps the places of jobs that start. No I/O."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..vllm.servers.circuit import Caller
from ..vllm.servers.room import Demand

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0

_MOST_MODELS = 1000
"""The most models of which a process remembers that their jobs had to wait: jobs may name any number of models."""


_T = TypeVar("_T")


class ServerRoom(Protocol):
    """The room at the servers, as `ServerPool` offers it."""

    generation: int

    def room(self, model: str) -> int: ...
    def total_room(self) -> int: ...
    def expect(self, model: str) -> Demand: ...
    def servers_for(self, model: str) -> Sequence[object]: ...
    def should_fall_back(self, model: str, others: Sequence[str], caller: Caller) -> bool: ...


@dataclass(slots=True)
class _ModelPause:
    """The jobs of a model wait until `until`, by the clock; the next pause has `seconds`."""

    until: float
    seconds: float


class Admission:
    """Admits jobs to the servers.

    A job was started and found no server, although there was room: the next jobs of its model then start after a pause,
    which grows until one of them ends. So a job does not go back and forth between its queue and a server that refuses.

    A server that lists a model has room for its jobs, or not. If no server lists the model, the lists are fetched by
    the job (`ServerPool.wait_available`). So one job of the model starts, and the others follow if it does not come
    back. If it comes back, the next one starts when a server has come or gone, or lists other models.
    """

    def __init__(self, servers: ServerRoom, clock: Callable[[], float] = time.monotonic) -> None:
        self._servers = servers
        self._clock = clock
        self._pauses: dict[str, _ModelPause] = {}
        self._served: dict[str, None] = {}
        """Models that no server lists, and of which a job has ended here."""
        self._tried_at: dict[str, int] = {}
        """Models that no server lists: the generation of the pool when a job of the model was last started."""

    def admit(self, models: Sequence[str]) -> Demand | None:
        """Keep a place for a job with this model and these fallbacks; None if there is no place."""
        model, *fallbacks = models
        if not self._servers.servers_for(model):
            return self._admit_unlisted(model)
        pause = self._pauses.get(model)
        if pause is not None and self._clock() < pause.until:
            return None
        if self._servers.room(model) > 0:
            return self._servers.expect(model)
        if fallbacks and self._servers.should_fall_back(model, fallbacks, Caller()):
            chosen = next((other for other in fallbacks if self._servers.room(other) > 0), None)
            return None if chosen is None else self._servers.expect(chosen)
        return None

    def admit_once(self, line: str) -> Demand | None:
        """Keep a place for one job of a line whose models are not known, once for each generation of the pool."""
        return self._admit_unlisted(line) if self._servers.total_room() > 0 else None

    @property
    def next_end_of_pause(self) -> float:
        """The seconds until the first pause of a model ends; infinite if there is none."""
        now = self._clock()
        return min((pause.until - now for pause in self._pauses.values() if pause.until > now), default=float("inf"))

    def on_parked(self, model: str) -> None:
        """Record that a job was started here and found no server."""
        self._served.pop(model, None)
        if self._servers.servers_for(model):  # any server may have the model, but all were full
            self._tried_at.pop(model, None)
        now = self._clock()
        pause = self._pauses.get(model)
        if pause is None:
            _limit(self._pauses)
            self._pauses[model] = _ModelPause(now + _FIRST_PAUSE, 2 * _FIRST_PAUSE)
        elif now >= pause.until:
            self._pauses[model] = _ModelPause(now + pause.seconds, min(2 * pause.seconds, _LONGEST_PAUSE))

    def on_ended(self, model: str) -> None:
        """Record that a job has ended here, so that others of its model may follow."""
        self._pauses.pop(model, None)
        if model in self._tried_at and model not in self._served:
            _limit(self._served)
            self._served[model] = None

    def _admit_unlisted(self, model: str) -> Demand | None:
        generation = self._servers.generation
        if self._servers.room(model) <= 0:
            return None
        if self._tried_at.get(model) == generation and model not in self._served:
            return None
        self._tried_at.pop(model, None)
        _limit(self._tried_at)
        self._tried_at[model] = generation
        return self._servers.expect(model)


def _limit(known: dict[str, _T]) -> None:
    """Make room for another model: forget the oldest."""
    while len(known) >= _MOST_MODELS:
        known.pop(next(iter(known)))

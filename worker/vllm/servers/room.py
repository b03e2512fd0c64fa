"""Room at the vLLM servers: the jobs that will soon need a place, and the jobs that wait for one."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import itemgetter

from .circuit import Caller, CircuitState
from .server import Server


class Demand:
    """A job that was started here and has no server yet. Until its end it counts against the room of its model."""

    __slots__ = ("_demands", "model")

    def __init__(self, demands: "Demands", model: str) -> None:
        self.model = model
        self._demands: Demands | None = demands
        demands.by_model[model] += 1

    def end(self) -> None:
        """End the demand: the job has reserved a server, or needs none. A second call has no effect."""
        demands, self._demands = self._demands, None
        if demands is not None:
            demands.by_model[self.model] -= 1
            if not demands.by_model[self.model]:
                del demands.by_model[self.model]
            demands.on_end()


class Demands:
    """All demands of a process, by model. `on_end` is called at the end of each."""

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self.by_model: Counter[str] = Counter()
        self.on_end = on_end

    def at(self, servers: Sequence[Server]) -> int:
        """How many jobs will soon need a place at one of these servers, as far as is known."""
        return sum(count for model, count in self.by_model.items() if any(server.serves(model) for server in servers))


class PlaceQueue:
    """The jobs that wait here for a place at a server, each for a short time; the first come is the first to be woken.

    Thousands of jobs may wait. A free place wakes one of them: if it woke all of them, the work would be quadratic.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, dict[asyncio.Future[None], Caller]] = {}
        """For each model, the waiting jobs in the order of their arrival."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def wait(self, model: str, caller: Caller, within: float) -> None:
        """Wait until a server may have a place for a job, for at most `within` seconds."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(model, {})[place] = caller
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await place
        finally:
            self._drop(model, place)

    def wake(self, server: Server, serves: Callable[[str], bool]) -> None:
        """Wake as many jobs as a server has room for, of the models for which `serves` is true."""
        room = server.room if self._waiting else 0
        for model in list(self._waiting) if room > 0 else ():
            if not serves(model):
                continue
            for place in self._first_of(model, server, room):
                room -= 1
                self._drop(model, place)
                if not place.done():
                    place.set_result(None)
            if room <= 0:
                return

    def wake_all(self) -> None:
        """Wake every job: a circuit or a list of models has changed.

        Jobs that have failed nowhere come first. If a server fails for some jobs only, these would otherwise take its
        room each time, and then its circuit opens again.
        """
        waiting, self._waiting = self._waiting, {}
        places = [(bool(caller.failed_at), place) for jobs in waiting.values() for place, caller in jobs.items()]
        for _, place in sorted(places, key=itemgetter(0)):
            if not place.done():
                place.set_result(None)

    def _first_of(self, model: str, server: Server, most: int) -> "list[asyncio.Future[None]]":
        """The first jobs of a model, at most `most`, that the server accepts."""
        first: list[asyncio.Future[None]] = []
        for place, caller in self._waiting[model].items():
            if server.circuit.admits(caller, last_resort=True) and server.has_room_for(caller):
                first.append(place)
                if len(first) >= most:
                    break
        return first

    def _drop(self, model: str, place: "asyncio.Future[None]") -> None:
        places = self._waiting.get(model)
        if places is not None:
            places.pop(place, None)
            if not places:
                del self._waiting[model]


def next_opening(servers: Iterable[Server], trial_pause: float, within: float) -> float:
    """Seconds until a pause at a server ends, which wakes nobody, at most `within`.

    The end of a trial's reservation wakes nobody either: a half-open server may have room after `trial_pause`.
    """
    for server in servers:
        within = min(within, server.limit.opens_in() or within)
        if server.circuit.state is CircuitState.HALF_OPEN:
            within = min(within, trial_pause)
    return within

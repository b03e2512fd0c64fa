"""Simulates workers that share an overloaded server, in virtual time, with the limit that real workers use.

    .venv/bin/python tests/vllm/overload_simulation.py

prints a table of figures in about a minute.
"""

import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from pathlib import Path
from statistics import fmean

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from worker.vllm.servers.limit import ConcurrencyLimit

Seconds = Callable[[random.Random], float]
"""Draws a duration."""

_NETWORK = 0.001
_REFUSAL = 0.003


class VirtualTime:
    """A clock that jumps from event to event."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = count()

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        heappush(self._events, (self.now + seconds, next(self._ids), call))

    def run(self, is_done: Callable[[], bool], until: float = inf) -> None:
        """Let time pass until a condition holds, no event is left, or a time has come."""
        while not is_done() and self._events and self._events[0][0] <= until:
            self.now, _, call = heappop(self._events)
            call()
        if until < inf and not is_done():
            self.now = until


@dataclass(slots=True)
class SimulatedRequest:
    """A request in flight. Without a worker, it is one of other clients."""

    worker: "SimulatedWorker | None"
    sent_at: float
    prefill: float
    duration: float
    """Seconds at the server, the prefill included."""


@dataclass
class SimulatedServer:
    """Runs `runs` requests at once, lets `queues` for each of them wait, and refuses the rest."""

    time: VirtualTime
    runs: int
    queues: float
    has_metrics: bool
    retry_after: float | None
    on_outsider_end: Callable[[], None]
    running: int = 0
    waiting: deque[SimulatedRequest] = field(default_factory=deque)
    _busy: float = 0.0
    _busy_at: float = 0.0

    def busy_seconds(self) -> float:
        """The sum over all requests of the seconds for which they have run so far."""
        self._busy += self.running * (self.time.now - self._busy_at)
        self._busy_at = self.time.now
        return self._busy

    def send(self, request: SimulatedRequest) -> None:
        if self.running < self.runs:
            self._start(request)
        elif len(self.waiting) < self.queues * self.runs:
            self.waiting.append(request)
        elif (worker := request.worker) is not None:
            self.time.after(_REFUSAL, worker.on_refused)

    def resize(self, runs: int) -> None:
        self.runs = runs
        self._fill()

    def _start(self, request: SimulatedRequest) -> None:
        self.busy_seconds()
        self.running += 1
        worker = request.worker
        if worker is not None:
            self.time.after(request.prefill, lambda: worker.on_first_event(request))
        self.time.after(request.duration, lambda: self._end(request))

    def _end(self, request: SimulatedRequest) -> None:
        self.busy_seconds()
        self.running -= 1
        self._fill()
        if request.worker is None:
            self.on_outsider_end()
        else:
            request.worker.on_end(request)

    def _fill(self) -> None:
        while self.waiting and self.running < self.runs:
            self._start(self.waiting.popleft())


class SimulatedWorker:
    """Takes jobs from the shared queue while its limit leaves room. It does not know of other workers."""

    def __init__(self, fleet: "Simulation", slots: int, start: float) -> None:
        self._fleet = fleet
        self._time = fleet.time
        self.limit = ConcurrencyLimit(fleet.time, most=slots, jitter=lambda: fleet.rng.uniform(0.75, 1.25))
        self.in_flight = self.requests = self.refusals = self.done = 0
        self.waits: list[float] = []
        """Seconds from each request to its first event."""
        self._is_present = False
        self._wakes_at = -inf
        self._time.after(start, self._begin)

    def _begin(self) -> None:
        self._is_present = True
        self._time.after(self._fleet.rng.uniform(0, 1), self._read_load)
        self.send()

    def send(self) -> None:
        """Send as many jobs as there is room for."""
        fleet, time = self._fleet, self._time
        if not self._is_present:
            return
        while fleet.queued and self.limit.room(self.in_flight) > 0:
            fleet.queued -= 1
            self.in_flight += 1
            self.requests += 1
            fleet.send_request(self)
        pause = self.limit.opens_in()
        if fleet.queued and pause is not None and self._wakes_at < time.now + pause:
            self._wakes_at = time.now + pause
            time.after(pause + 1e-6, self.send)

    def on_first_event(self, request: SimulatedRequest) -> None:
        waited = self._time.now - request.sent_at
        self.waits.append(waited)
        self.limit.on_first_event(waited, self.in_flight)
        self.send()

    def on_end(self, request: SimulatedRequest) -> None:
        self.in_flight -= 1
        self.done += 1
        self.limit.on_end(self._time.now - request.sent_at)
        self.send()

    def on_refused(self) -> None:
        self.refusals += 1
        self.limit.on_refused(self.in_flight, self._fleet.server.retry_after)
        self.in_flight -= 1
        self._fleet.add_jobs(1)

    def _read_load(self) -> None:
        server = self._fleet.server
        self._time.after(self._fleet.rng.uniform(1, 1.1), self._read_load)
        if server.has_metrics:
            self.limit.on_load(server.running, len(server.waiting), self.in_flight)
        self.send()


def steady(seconds: float) -> Seconds:
    return lambda _: seconds


def mixed(rng: random.Random) -> float:
    """Many short answers and some long ones; 2.5 s in the mean."""
    return 0.5 if rng.random() < 0.8 else 10.5


def quick_prefill(rng: random.Random) -> float:
    return rng.uniform(0.03, 0.07)


_STEADY = steady(2.5)


class Simulation:
    """A server, the workers that share it, and the queue of jobs that the workers share."""

    def __init__(
        self,
        *,
        runs: int,
        queues: float = inf,
        metrics: bool = True,
        retry_after: float | None = None,
        workers: int = 1,
        slots: int = 64,
        generation: Seconds = _STEADY,
        prefill: Seconds = quick_prefill,
        outsiders: int = 0,
        starts: Callable[[int], float] = lambda _: 0.0,
        seed: int = 1,
    ) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - a simulation
        self.time = VirtualTime()
        self.generation, self.prefill = generation, prefill
        self.server = SimulatedServer(self.time, runs, queues, metrics, retry_after, self._send_outsider)
        self.queued = 0
        self.workers = [SimulatedWorker(self, slots, starts(number)) for number in range(workers)]
        for _ in range(outsiders):
            self.time.after(self.rng.uniform(0, 0.1), self._send_outsider)

    def send_request(self, worker: SimulatedWorker | None) -> None:
        prefill = self.prefill(self.rng)
        request = SimulatedRequest(worker, self.time.now, prefill, prefill + self.generation(self.rng))
        self.time.after(_NETWORK, lambda: self.server.send(request))

    def _send_outsider(self) -> None:
        self.send_request(None)

    def add_jobs(self, jobs: int) -> None:
        self.queued += jobs
        for worker in self.rng.sample(self.workers, len(self.workers)):
            worker.send()

    def enqueue(self, jobs: int, over: float = 0.0) -> None:
        """Enqueue jobs, evenly over some seconds."""
        if not over:
            self.time.after(0, lambda: self.add_jobs(jobs))
            return
        for number in range(jobs):
            self.time.after(over * number / jobs, lambda: self.add_jobs(1))

    def run_for(self, seconds: float) -> None:
        self.time.run(lambda: False, self.time.now + seconds)

    def utilization(self, seconds: float) -> float:
        """Let time pass. Returns the part of the server's capacity that was used."""
        before = self.server.busy_seconds()
        self.run_for(seconds)
        return (self.server.busy_seconds() - before) / seconds / self.server.runs

    @property
    def done(self) -> int:
        return sum(worker.done for worker in self.workers)

    @property
    def refusals(self) -> int:
        return sum(worker.refusals for worker in self.workers)

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight for worker in self.workers)

    @property
    def limits(self) -> float:
        return sum(worker.limit.value for worker in self.workers)


def jain(shares: Sequence[int]) -> float:
    """Jain's index of fairness: 1 if all shares are equal, 1/n if one has all."""
    squares = len(shares) * sum(share**2 for share in shares)
    return sum(shares) ** 2 / squares if squares else 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What an overload has shown.

    Attributes:
        goodput: the part of the ideal throughput.
        first: requests for each of the first 60 jobs.
        later: requests for each job after the first third of the jobs.
        fairness: Jain's index of the jobs of each worker after the first third.
        wait: the mean wait for a first event, in times of generation.
    """

    goodput: float
    first: float
    later: float
    fairness: float
    wait: float


def overload(
    *, times: float, jobs: int, mean: float = 2.5, generation: Seconds | None = None, **options: object
) -> Figures:
    """Jobs that arrive `times` as fast as the server can answer them; from 20 times, all arrive at once."""
    fleet = Simulation(generation=generation or steady(mean), **options)  # type: ignore[arg-type]
    server = fleet.server
    ideal = jobs * (mean + 0.05) / server.runs
    fleet.enqueue(jobs, ideal / times if times < 20 else 0)
    fleet.time.run(lambda: fleet.done >= min(60, jobs))
    first = 1 + fleet.refusals / fleet.done
    fleet.time.run(lambda: fleet.done >= jobs // 3)
    third, refusals, shares = fleet.done, fleet.refusals, [worker.done for worker in fleet.workers]
    fleet.time.run(lambda: fleet.done + fleet.in_flight >= jobs and not fleet.queued)
    goodput = server.busy_seconds() / fleet.time.now / server.runs
    shares = [worker.done - before for worker, before in zip(fleet.workers, shares, strict=True)]
    later = 1 + (fleet.refusals - refusals) / max(1, fleet.done - third)
    if times < 2:  # the queue is often empty: measure until the last answer, which nobody can hasten
        fleet.time.run(lambda: fleet.done >= jobs)
        goodput = (ideal + (10.5 if generation is mixed else mean)) / fleet.time.now
    wait = fmean(wait for worker in fleet.workers for wait in worker.waits) / mean
    return Figures(goodput, first, later, jain(shares), wait)


SERVERS: dict[str, tuple[float, bool]] = {
    "refuses beyond 2x": (1, False),
    "refuses beyond 2x, /metrics": (1, True),
    "refuses beyond 1x": (0, False),
    "refuses beyond 1x, /metrics": (0, True),
    "lets wait, /metrics": (inf, True),
    "lets wait": (inf, False),
}
"""For each kind of server, how many requests may wait for each running one, and whether /metrics can be read."""

GENERATIONS: dict[str, tuple[float, Seconds]] = {
    "0.2 s": (0.2, steady(0.2)),
    "2.5 s": (2.5, steady(2.5)),
    "30 s": (30, steady(30)),
    "mixed": (2.5, mixed),
}


def main() -> None:
    heading = "server | runs | workers | generation | overload | goodput | requests/job: first 60 | later | Jain | wait"
    sys.stdout.write(f"{heading}\n")
    for kind, (queues, metrics) in SERVERS.items():
        for runs, workers in ((4, 1), (4, 4), (4, 16), (64, 1), (64, 4), (64, 16), (256, 4), (256, 16)):
            for length, (mean, generation) in GENERATIONS.items():
                for times in (1, 20):
                    jobs = runs * max({4: 240, 64: 40, 256: 30}[runs], int(60 / mean))
                    got = overload(
                        times=times, jobs=jobs, mean=mean, generation=generation,
                        runs=runs, queues=queues, metrics=metrics, workers=workers,
                    )  # fmt: skip
                    sys.stdout.write(
                        f"{kind:27} | {runs:3} | {workers:2} | {length} | {times:2} x | {got.goodput:.2f} | "
                        f"{got.first:.2f} | {got.later:.2f} | {got.fairness:.2f} | {got.wait:.2f}\n"
                    )
                    sys.stdout.flush()


if __name__ == "__main__":
    main()

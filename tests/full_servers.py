"""Simulated servers that more jobs are sent to than they can answer at once, and what came of the jobs."""

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import count
from typing import Unpack

from redis.asyncio import Redis

from worker import Answer, Client, JobOptions
from worker.contract.entries import Failed
from worker.sandbox.simulator.scheduler import ServerClock
from worker.sandbox.simulator.server import Scenario, Simulator

AT_ONCE = 4
"""How many answers a server generates at once, if a test does not change it."""
QUEUED = 8
"""Running and waiting requests beyond which a server refuses."""
ANSWER = Scenario(first_token=0.06, rate=50, tokens=6)
SECONDS = 0.2
"""About how long one answer takes, by the clock of the servers."""

_STEP = 0.005
_TRIPS = 3


class SharedClock(ServerClock):
    """Time that passes only as fast as this event loop and Redis keep up.

    A busy machine slows the workers of a test, and with this clock their servers too. So it does not look as if the
    workers left their servers idle.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._has_ended = False
        self._order = count()
        self._sleeping: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleeping, (self._now + seconds, next(self._order), waker))
        await waker

    def end(self) -> None:
        """Let `run` return."""
        self._has_ended = True

    async def run(self, redis: Redis) -> None:
        while not self._has_ended:
            await asyncio.sleep(_STEP)
            for _ in range(_TRIPS):
                await redis.ping()
            self._now += _STEP
            while self._sleeping and self._sleeping[0][0] <= self._now:
                _, _, waker = heapq.heappop(self._sleeping)
                if not waker.done():
                    waker.set_result(None)


@asynccontextmanager
async def shared_clock(redis: Redis) -> AsyncIterator[SharedClock]:
    clock = SharedClock()
    task = asyncio.create_task(clock.run(redis))
    yield clock
    clock.end()
    await task


def chat_request(content: str, model: str = "reciter") -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": content}]}


async def enqueue(
    client: Client, jobs: int, name: str = "job", *, model: str = "reciter", **options: Unpack[JobOptions]
) -> list[str]:
    """Add jobs to a queue in order, and return their request ids."""
    return [await client.enqueue(chat_request(f"{name} {number}", model), **options) for number in range(jobs)]


async def answers(client: Client, ids: Iterable[str]) -> list[Answer]:
    return await asyncio.gather(*map(client.result, ids))


def failures(answers: Iterable[Answer]) -> list[str]:
    """The error codes, or outcomes, of the jobs that were not done."""
    return [
        answer.end.code if isinstance(answer.end, Failed) else answer.outcome
        for answer in answers
        if answer.outcome != "done"
    ]


def busy_share(server: Simulator, at_once: int = AT_ONCE) -> float:
    """The part of its time that a server generated answers, from its first answer until its last one began.

    Until then a job waited for it all the time.
    """
    spans = [(record.scheduled, record.ended) for record in server.served if record.scheduled is not None]
    first, last = min(begin for begin, _ in spans), max(begin for begin, _ in spans)
    busy = sum(min(last, last if end is None else end) - begin for begin, end in spans)
    return busy / (at_once * (last - first))


def most_in_flight(server: Simulator) -> int:
    """The most requests that a server had at the same time, running or waiting. Refused ones do not count."""
    admitted = [served for served in server.served if served.scheduled is not None]
    at_arrivals = (
        sum(other.started <= served.started < (other.ended or float("inf")) for other in admitted)
        for served in admitted
    )
    return max(at_arrivals)

"""What an operator asks of the workers, and what becomes of it: pauses of queues, and drains of workers."""

import asyncio
import getpass
import os
import socket
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..broker.control import Control
from ..broker.worker_registry import WorkerRegistry
from ..contract.keys import GROUP, Keys
from ..contract.records import ControlEntry, WorkerRecord
from ..redisio.clock import Clock
from ..redisio.errors import is_permission_denied
from .fleet import is_silent
from .queues import read_queues, used_queues
from .units import printable

_POLL = 0.1
"""Seconds between two reads of the workers' records while a pause or a drain is awaited."""

_SLACK = 2.0
"""Seconds that a worker may need beside two beats: its last read of jobs, and the renewal of its record."""

_MOST_JOBS = 10_000
"""The most jobs of a worker that are followed while it drains."""

JobOfWorker: TypeAlias = tuple[str, str]
"""A queue, and the id of an entry there."""


def operator() -> str:
    """Who asks: `user@host`. A container's user may have a number and no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@dataclass(frozen=True, slots=True)
class PauseState:
    """A queue that was paused.

    `workers` are the names of the workers that serve it, without silent ones. `waiting` is the number of jobs that no
    worker has; None if the user may not read that. `known` are the queues in use if this is none of them, else empty.
    """

    pause: ControlEntry
    workers: tuple[str, ...]
    waiting: int | None
    known: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DrainState:
    """A worker that drains, at one moment.

    `running` are its jobs. When the worker `is_gone`, `handed_over` is how many of its jobs other workers have or get,
    and `ended` how many have ended there; both count from before the drain.
    """

    running: int
    is_gone: bool = False
    handed_over: int = 0
    ended: int = 0


class Steering:
    """Pauses queues and drains workers. `lease` is that of workers whose record has none, in seconds.

    Every method raises RedisError when Redis does not answer or refuses a command.
    """

    def __init__(self, redis: Redis, keys: Keys, *, lease: float) -> None:
        self._redis = redis
        self._keys = keys
        self._lease = lease
        self._clock = Clock(redis)
        self._control = Control(redis, keys, self._clock.now)
        self._registry = WorkerRegistry(redis, keys)

    async def pause(self, queue: str, *, why: str = "", seconds: float = 0) -> ControlEntry:
        """Let no worker take jobs of a queue, for some seconds or (0) until it is resumed."""
        await self._clock.sync()
        return await self._control.pause(queue, by=operator(), why=why, seconds=seconds)

    async def resume(self, queue: str) -> ControlEntry | None:
        """End the pause of a queue. Returns the pause that held; None if there was none."""
        await self._clock.sync()
        return await self._control.resume(queue)

    async def paused_queues(self) -> list[str]:
        """The queues that are paused now."""
        return sorted((await self._control.read()).pauses)

    async def drain(self, worker: str, *, why: str = "") -> ControlEntry:
        """Let a worker do as at SIGTERM."""
        await self._clock.sync()
        return await self._control.drain(worker, by=operator(), why=why)

    async def state_of(self, queue: str, pause: ControlEntry) -> PauseState:
        """What a pause means for the queue."""
        serving = await self._serving(queue)
        workers = tuple(sorted(name for name, record in serving.items() if not self.is_silent(record)))
        states, _ = await read_queues(self._redis, self._keys, [queue], None, {}, self._clock.now())
        waiting = states[0].waiting if states else None
        known = tuple[str, ...]()
        if not serving and not waiting:
            names = await self._used_queues()
            known = () if queue in names else tuple(sorted(names))
        return PauseState(pause, workers, waiting, known)

    async def _used_queues(self) -> set[str]:
        try:
            return await used_queues(self._redis, self._keys)
        except ResponseError as error:
            if not is_permission_denied(error):
                raise
            return set()

    async def wait_in_effect(self, queue: str) -> dict[str, WorkerRecord]:
        """Wait until no worker takes jobs of a paused queue any more, for two beats at most.

        Returns the workers that have not confirmed that by then, by name. Silent workers are not waited for.
        """
        until = None
        while True:
            unconfirmed = {n: it for n, it in (await self._serving(queue)).items() if queue not in it.paused_queues}
            awaited = [it.lease or self._lease for it in unconfirmed.values() if not self.is_silent(it)]
            if until is None:
                until = self._clock.now() + 1000 * (2 / 3 * max(awaited, default=0.0) + _SLACK)
            if not awaited or self._clock.now() >= until:
                return unconfirmed
            await asyncio.sleep(_POLL)

    async def workers(self) -> dict[str, WorkerRecord]:
        """The records of all workers, by name."""
        await self._clock.sync()
        return await self._registry.records()

    def is_silent(self, record: WorkerRecord) -> bool:
        """Whether a worker has not renewed its record for too long: it may be dead, or stand still."""
        return is_silent(record, self._clock.now() / 1000, self._lease)

    def silence_of(self, record: WorkerRecord) -> float:
        """For how many seconds a worker has not renewed its record."""
        return max(0.0, (self._clock.now() - record.beat) / 1000)

    async def _serving(self, queue: str) -> dict[str, WorkerRecord]:
        return {name: record for name, record in (await self._registry.records()).items() if queue in record.queues}

    async def watch_drain(
        self, worker: str, queues: Iterable[str], jobs: Iterable[JobOfWorker]
    ) -> AsyncGenerator[DrainState]:
        """Follow a worker until its record is gone. Yields its state whenever it has changed.

        `jobs` are those that ran there before the drain. A job that another worker ends within a tenth of a second of
        its hand-over counts as ended.
        """
        queues, running, last = tuple(queues), set(jobs), -1
        handed_over = ended = 0
        is_there = True
        while is_there:
            is_there = worker in await self._registry.names()
            present = await self.jobs_of(worker, queues) if is_there else set[JobOfWorker]()
            for job in running - present:
                if await self._is_pending(job):
                    handed_over += 1
                else:
                    ended += 1
            running = present
            if is_there and len(running) != last:
                last = len(running)
                yield DrainState(last)
            if is_there:
                await asyncio.sleep(_POLL)
        yield DrainState(0, is_gone=True, handed_over=handed_over, ended=ended)

    async def jobs_of(self, worker: str, queues: Iterable[str]) -> set[JobOfWorker]:
        """The jobs that a worker has."""
        found = set[JobOfWorker]()
        for queue in queues:
            try:
                pending = await self._redis.xpending_range(self._keys.jobs(queue), GROUP, "-", "+", _MOST_JOBS, worker)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                continue
            found |= {(queue, cast("bytes", entry["message_id"]).decode()) for entry in pending}
        return found

    async def _is_pending(self, job: JobOfWorker) -> bool:
        queue, entry = job
        return bool(await self._redis.xpending_range(self._keys.jobs(queue), GROUP, entry, entry, 1))


def find_worker(given: str, records: Mapping[str, WorkerRecord]) -> str:
    """The worker that a name, or the beginning of one, means. An empty text, as of an unset variable, means none.

    Raises:
        LookupError: when there is no such worker, or there are several. The message has the candidates.
    """
    found = [given] if given in records else sorted(name for name in records if given and name.startswith(given))
    if len(found) == 1:
        return found[0]
    if found:
        raise LookupError(
            f"{given!r} begins the names of {len(found)} workers: {_listed(found)}. Give more of the name"
        )
    if not records:
        raise LookupError(f"no worker is named {given!r}: no worker runs")
    raise LookupError(f"no worker is named {given!r}. The workers are: {_listed(sorted(records))}")


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more

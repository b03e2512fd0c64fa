"""Parked jobs: pending jobs that no worker has, since no vLLM server has room for them.

`consumers.py` describes the lines in which they wait, and how their idle times hold their deadlines.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from redis.asyncio import Redis

from ..contract.keys import Keys
from .claims import claim, list_pending
from .consumers import DEADLINE_IDLE, LEAST_PARKED, LONGEST_WAIT, WAITING, ConsumerState, consumers_of, is_line
from .job_queue import Delivery, give_up

_MOST_ROUNDS = 64
"""The most claims in a row that get no job. Other workers have got the listed jobs, or they were deleted."""

_BUCKETS = 64
_NO_TENANT = "-"

_BEGUN = "!"
"""The first character of the buckets of begun jobs. The number of their tries at servers follows."""


@dataclass(frozen=True, slots=True)
class ParkedLine:
    """The parked jobs of one model and one bucket of tenants. `model` is a name as `model_of_line` returns it."""

    queue: str
    consumer: str
    bucket: str
    model: str
    jobs: int

    @property
    def is_of_begun_jobs(self) -> bool:
        """Whether the answers of the jobs have begun, or the jobs have failed at servers."""
        return self.bucket.startswith(_BEGUN)

    @property
    def tries(self) -> int | None:
        """How many tries at servers the jobs have made; None if they were not begun."""
        tries = self.bucket.removeprefix(_BEGUN)
        return int(tries) if self.is_of_begun_jobs and tries.isdecimal() else None

    @property
    def has_tenant(self) -> bool:
        """Whether the jobs have a tenant, as far as the line shows."""
        return self.bucket != _NO_TENANT and not self.is_of_begun_jobs


@dataclass(frozen=True, slots=True)
class ParkedJob:
    """A job to park. `deadline` is Unix ms by Redis's clock."""

    delivery: Delivery
    tenant: str
    model: str
    deadline: int

    @property
    def bucket(self) -> str:
        """The bucket of the job's tenant or, if the job was begun, the bucket of begun jobs with as many tries."""
        tries = self.delivery.tries
        return bucket_of(self.tenant) if tries is None else f"{_BEGUN}{tries}"

    @property
    def line(self) -> str:
        """The pseudo-consumer in which the job waits."""
        return f"{WAITING}{self.bucket}:{model_of_line(self.model)}"


def model_of_line(model: str) -> str:
    """The name of a model in the names of lines: its own name, or a hash of a long or unusual name."""
    if re.fullmatch(r"(?!#)[!-~]{0,200}", model):
        return model
    return "#" + hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def bucket_of(tenant: str) -> str:
    """The bucket of a tenant: one of 64, which limits the number of lines. `-` if a job names no tenant."""
    return str(crc32(tenant.encode("utf-8", "surrogatepass")) % _BUCKETS) if tenant else _NO_TENANT


def lines_among(queue: str, consumers: Iterable[ConsumerState]) -> list[ParkedLine]:
    """The lines among the consumers of a queue."""
    return [_read_line(queue, consumer) for consumer in consumers if is_line(consumer.name)]


def _read_line(queue: str, consumer: ConsumerState) -> ParkedLine:
    bucket, _, model = consumer.name.removeprefix(WAITING).partition(":")
    return ParkedLine(queue, consumer.name, bucket, model, consumer.pending)


class ParkedJobs:
    """Parks jobs of one worker, and takes parked jobs.

    `consumer` is the worker's name, `lease` is in seconds, and `now` returns Redis's time in Unix ms.
    """

    def __init__(self, commands: Redis, keys: Keys, consumer: str, lease: float, now: Callable[[], int]) -> None:
        self._commands = commands
        self._keys = keys
        self._consumer = consumer
        self._lease_ms = int(lease * 1000)
        self._now = now

    async def lines(self, queue: str) -> list[ParkedLine]:
        """The lines of a queue that have jobs."""
        return lines_among(queue, await consumers_of(self._commands, self._keys.jobs(queue)))

    async def park(self, jobs: Sequence[ParkedJob]) -> list[bool | Exception]:
        """Give up jobs until some worker has room for them. The results are those of `give_up`."""
        now = self._now()
        idles = [DEADLINE_IDLE - max(-LONGEST_WAIT, min(job.deadline - now, LONGEST_WAIT)) for job in jobs]
        moves = [(job.delivery, job.line, idle) for job, idle in zip(jobs, idles, strict=True)]
        return await give_up(self._commands, self._keys, self._consumer, self._lease_ms, moves)

    async def take(self, line: ParkedLine, count: int) -> list[Delivery]:
        """Take up to `count` jobs of a line, the oldest first. Of several workers that try, each gets other jobs."""
        return await self._take(line, count, LEAST_PARKED)

    async def take_overdue(self, line: ParkedLine, count: int) -> list[Delivery]:
        """Take up to `count` jobs of a line whose deadline has passed."""
        return await self._take(line, count, DEADLINE_IDLE)

    async def _take(self, line: ParkedLine, count: int, idle: int) -> list[Delivery]:
        key = self._keys.jobs(line.queue)
        for _ in range(_MOST_ROUNDS):
            jobs = await list_pending(self._commands, key, line.consumer, idle=idle, count=count)
            claimed = await claim(self._commands, key, line.queue, self._consumer, jobs, idle=LEAST_PARKED)
            if claimed or not jobs:
                return [replace(delivery, tries=line.tries) for delivery, _ in claimed]
        return []

"""Jobs that no worker has, though they are pending: parked jobs, which wait for a vLLM server, and handed-over jobs.

A worker that cannot continue a job moves the job's entry in the group's pending list to a pseudo-consumer, from which
any worker takes the entry. Pseudo-consumers are `handed-over`, for jobs that should continue at once, and
`waiting:<bucket>:<model>`, a line of parked jobs for each model and each bucket of tenants.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast
from zlib import crc32

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.keys import GROUP, Keys
from .job_queue import Delivery

HANDED_OVER = "handed-over"
"""The pseudo-consumer of the jobs that workers have handed over."""

_WAITING = "waiting:"
_BUCKETS = 64
_NO_TENANT = "-"

_NEVER = 10**12
"""The idle time in ms (31 years) that a parked job has at its deadline. No job with an owner has been idle for long."""

_IS_PARKED = _NEVER // 2
"""The least idle time of a parked job in ms. So XCLAIM with this idle time takes a job that no worker has taken yet."""

_LONGEST_WAIT = _NEVER // 4


@dataclass(frozen=True, slots=True)
class ParkedLine:
    """The parked jobs of one model and one bucket of tenants. `model` is a name as `model_of_line` returns it."""

    queue: str
    consumer: str
    bucket: str
    model: str
    jobs: int


@dataclass(frozen=True, slots=True)
class ParkedJob:
    """A job to park. `age` is the seconds since its last renewal; `deadline` is Unix ms by Redis's clock."""

    delivery: Delivery
    age: float
    tenant: str
    model: str
    deadline: int


def model_of_line(model: str) -> str:
    """The name by which lines know a model: the model's own name, or a hash of a long or unusual one."""
    if re.fullmatch(r"(?!#)[!-~]{0,200}", model):
        return model
    return "#" + hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def bucket_of(tenant: str) -> str:
    """The bucket of a tenant: one of 64, so that the number of lines has a limit."""
    return str(crc32(tenant.encode("utf-8", "surrogatepass")) % _BUCKETS) if tenant else _NO_TENANT


def is_pseudo_consumer(name: str) -> bool:
    """Whether a consumer of the group stands for jobs that no worker has. Names of workers have no colon."""
    return name == HANDED_OVER or name.startswith(_WAITING)


class ParkedJobs:
    """Parks jobs of one worker, and takes parked jobs. `now` returns Redis's time in Unix ms; `lease` is in seconds."""

    def __init__(self, commands: Redis, keys: Keys, consumer: str, lease: float, now: Callable[[], int]) -> None:
        self._commands = commands
        self._keys = keys
        self._consumer = consumer
        self._lease_ms = int(lease * 1000)
        self._now = now

    async def lines(self, queue: str) -> list[ParkedLine]:
        """The lines of a queue that have jobs."""
        try:
            consumers = await self._commands.xinfo_consumers(self._keys.jobs(queue), GROUP)
        except ResponseError as error:
            if "NOGROUP" not in str(error) and "no such key" not in str(error):
                raise
            return []
        lines = []
        for consumer in consumers:
            name = cast("bytes", consumer["name"]).decode("ascii", "replace")
            if consumer["pending"] and name.startswith(_WAITING) and "\ufffd" not in name:
                bucket, _, model = name.removeprefix(_WAITING).partition(":")
                lines.append(ParkedLine(queue, name, bucket, model, consumer["pending"]))
        return lines

    async def park(self, jobs: Sequence[ParkedJob]) -> list[bool | Exception]:
        """Give up jobs that must wait for a vLLM server, without raising their delivery counts.

        Returns for each whether this worker still had the job, or the error with which Redis refused.
        """
        raise NotImplementedError

    async def take(self, line: ParkedLine, count: int) -> list[Delivery]:
        """Take up to `count` jobs of a line, the oldest first. Several workers may do so at once."""
        raise NotImplementedError

    async def take_overdue(self, line: ParkedLine, count: int) -> list[Delivery]:
        """Take up to `count` jobs of a line whose deadline has passed."""
        raise NotImplementedError

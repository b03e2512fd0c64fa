"""A delivered job while this process runs it, and what makes it stop before its end."""

import asyncio
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..broker.job_queue import Delivery
from ..broker.log_writer import LogWriter
from ..contract.job import InvalidJob, Job, digest
from ..redisio.clients import persist
from ..redisio.errors import is_permission_denied, is_transient

_T = TypeVar("_T")

UNREAD = InvalidJob("the job is not read yet")
"""In the place of a job that may kill whoever reads it: its log is claimed first, so that a death in it counts."""


class Stop(enum.Enum):
    """Why a running job must stop before its end."""

    LEASE_LOST = "lease_lost"
    HAND_OVER = "hand_over"


class Stopped(Exception):
    """The job stops here, unacknowledged: another worker goes on."""


@dataclass(frozen=True, slots=True)
class JobContext:
    """A delivered job with what follows from it.

    `began` is when this process took it, and `deadline` its own, in Unix ms by Redis's clock; the rest is seconds.
    `free` gives its slot to another job.
    """

    id: str
    delivery: Delivery
    job: Job | InvalidJob
    began: int
    deadline: int
    retention: int
    remember: int
    stop: "asyncio.Future[Stop]"
    free: Callable[[], None]


async def insist(operation: Callable[[], Awaitable[_T]], stop: "asyncio.Future[Stop]") -> _T:
    """Repeat what a running job asks of Redis, until Redis answers or the job is to stop.

    It also waits while Redis withholds a right: an operator may give it back, and it is not the job's fault.

    Raises:
        Exception: what the operation raised, when waiting does not help or there is no more time.
    """
    return await persist(operation, stop, lambda error: is_transient(error) or is_permission_denied(error))


async def drained(log: LogWriter, stop: "asyncio.Future[Stop]") -> None:
    """Wait until Redis has accepted everything of a log, which takes as long as it is full or away.

    Raises:
        LogLost: when it will not.
        Stopped: when the job is to stop before.
    """
    waiting = asyncio.ensure_future(log.wait_drained())
    events: set[asyncio.Future[Any]] = {waiting, stop}
    await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        raise Stopped
    waiting.result()


def digest_of(job: Job | InvalidJob) -> str:
    """The digest of what a job asks for; empty where that cannot be read."""
    return digest(job.request, job.fallbacks) if isinstance(job, Job) else ""

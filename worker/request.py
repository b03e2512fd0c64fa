"""A delivered job while this process runs it, and what makes it stop before its end."""

import asyncio
import enum
from dataclasses import dataclass
from typing import Any

from worker.broker.jobs import Delivery
from worker.broker.log import TokenLog
from worker.contract.job import InvalidJob, Job


class Stop(enum.Enum):
    """Why a running job must stop before its end."""

    LEASE_LOST = "lease_lost"
    HAND_OVER = "hand_over"


class Stopped(Exception):
    """The job stops here, unacknowledged: another worker goes on."""


@dataclass(frozen=True, slots=True)
class Request:
    """A delivered job with what follows from it. `deadline` is Unix ms by Redis's clock, the rest seconds."""

    id: str
    delivery: Delivery
    job: Job | InvalidJob
    deadline: int
    retention: int
    remember: int
    stop: "asyncio.Future[Stop]"


async def drained(log: TokenLog, stop: "asyncio.Future[Stop]") -> None:
    """Wait until Redis has accepted everything of a log, which takes as long as it is full or away.

    Raises:
        LogLost: when it will not.
        Stopped: when the job is to stop before.
    """
    waiting = asyncio.ensure_future(log.drained())
    events: set[asyncio.Future[Any]] = {waiting, stop}
    await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        waiting.cancel()
        raise Stopped
    waiting.result()

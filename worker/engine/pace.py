"""The waiting times of a worker process, and an interruptible sleep."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from ..redisio.clients import COMMAND_TIMEOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Waiting times of a worker that are not settings, in seconds."""

    command_timeout: float = COMMAND_TIMEOUT
    """The silence after which a command to Redis fails."""
    longest_block: float = 1.0
    """The longest wait of one read for a job. A worker that stops waits for its last reads to return."""
    scan_every: float = 0.5
    """The time between two searches for expired leases, and for jobs that were handed over if their hint is lost."""
    read_ahead_every: float = 0.1
    """The pause after a read of jobs for which no server has room."""
    overdue_every: float = 3.0
    """The time between two searches for parked jobs whose deadline has passed."""
    recheck_writes_after: float = 0.5
    """The time after which it is probed again whether Redis accepts writes."""
    first_retry: float = 0.25
    """The pause between the first and the second try of a request at vLLM; each further pause is twice as long."""
    longest_retry: float = 10.0
    longest_wait_here: float = 1.0
    """How long a job waits for a place at a server before it goes back to its queue."""
    last_steps: float = 10.0
    """The time from the end of the drain to the end of the process, even if Redis does not answer."""


async def sleep_unless_set(event: asyncio.Event, seconds: float) -> bool:
    """Sleep until the time has passed or the event is set. Returns whether the event is still unset."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return not event.is_set()

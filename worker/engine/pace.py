"""How long a worker process waits for what, and an interruptible sleep."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from ..redisio.clients import COMMAND_TIMEOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Waiting times of a worker that are no settings, in seconds."""

    command_timeout: float = COMMAND_TIMEOUT
    """Of silence, after which a command to Redis fails."""
    longest_block: float = 1.0
    """The longest wait of one read for a job. A worker that stops waits for its last reads to return."""
    scan_every: float = 0.5
    """Between two searches for expired leases: this is how soon another worker continues a job that was handed over."""
    recheck_writes_after: float = 0.5
    """Until a Redis that accepts no writes is tried again."""
    first_retry: float = 0.25
    """Between the first and the second try of a request at a vLLM server; each further pause is twice as long."""
    longest_retry: float = 10.0
    last_steps: float = 10.0
    """From the end of the drain to the end of the process, even where Redis does not answer."""


async def sleep_unless_set(event: asyncio.Event, seconds: float) -> bool:
    """Sleep until the time has passed or the event is set. Returns whether the event is still unset."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return not event.is_set()

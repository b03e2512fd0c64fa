"""Repeating what looks before it writes, until Redis answers or patience ends."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..redisio.clients import Backoff
from ..redisio.errors import is_transient
from .errors import MAPPED, mapped

_T = TypeVar("_T")


class Patience:
    """`seconds` without an answer of Redis until it is over: a failover takes some."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def retry(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        """Repeat an operation until Redis answers.

        Raises:
            Unavailable: when it does not in time.
            Refused: when it refuses for good.
            Unreadable: when what it has cannot be read.
        """
        backoff, since = Backoff(None), time.monotonic()
        while True:
            try:
                return await _cancellable(operation())
            except MAPPED as error:
                if not is_transient(error) or time.monotonic() - since > self._seconds:
                    raise mapped(error) from error
                await backoff.wait(error)


async def _cancellable(work: Awaitable[_T]) -> _T:
    """Await a command, and be cancelled if somebody asked for it meanwhile.

    redis-py 8.1 sends with `asyncio.wait_for`, which in Python 3.11 loses a cancellation that comes as the sending
    ends (cpython#86296): up to 10 in 100 on a busy stream. A follower would read on for as long as the stream goes.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await work
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError

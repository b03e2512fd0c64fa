"""The end of tasks."""

import asyncio
from collections.abc import Collection
from typing import Any


async def end_tasks(tasks: Collection["asyncio.Future[Any]"]) -> None:
    """Cancel tasks and wait for them. Their errors are ignored.

    In Python 3.11 `asyncio.wait_for`, with which redis-py sends, may lose a cancellation (cpython#86296). So each task
    is cancelled until it has ended.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=0.1)
        for task in ended:
            if not task.cancelled():
                task.exception()

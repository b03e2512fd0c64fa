"""One execution of a query for all callers that need its result at the same time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class SharedCall(Generic[_T]):
    """Calls `query`, unless it runs already, and returns its result or raises its error to every caller.

    A caller that is cancelled does not cancel the query of the others.
    """

    def __init__(self, query: Callable[[], Coroutine[Any, Any, _T]]) -> None:
        self._query = query
        self._task: asyncio.Task[_T] | None = None

    async def __call__(self) -> _T:
        """Wait for the result of the query.

        Raises:
            Exception: the error of the query.
        """
        task = self._task
        if task is None or task.done():
            task = self._task = asyncio.create_task(self._query())
            # If every caller is cancelled, nobody else retrieves the error, which asyncio would then report.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.wait([task])
        return task.result()

"""How often one request is sent to the servers of one model, and the pauses between the tries."""

import random

from ..vllm.errors import NoConnection, UpstreamError
from .pace import Pace


class Tries:
    """Counts the tries of one request and stops after `limit` tries in a row that made no progress."""

    __slots__ = ("_limit", "_next_pause", "_pace", "made")

    def __init__(self, limit: int, pace: Pace) -> None:
        self._limit = limit
        self._pace = pace
        self._next_pause = pace.first_retry
        self.made = 0

    def count(self) -> bool:
        """Count one more try. Returns whether it is the last."""
        self.made += 1
        return self.are_exhausted

    def uncount(self) -> None:
        """Do not count the latest try."""
        self.made -= 1

    def start_over(self) -> None:
        """The latest try added to the answer: it is the first of a new row."""
        self.made, self._next_pause = 1, self._pace.first_retry

    @property
    def are_exhausted(self) -> bool:
        """Whether no try is left."""
        return self.made >= self._limit

    def pause(self) -> float:
        """Seconds to wait before the next try. Each call doubles the pause, up to the longest."""
        pause, self._next_pause = self._next_pause, 2 * self._next_pause
        return min(pause, self._pace.longest_retry) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter


def never_reached(error: UpstreamError) -> bool:
    """Whether the server has seen nothing of the request: the connection or the worker's API key was refused."""
    return isinstance(error, NoConnection) or error.status == 401

"""How often a request is sent to the servers of one model, and the pauses between."""

import random

from ..vllm.errors import NoConnection, UpstreamError

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds; each is twice as long as the one before."""


class Tries:
    """The tries of one request, at most so many in a row without getting on."""

    __slots__ = ("_most", "_pause", "made")

    def __init__(self, most: int) -> None:
        self._most = most
        self._pause = FIRST_PAUSE
        self.made = 0

    def begin(self) -> bool:
        """One more; whether it is the last."""
        self.made += 1
        return self.are_over

    def take_back(self) -> None:
        """The last was none."""
        self.made -= 1

    def got_on(self) -> None:
        """The last brought more of the answer: they begin again with it."""
        self.made, self._pause = 1, FIRST_PAUSE

    @property
    def are_over(self) -> bool:
        """Whether there were as many as there may be."""
        return self.made >= self._most

    def pause(self) -> float:
        """Seconds to wait before the next."""
        pause, self._pause = self._pause, 2 * self._pause
        return min(pause, LONGEST_PAUSE) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter


def was_not_let_in(error: UpstreamError) -> bool:
    """Whether the server was not reached, or took no key of ours: it has seen nothing of the request."""
    return isinstance(error, NoConnection) or error.status == 401

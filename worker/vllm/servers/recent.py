"""A bounded cache of recent findings about models. No I/O.

The names of models come from jobs, so there may be any number of them, of any length.
"""

from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, TypeVar

_T = TypeVar("_T")
_CAPACITY = 1000


class Recent(Generic[_T]):
    """A cache of the newest 1,000 values by name, each for `seconds` of the clock. Each name takes 16 bytes."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._values: dict[bytes, tuple[float, _T]] = {}

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, name: str) -> _T | None:
        """The value of a name; None if there is none or it has expired."""
        if not self._values:  # so for most servers, and it is asked several times for each job
            return None
        until, value = self._values.get(_key(name), (0.0, None))
        return value if self._clock() < until else None

    def put(self, name: str, value: _T) -> None:
        """Store a value, whose time begins now."""
        self.drop(name)
        if len(self._values) >= _CAPACITY:
            del self._values[next(iter(self._values))]
        self._values[_key(name)] = (self._clock() + self._seconds, value)

    def drop(self, name: str) -> None:
        """Forget a name."""
        self._values.pop(_key(name), None)


def _key(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()

"""What was found out about models lately. Their names come from jobs: any number of any length."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, TypeVar

_T = TypeVar("_T")
_MOST = 1000


class Recent(Generic[_T]):
    """Values by name, the newest 1,000, each for so many seconds of the clock; names take 16 bytes each."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._values: dict[bytes, tuple[float, _T]] = {}

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, name: str) -> _T | None:
        """The value of a name; None when there is none any more."""
        until, value = self._values.get(_key(name), (0.0, None))
        return value if self._clock() < until else None

    def put(self, name: str, value: _T) -> None:
        """Remember a value from now on."""
        self.drop(name)
        if len(self._values) >= _MOST:
            del self._values[next(iter(self._values))]
        self._values[_key(name)] = (self._clock() + self._seconds, value)

    def drop(self, name: str) -> None:
        """Forget a name."""
        self._values.pop(_key(name), None)


def _key(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()

"""The bound on what large answers hold of the memory of a process, while they are read and written as a whole."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..contract.entries import AnyEntry, Delta, to_json
from .problems import unavailable

SMALL = 32 * 1024
"""Bytes. An answer counts once it is larger."""

_LARGE = 256 * 1024

_MOST = 64 * 1024 * 1024
_ENTRY = 400
"""Bytes that an entry takes beside its text."""

_PARSED = 4
"""How many bytes a byte of JSON takes once it is parsed."""


class HeldAnswers:
    """Makes large answers wait while others hold as many bytes as they may.

    The oldest of them never waits, so that they cannot all wait for each other.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._sizes: dict[HeldAnswer, int] = {}
        """Of those that count, the oldest first."""
        self._total = 0
        self._changed = asyncio.Event()

    @contextmanager
    def hold(self, patience: float | None = None) -> Iterator["HeldAnswer"]:
        """Hold an answer, which has no bytes yet, up to the end of the context. It waits `patience` seconds at most."""
        held = HeldAnswer(self, patience)
        try:
            yield held
        finally:
            self._total -= self._sizes.pop(held, 0)
            self._changed.set()
            self._changed = asyncio.Event()

    async def resize(self, held: "HeldAnswer", size: int) -> None:
        """Count the bytes of an answer, and wait until it may grow further."""
        self._total += size - self._sizes.get(held, 0)
        self._sizes[held] = size
        while self._total > self._most and next(iter(self._sizes)) is not held:
            await self._changed.wait()


class HeldAnswer:
    """One answer that is held. `size` is an estimate in bytes."""

    def __init__(self, answers: HeldAnswers, patience: float | None) -> None:
        self.size = 0
        self._answers = answers
        self._patience = patience
        self._counted = 0

    @property
    def is_large(self) -> bool:
        """Whether the answer is too large to be assembled in one step of the event loop."""
        return self.size > _LARGE

    async def add(self, entry: AnyEntry) -> None:
        """Count an entry, and wait until the answer may grow further.

        Raises:
            Problem: when it may not within the time that it may wait (503).
        """
        self.size += size_of(entry)
        if self.size - self._counted > SMALL:
            self._counted = self.size
            try:
                async with asyncio.timeout(self._patience):
                    await self._answers.resize(self, self.size)
            except TimeoutError:
                raise unavailable() from None


def size_of(entry: AnyEntry) -> int:
    """The bytes of memory that an entry takes, as an estimate."""
    if not isinstance(entry, Delta):
        return _ENTRY
    size = _ENTRY + sys.getsizeof(entry.content) + sys.getsizeof(entry.reasoning) + 8 * len(entry.token_ids)
    if entry.logprobs or entry.tool_calls or entry.extra:
        size += _PARSED * len(to_json((entry.logprobs, entry.tool_calls, entry.extra)))
    return size

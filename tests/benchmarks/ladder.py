"""The search for the highest rate that a bridge holds: which rate to try next, without any I/O."""

import enum
import math
from collections.abc import Generator
from dataclasses import dataclass

FINENESS = 1.08
_LEAST = 50.0


class Verdict(enum.Enum):
    """The result of one rate."""

    HELD = "held"
    LOST = "lost"
    """The bridge was too slow."""
    VOID = "void"
    """The load generator was too slow: the result does not show anything about the bridge."""


@dataclass(frozen=True, slots=True)
class Highest:
    """The highest rate that was held. With `at_least`, the load generator could not go further."""

    rate: float
    at_least: bool = False


def ladder(first: float, fineness: float = FINENESS) -> Generator[float, Verdict, Highest]:
    """Yields the rates to try, is sent a verdict on each, and returns the highest.

    It doubles until a rate is not held, and then halves the interval, in logarithms, until its ends are nearer to each
    other than `fineness`.
    """
    held, bound, is_void = 0.0, math.inf, False
    rate = first
    while True:
        verdict = yield rate
        if verdict is Verdict.HELD:
            held = rate
        else:
            bound, is_void = rate, verdict is Verdict.VOID
        if bound == math.inf:
            rate = held * 2
        elif not held:
            if bound < _LEAST:
                return Highest(0.0, is_void)
            rate = bound / 2
        elif bound / held <= fineness:
            return Highest(held, is_void)
        else:
            rate = math.sqrt(held * bound)

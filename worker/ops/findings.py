"""The results of checks, and how they name many things at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..contract.entries import Object

Level: TypeAlias = Literal["ok", "warning", "error"]

_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check of one subject. `fix` is how to fix it; empty if nothing needs to be fixed.

    An error means that a worker cannot work.
    """

    level: Level
    subject: str
    message: str
    fix: str = ""

    def as_dict(self) -> Object:
        """The finding as `--json` prints it, with the published field names."""
        return {"level": self.level, "subject": self.subject, "text": self.message, "mend": self.fix}


def listed(names: Sequence[str]) -> str:
    """Some names as text: the first three, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {more} more" if (more := len(names) - _NAMES_SHOWN) > 0 else shown

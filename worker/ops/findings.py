"""The results of checks, and how they name many things at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from ..contract.entries import Object

Level: TypeAlias = Literal["ok", "warning", "error"]

_V = TypeVar("_V", str, float)
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check of one subject. `fix` is how to fix it; empty if nothing needs to be fixed.

    An error means that a worker cannot work. `fault` is the name of a fault in the table of deploy/README.md, and
    empty for other findings. `since` is when it began, in Unix ms; 0 if that is not known.
    """

    level: Level
    subject: str
    message: str
    fix: str = ""
    fault: str = ""
    since: int = 0

    def as_dict(self) -> Object:
        """The finding as `--json` prints it, with the published field names."""
        shown: Object = {"level": self.level, "subject": self.subject, "text": self.message, "mend": self.fix}
        return shown | {name: value for name, value in (("fault", self.fault), ("since", self.since)) if value}


def listed(names: Sequence[str]) -> str:
    """Some names as text: the first three, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {more} more" if (more := len(names) - _NAMES_SHOWN) > 0 else shown


def grouped(values: Mapping[str, _V]) -> dict[_V, list[str]]:
    """The names that have each value."""
    groups: dict[_V, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups

"""The results of checks, and how they name many things at once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, get_args

from ..contract.entries import Object

Level: TypeAlias = Literal["ok", "warning", "error"]

Fault: TypeAlias = Literal[
    "", "redis_away", "redis_silent", "redis_login", "redis_full", "redis_refuses", "no_worker", "worker_dead",
    "worker_blocked", "worker_silent", "gateway_silent", "vllm_away", "vllm_login", "vllm_silent", "vllm_full",
    "queue_unserved", "queue_paused", "queue_full", "poison_job", "leases_differ", "lifecycle_behind",
]  # fmt: skip
"""The names of faults, the most severe first. They are published: deploy/failures.md has what each means. The empty
name is that of a finding that is no fault."""

_V = TypeVar("_V", str, float)
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check of one subject. `fix` is how to fix it; empty if nothing needs to be fixed.

    An error means that a worker cannot work. `since` is when the fault began, in Unix ms; 0 if that is not known.
    """

    level: Level
    subject: str
    message: str
    fix: str = ""
    fault: Fault = ""
    since: int = 0

    def as_dict(self) -> Object:
        """The finding as `--json` prints it, with the published field names."""
        shown: Object = {"level": self.level, "subject": self.subject, "text": self.message, "mend": self.fix}
        return shown | {name: value for name, value in (("fault", self.fault), ("since", self.since)) if value}


def faults_among(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are faults, the most severe first."""
    order = get_args(Fault)
    faults = [finding for finding in findings if finding.fault]
    return sorted(faults, key=lambda fault: (fault.level != "error", order.index(fault.fault)))


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

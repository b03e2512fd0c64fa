"""What a log's former attempts wrote: whether an answer may go on from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from .entries import Entry, Restarted, Unknown
from .ids import BEFORE_ALL, SEAL, follows


@dataclass(frozen=True, slots=True)
class History:
    """What former attempts wrote, and why an answer cannot go on from it: nothing where it can."""

    entries: Sequence[Entry]
    fault: str


def fault_in(history: Sequence[Entry]) -> str:
    """Why an answer cannot go on from what its log holds, or nothing.

    Entries may have been deleted (XDEL, XTRIM) or damaged: then text or token ids are missing, and going on would show
    some twice and others never. What a `restarted` has made void does not matter.
    """
    begin = max((number for number, entry in enumerate(history) if isinstance(entry, Restarted)), default=0)
    before = history[begin - 1].id if begin else BEFORE_ALL
    for entry in history[begin:]:
        if entry.id == SEAL:
            break
        if not follows(entry.id, before):
            return f"entries are missing before {entry.id}"
        if isinstance(entry, Unknown) and not entry.name:
            return f"entry {entry.id} cannot be read"
        before = entry.id
    return ""

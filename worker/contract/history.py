"""The entries that earlier attempts wrote into a log, and whether an answer can continue from them."""

from collections.abc import Sequence
from dataclasses import dataclass

from .entries import Entry, Restarted, Unknown
from .ids import BEFORE_ALL, SEAL, follows


@dataclass(frozen=True, slots=True)
class History:
    """The entries of earlier attempts. `fault` is why an answer cannot continue from them; empty if it can."""

    entries: Sequence[Entry]
    fault: str


def fault_in(history: Sequence[Entry]) -> str:
    """Why an answer cannot continue from these entries of its log; empty if it can.

    Entries may have been deleted (XDEL, XTRIM) or damaged. Then text or token ids are missing, and an answer that
    continued would repeat some text and omit some. Entries before a `restarted` do not matter, since they are void.
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

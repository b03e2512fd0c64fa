"""Holes in a log: ids of entries are consecutive, so the ids show where entries are missing."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ..contract.ids import SEAL, EntryId, follows

_T = TypeVar("_T")


def find_hole(
    after: EntryId, raw: Sequence[tuple[bytes, _T]], fields_of: Callable[[_T], Mapping[bytes, bytes]]
) -> tuple[int, EntryId] | None:
    """Find the first hole in entries that were read after the entry `after`.

    Returns the number of the first entry after the hole and the id of the last entry before it, or None. Ids increase,
    so only the first and the last id of each attempt are compared, unless these differ by too much.
    """
    number, before = 0, after
    while number < len(raw):
        first = EntryId.parse(raw[number][0])
        if not follows(first, before) or (first == SEAL and _ends_later_entries(fields_of(raw[number][1]), before)):
            return number, before
        end = bisect_right(raw, first.attempt, lo=number, key=lambda entry: EntryId.parse(entry[0]).attempt)
        if first != SEAL and EntryId.parse(raw[end - 1][0]) == SEAL:  # the seal is in no attempt, whatever its number
            end -= 1
        before = EntryId.parse(raw[end - 1][0])
        if before.n - first.n != end - 1 - number:
            ids = [EntryId.parse(entry_id) for entry_id, _ in raw[number:end]]
            at = next(at for at, entry_id in enumerate(ids) if entry_id.n != first.n + at)
            return number + at, ids[at - 1]
        number = end
    return None


def _ends_later_entries(seal: Mapping[bytes, bytes], before: EntryId) -> bool:
    """Whether a seal ends an answer that started, or had another attempt, after the last entry before the seal."""
    attempt = seal.get(b"attempt", b"0")
    if before.attempt:
        return attempt.isdigit() and int(attempt) > before.attempt
    return seal.get(b"type") == b"done" or attempt != b"0" or seal.get(b"usage", b"{}") != b"{}"

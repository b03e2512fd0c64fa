"""Whether an answer can go on from the entries of its log."""

import pytest

from worker.contract.entries import parse_leniently
from worker.contract.history import fault_in

WHOLE = [
    ("0-1", {"type": "queued"}),
    ("1-0", {"type": "started"}),
    ("1-1", {"type": "opened"}),
    ("1-2", {"type": "delta", "content": "a"}),
    ("1-3", {"type": "delta", "content": "b"}),
    ("2-0", {"type": "claimed"}),
    ("2-1", {"type": "resumed", "after": "1-3"}),
    ("2-2", {"type": "delta", "content": "c"}),
]
AGAIN = [
    *WHOLE,
    ("3-0", {"type": "claimed"}),
    ("3-1", {"type": "restarted"}),
    ("3-2", {"type": "delta", "content": "a"}),
    ("3-3", {"type": "delta", "content": "b"}),
]
REMADE = [("1-0", {"type": "started"}), ("4-0", {"type": "claimed"}), ("4-1", {"type": "restarted"})]


@pytest.mark.parametrize(
    ("log", "without", "fault"),
    [
        (WHOLE, (), ""),
        (WHOLE, ("0-1",), ""),
        (WHOLE, ("1-2",), "entries are missing before 1-3"),
        (WHOLE, ("1-1", "1-2", "1-3", "2-0"), "entries are missing before 2-1"),
        (WHOLE, ("0-1", "1-0", "1-1"), "entries are missing before 1-2"),
        (WHOLE, ("2-0",), "entries are missing before 2-1"),
        (AGAIN, (), ""),
        (AGAIN, ("0-1", "1-0", "1-2", "2-1"), ""),
        (AGAIN, ("3-2",), "entries are missing before 3-3"),
        (REMADE, (), ""),
        ([*WHOLE, ("2-3", {"type": "delta", "token_ids": "[1,"})], (), "entry 2-3 cannot be read"),
        ([*WHOLE, ("2-3", {"no type": "at all"})], (), "entry 2-3 cannot be read"),
        ([*WHOLE, ("2-3", {"type": "of a later version"})], (), ""),
        ([*WHOLE, ("18446744073709551615-18446744073709551615", {"type": "done"})], (), ""),
        ([], (), ""),
    ],
)  # fmt: skip
def test_an_answer_cannot_go_on_after_a_hole_or_a_damaged_entry(
    log: list[tuple[str, dict[str, str]]], without: tuple[str, ...], fault: str
) -> None:
    assert fault_in([parse_leniently(where, fields) for where, fields in log if where not in without]) == fault

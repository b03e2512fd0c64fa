"""Ids of entries and of requests, and the names of the keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.ids import (
    BEFORE_ALL,
    QUEUED,
    SEAL,
    EntryId,
    follows,
    is_request_id,
    is_traceparent,
    new_request_id,
)
from worker.contract.keys import DEFAULT_QUEUE, Keys

_NUMBER = st.integers(0, 2**64 - 1)


@given(_NUMBER, _NUMBER)
def test_an_id_is_read_back_from_its_text_and_its_bytes(attempt: int, n: int) -> None:
    entry_id = EntryId(attempt, n)
    assert EntryId.parse(str(entry_id)) == EntryId.parse(str(entry_id).encode()) == entry_id


def test_a_number_alone_is_the_first_id_of_an_attempt() -> None:
    assert EntryId.parse("7") == EntryId.parse(b"7") == EntryId(7, 0)


@pytest.mark.parametrize("raw", ["", "-", "-1", "1-x", "x-1", "1-1-1", "+", "$", "1.0", " 1-0", "1-0\n", b"\xff-1"])
def test_a_bad_id_is_refused_with_an_example(raw: str | bytes) -> None:
    with pytest.raises(ValueError, match="is not the id of a log entry: give an id from the log, such as 1-0"):
        EntryId.parse(raw)


@given(_NUMBER, _NUMBER, _NUMBER, _NUMBER)
def test_ids_are_ordered_as_in_redis(attempt: int, n: int, other_attempt: int, other_n: int) -> None:
    earlier = attempt < other_attempt or (attempt == other_attempt and n < other_n)
    assert (EntryId(attempt, n) < EntryId(other_attempt, other_n)) == earlier
    assert BEFORE_ALL <= EntryId(attempt, n) <= SEAL


def test_the_ids_that_the_contract_names() -> None:
    assert str(SEAL) == "18446744073709551615-18446744073709551615"
    assert str(QUEUED) == "0-1"
    assert BEFORE_ALL < QUEUED < EntryId(1, 0) < EntryId(1, 1) < EntryId(2, 0) < SEAL


@pytest.mark.parametrize("text", ["a", "A-b_9", "x" * 128])
def test_texts_that_can_name_a_request(text: str) -> None:
    assert is_request_id(text)


@pytest.mark.parametrize("text", ["", "x" * 129, "a b", "a\n", "a:b", "{a}", "é", "\uff11", "a/b", "*"])
def test_texts_that_cannot_name_a_request(text: str) -> None:
    assert not is_request_id(text)


def test_a_new_request_id_is_new_and_can_name_a_request() -> None:
    made = {new_request_id() for _ in range(100)}
    assert len(made) == 100
    assert all(is_request_id(name) and len(name) == 32 for name in made)


def test_the_keys_are_those_of_the_contract() -> None:
    keys = Keys()
    assert (keys.jobs(), keys.jobs(DEFAULT_QUEUE), keys.jobs("slow")) == ("chat:jobs", "chat:jobs", "chat:jobs:slow")
    assert keys.tokens("r1") == "chat:tokens:{r1}"
    assert keys.ended("r1") == "chat:ended:{r1}"
    assert keys.feed("r1") == "chat:feed:{r1}"
    assert Keys(database=3).feed("r1") == "chat:feed:3:{r1}"
    assert (keys.lifecycle, keys.dead, keys.workers) == ("chat:lifecycle", "chat:dead", "chat:workers")
    other = Keys("test:1")
    assert (other.jobs("slow"), other.tokens("r1"), other.dead) == (
        "test:1:jobs:slow",
        "test:1:tokens:{r1}",
        "test:1:dead",
    )


@pytest.mark.parametrize(
    ("before", "entry", "is_next"),
    [
        ("0-0", "0-1", True), ("0-0", "1-0", True), ("0-1", "1-0", True), ("0-0", str(SEAL), True),
        ("0-0", "1-1", False), ("0-0", "2-0", False), ("0-1", "1-7", False), ("0-1", "3-0", False),
        ("1-0", "1-1", True), ("1-9", "1-10", True), ("1-9", "2-0", True), ("1-9", "5-0", True),
        ("1-9", str(SEAL), True),
        ("1-9", "1-11", False), ("1-9", "2-1", False), ("2-0", "1-1", False), ("2-9", "2-9", False),
    ],
)  # fmt: skip
def test_the_ids_of_two_entries_show_whether_one_is_missing_between_them(
    before: str, entry: str, *, is_next: bool
) -> None:
    assert follows(EntryId.parse(entry), EntryId.parse(before)) is is_next


_TRACE, _SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "text", [f"00-{_TRACE}-{_SPAN}-00", f"00-{_TRACE}-{_SPAN}-01", f"cc-{_TRACE}-{_SPAN}-01-later"]
)
def test_a_traceparent_of_this_and_of_later_versions_is_valid(text: str) -> None:
    assert is_traceparent(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "00", f"00-{_TRACE}-{_SPAN}", f"00-{_TRACE}-{_SPAN}-01-later", f"ff-{_TRACE}-{_SPAN}-01",
        f"00-{_TRACE.upper()}-{_SPAN}-01", f"00-{'0' * 32}-{_SPAN}-01", f"00-{_TRACE}-{'0' * 16}-01",
        f"00-{_TRACE}-{_SPAN}-01\n", f"cc-{_TRACE}-{_SPAN}-01-a\r\nx-evil: 1", f"00-{_TRACE}-{_SPAN}-1",
    ],
)  # fmt: skip
def test_a_malformed_traceparent_is_recognized(text: str) -> None:
    assert not is_traceparent(text)

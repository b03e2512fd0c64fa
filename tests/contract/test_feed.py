"""Messages of the feed: a fast reader gives the same entries as the reader of the log."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.entries import BadEntry, Delta, Entry, Opened, parse, to_fields, to_json
from worker.contract.feed import read_message
from worker.contract.ids import EntryId

ids = st.builds(EntryId, st.integers(1, 2**64 - 2), st.integers(0, 2**64 - 2))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.builds(
    Delta, id=ids, content=texts, reasoning=texts, finish_reason=texts,
    token_ids=st.lists(st.integers(0, 2**31), max_size=5),
)  # fmt: skip
rare = st.builds(
    Delta, id=ids, content=texts, index=st.integers(0, 3), stop_reason=st.none() | texts | st.integers(0, 9),
    logprobs=st.none() | st.just({"content": [{"token": "a", "logprob": -1.5}]}),
    tool_calls=st.lists(st.just({"index": 0, "function": {"arguments": "{"}}), max_size=2),
)  # fmt: skip
opened = st.builds(Opened, id=ids, model=texts, created=st.integers(0, 2**40))


@given(st.lists(plain | rare | opened, max_size=5))
def test_a_message_is_read_as_the_entries_of_the_log_are(entries: list[Entry]) -> None:
    message = [[str(entry.id), to_fields(entry)] for entry in entries]
    assert read_message(to_json(message).encode()) == entries


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "delta"},
        {"type": "delta", "content": "a", "of_a_later_version": "1"},
        {"type": "delta", "content": "a", "extra": '{"a":1}'},
        {"type": "of_a_later_version", "content": "a"},
        {"content": "no type"},
    ],
)
def test_a_message_of_other_entries_is_read_as_the_log_is(fields: dict[str, str]) -> None:
    assert read_message(to_json([["1-1", fields]]).encode()) == [parse("1-1", fields)]


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"null", b"{}", b'[["1-1"]]', b'[["1-1",{"type":"delta","content":1}]]', b'[["one",{"type":"delta"}]]',
        b'[["1-1",{"type":"delta","token_ids":""}]]', b'[["1-1",{"type":"delta","token_ids":"[1.5]"}]]',
        b'[["1-1",{"type":"delta","index":"first"}]]', b"\xff",
    ],
)  # fmt: skip
def test_an_unreadable_message_is_an_error_that_names_the_feed(payload: bytes) -> None:
    with pytest.raises(BadEntry):
        read_message(payload)

"""Every field of a delta: a chunk of vLLM fills it, and the ways back to a chunk and to a whole answer return it."""

from typing import Any

import msgspec
import pytest

from worker.contract.answer import Answer
from worker.contract.entries import Delta, parse, to_fields
from worker.contract.feed import read_message
from worker.contract.ids import EntryId
from worker.vllm.chunks.parser import ChunkParser

Object = dict[str, Any]

CALL: Object = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHOICES: dict[str, Object] = {
    "content": {"delta": {"content": "Hi"}},
    "reasoning": {"delta": {"reasoning": "Hm"}},
    "tool_calls": {"delta": {"tool_calls": [{"index": 0} | CALL]}},
    "index": {"index": 1, "delta": {"content": "Hi"}},
    "finish_reason": {"delta": {}, "finish_reason": "stop"},
    "stop_reason": {"delta": {}, "finish_reason": "stop", "stop_reason": "END"},
    "logprobs": {"delta": {"content": "Hi"}, "logprobs": {"content": [{"token": "Hi", "logprob": -0.5}]}},
    "token_ids": {"delta": {"content": "Hi"}, "token_ids": [7, 8]},
    "extra": {"delta": {"foo": "a field that this version does not know"}},
}
"""For each field of a delta, a choice of vLLM's chunk that fills the field. A new field gets a line."""

FIELDS = [name for name in Delta.__struct_fields__ if name != "id"]


def delta_with(field: str) -> Delta:
    """The delta that is made from the chunk of the table."""
    choice = {"index": 0, "logprobs": None, "finish_reason": None} | CHOICES[field]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
    *_, fields = ChunkParser(n=2).parse(msgspec.json.encode(head | {"choices": [choice]}))
    entry = parse("1-2", fields)
    assert isinstance(entry, Delta)
    return entry


def assert_holds(found: Object, given: Object) -> None:
    """Check that an object has all fields of another one, with equal values; also in objects within."""
    for name, value in given.items():
        if isinstance(value, dict):
            assert_holds(found[name], value)
        else:
            assert found[name] == value


def test_the_table_has_every_field_of_a_delta() -> None:
    assert sorted(CHOICES) == sorted(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_chunk_with_the_field_makes_an_entry_with_it(field: str) -> None:
    blank = Delta(id=EntryId(1, 2))
    assert getattr(delta_with(field), field) != getattr(blank, field)


@pytest.mark.parametrize("field", FIELDS)
def test_the_feed_and_the_log_return_the_field(field: str) -> None:
    delta = delta_with(field)
    assert parse("1-2", to_fields(delta)) == delta
    assert read_message(msgspec.json.encode([["1-2", to_fields(delta)]])) == [delta]


@pytest.mark.parametrize("field", FIELDS)
def test_the_chunk_of_an_entry_returns_the_field(field: str) -> None:
    (choice,) = msgspec.convert(delta_with(field).chunk()["choices"], list[Object])
    assert_holds(choice, CHOICES[field])


@pytest.mark.parametrize("field", FIELDS)
def test_the_whole_answer_returns_the_field(field: str) -> None:
    (choice,) = msgspec.convert(Answer([delta_with(field)]).completion()["choices"], list[Object])
    given = dict(CHOICES[field])
    message = given.pop("delta")
    if "tool_calls" in message:
        message = {"tool_calls": [CALL]}  # a whole call has no index
    assert_holds(choice, given | {"message": message})

"""Entries to Redis fields and back, and how unknown or unreadable fields are handled."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from worker.contract.entries import (
    BadEntry,
    Cancelled,
    Claimed,
    Delta,
    Done,
    Entry,
    Failed,
    Opened,
    Queued,
    Restarted,
    Resumed,
    Started,
    Unknown,
    is_terminal,
    parse,
    to_fields,
    to_json,
)
from worker.contract.ids import SEAL, EntryId

KINDS: dict[str, type[Entry]] = {
    kind.type: kind for kind in (Queued, Started, Claimed, Resumed, Restarted, Opened, Delta, Done, Failed, Cancelled)
}

_TEXT = st.text(st.sampled_from('ab {}"\\/:-0\n\r\0\x7f\u0085\u2028\ufeffé世🙂'), max_size=6)
_COUNT = st.integers(0, 2**53)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, width=32) | _TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXT, inner, max_size=2),
    max_leaves=4,
).filter(lambda value: "inf" not in repr(value))
_OBJECT = st.dictionaries(_TEXT, _JSON, max_size=2)
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "v": st.integers(0, 99),
    "time": _COUNT,
    "index": _COUNT,
    "created": _COUNT,
    "deadline": _COUNT,
    "cut": _COUNT,
    "attempt": _COUNT,
    "delivery": _COUNT,
    "prompt_tokens": st.none() | _COUNT,
    "usage": _OBJECT,
    "timings": _OBJECT,
    "extra": _OBJECT,
    "tool_calls": st.lists(_OBJECT, max_size=2),
    "token_ids": st.lists(_COUNT, max_size=3),
    "forgets": st.lists(_TEXT, max_size=2),
    "logprobs": _JSON,
    "stop_reason": _JSON,
    "queue": st.sampled_from(["", "default", "batch-1"]),
    "job": st.sampled_from(["", "0-1", "18446744073709551615-0"]),
}


@st.composite
def _entries(draw: st.DrawFn) -> Entry:
    kind = draw(st.sampled_from(list(KINDS.values())))
    names = [name for name in kind.__struct_fields__ if name != "id"]
    chosen = draw(st.sets(st.sampled_from(names))) if names else set()
    values = {name: draw(_VALUES.get(name, _TEXT)) for name in sorted(chosen - {"after"})}
    if kind is Resumed:
        values["after"] = str(EntryId(draw(_COUNT), draw(_COUNT)))
        return kind(id=EntryId(2**53 + 1, draw(_COUNT)), **values)
    return kind(id=EntryId(draw(_COUNT), draw(_COUNT)), **values)


@settings(max_examples=300)
@given(_entries())
def test_every_entry_is_read_back_from_text_and_from_bytes(entry: Entry) -> None:
    fields = to_fields(entry)
    assert all(type(text) is str for pair in fields.items() for text in pair)
    assert next(iter(fields.items())) == ("type", entry.type)
    raw = {name.encode(): value.encode() for name, value in fields.items()}
    assert parse(str(entry.id), fields) == parse(str(entry.id).encode(), raw) == entry


@given(_entries())
def test_an_entry_as_a_dict_has_the_same_values(entry: Entry) -> None:
    shown = entry.as_dict()
    assert list(shown)[:2] == ["id", "type"]
    assert (shown.pop("id"), shown.pop("type")) == (str(entry.id), entry.type)
    again = msgspec.convert(msgspec.json.decode(to_json(shown)), dict[str, Any])
    assert type(entry)(id=entry.id, **again) == entry


def test_an_entry_is_json_with_its_id_as_text() -> None:
    entry = Delta(id=EntryId(1, 3), content="é世", token_ids=[1])
    assert entry.as_dict() == {"id": "1-3", "type": "delta", "content": "é世", "token_ids": [1]}
    assert entry.to_json() == '{"id":"1-3","type":"delta","content":"é世","token_ids":[1]}'
    assert (str(entry.id), f"{entry.id}") == ("1-3", "1-3")


OPENED = Opened(id=EntryId(1, 1), response_id="chatcmpl-1", model="m", created=7, role="assistant")
_HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
_CHOICE = {"index": 0, "logprobs": None, "finish_reason": None}


@pytest.mark.parametrize(
    ("entry", "choice"),
    [
        (OPENED, {"delta": {"role": "assistant", "content": ""}}),
        (Delta(id=EntryId(1, 2), content="a", reasoning="b"), {"delta": {"content": "a", "reasoning": "b"}}),
        (Delta(id=EntryId(1, 2), index=1, finish_reason="stop", stop_reason=7, token_ids=[2]),
         {"index": 1, "delta": {}, "finish_reason": "stop", "stop_reason": 7, "token_ids": [2]}),
        (Delta(id=EntryId(1, 2), tool_calls=[{"index": 0}], logprobs={"content": []}),
         {"delta": {"tool_calls": [{"index": 0}]}, "logprobs": {"content": []}}),
        (Delta(id=EntryId(1, 2), extra={"delta": {"refusal": "no", "tool_calls": "odd"}, "message": {"content": "a"}}),
         {"delta": {"refusal": "no"}}),
    ],
)  # fmt: skip
def test_deltas_and_the_beginning_are_chunks_of_openai(entry: Entry, choice: dict[str, Any]) -> None:
    assert entry.chunk(OPENED) == _HEAD | {"choices": [_CHOICE | choice]}
    alone: Any = entry.chunk()
    assert alone["choices"] == [_CHOICE | choice]
    ChatCompletionChunk.model_validate(alone)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"opened", "delta"}))
def test_other_entries_are_not_chunks(name: str) -> None:
    assert KINDS[name](id=EntryId(1, 2)).chunk(OPENED) is None


@pytest.mark.parametrize("name", [name for name in KINDS if name != "resumed"])
def test_an_entry_of_defaults_is_its_type_alone(name: str) -> None:
    entry = KINDS[name](id=EntryId(1, 2))
    wanted = {"type": name} | ({"v": "1"} if name in {"queued", "started"} else {})
    assert to_fields(entry) == wanted
    assert parse("1-2", {"type": name}) == entry


def test_the_fields_are_those_of_the_contract() -> None:
    delta = Delta(
        id=EntryId(1, 3),
        content="a",
        tool_calls=[{"index": 0}],
        index=1,
        finish_reason="stop",
        stop_reason="END",
        logprobs={"content": []},
        token_ids=[1, 2],
        extra={"x": None},
    )
    assert to_fields(delta) == {
        "type": "delta",
        "content": "a",
        "tool_calls": '[{"index":0}]',
        "index": "1",
        "finish_reason": "stop",
        "stop_reason": '"END"',
        "logprobs": '{"content":[]}',
        "token_ids": "[1,2]",
        "extra": '{"x":null}',
    }
    failed = Failed(id=SEAL, attempt=2, code="deadline", message="too late", usage={"total_tokens": 3}, model="m")
    assert to_fields(failed) == {
        "type": "error",
        "attempt": "2",
        "code": "deadline",
        "message": "too late",
        "usage": '{"total_tokens":3}',
        "model": "m",
    }
    assert to_fields(Resumed(id=EntryId(2, 1), after="1-7")) == {"type": "resumed", "after": "1-7"}


def test_a_prompt_without_tokens_is_not_one_that_was_not_counted() -> None:
    entry = Opened(id=EntryId(1, 1), prompt_tokens=0)
    assert to_fields(entry) == {"type": "opened", "prompt_tokens": "0"}
    assert parse("1-1", to_fields(entry)) == entry


def test_a_stop_reason_may_be_a_token_or_a_text_that_looks_like_one() -> None:
    for reason in (128009, "128009", "", "null", "true"):
        entry = Delta(id=EntryId(1, 1), stop_reason=reason)
        assert parse("1-1", to_fields(entry)) == entry


def test_unknown_fields_are_ignored() -> None:
    fields = {"type": "delta", "content": "a", "later": "{", "id": "9-9", "": "x"}
    assert parse("1-1", fields) == Delta(id=EntryId(1, 1), content="a")


@pytest.mark.parametrize("fields", [{"type": "paused", "for": "3"}, {"type": "", "for": "3"}, {"for": "3"}])
def test_an_entry_of_another_type_is_unknown_and_keeps_its_fields(fields: dict[str, str]) -> None:
    raw = {name.encode(): value.encode() for name, value in fields.items()}
    wanted = Unknown(id=EntryId(1, 1), name=fields.get("type", ""), fields={"for": "3"})
    assert parse("1-1", fields) == parse(b"1-1", raw) == wanted
    assert wanted.as_dict() == {"id": "1-1", "type": wanted.name, "for": "3"}


def test_only_the_seal_ends_a_log_whatever_its_type() -> None:
    assert is_terminal(parse(str(SEAL), {"type": "done"}))
    assert is_terminal(parse(str(SEAL), {"type": "paused"}))
    assert not is_terminal(parse("1-5", {"type": "done"}))


def test_a_cancel_from_the_command_line_is_read() -> None:
    assert parse(str(SEAL), {b"type": b"cancelled"}) == Cancelled(id=SEAL)


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    assert parse("1-1", {b"type": b"delta", b"content": b"a\xff"}) == Delta(id=EntryId(1, 1), content="a\ufffd")
    unknown = parse("1-1", {b"type": b"\xff", b"\xfe": b"\xfd"})
    assert unknown == Unknown(id=EntryId(1, 1), name="\ufffd", fields={"\ufffd": "\ufffd"})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("queued", "v", "one"),
        ("queued", "v", ""),
        ("opened", "prompt_tokens", "null"),
        ("delta", "index", "a"),
        ("delta", "token_ids", "[1,"),
        ("delta", "token_ids", '["a"]'),
        ("delta", "token_ids", "{}"),
        ("delta", "tool_calls", "[1]"),
        ("delta", "tool_calls", "{}"),
        ("delta", "logprobs", "nan"),
        ("delta", "logprobs", "[" * 100_000),
        ("delta", "stop_reason", "END"),
        ("delta", "extra", "[]"),
        ("done", "usage", "null"),
        ("done", "timings", "7"),
        ("error", "attempt", "-"),
        ("started", "delivery", "-1"),
        ("started", "job", "gone"),
        ("claimed", "job", f"{2**64}-0"),
        ("claimed", "queue", "a b"),
        ("resumed", "after", ""),
        ("resumed", "after", "gone"),
        ("resumed", "after", "3-4"),
        ("resumed", "after", "3-5"),
        ("resumed", "after", f"1-{2**64}"),
        ("resumed", "cut", "-1"),
        ("resumed", "forgets", "{}"),
    ],
)
def test_a_field_that_cannot_be_read_is_named_with_its_entry(name: str, field: str, value: str) -> None:
    with pytest.raises(BadEntry, match=rf"^entry 3-4 \({name}\): field {field} cannot be read: "):
        parse("3-4", {"type": name, field: value})
    with pytest.raises(BadEntry):
        parse(b"3-4", {b"type": name.encode(), field.encode(): value.encode()})


_MANY_DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("name", "field", "text", "value"),
    [
        ("delta", "logprobs", '{"content":[{"logprob":-1e999},{"logprob":-0.5}]}',
         {"content": [{"logprob": None}, {"logprob": -0.5}]}),
        ("delta", "logprobs", '{"content":[{"logprob":-Infinity},{"logprob":NaN}]}',
         {"content": [{"logprob": None}, {"logprob": None}]}),
        ("delta", "logprobs", _MANY_DIGITS, None),
        ("delta", "stop_reason", "1e999", None),
        ("delta", "tool_calls", '[{"index":1e999,"id":"c"}]', [{"index": None, "id": "c"}]),
        ("delta", "extra", f'{{"a":{_MANY_DIGITS},"b":"\\ud83d","c":"世"}}', {"a": None, "b": "?", "c": "世"}),
        ("opened", "extra", '{"a":1e999}', {"a": None}),
        ("opened", "created", _MANY_DIGITS, 0),
        ("opened", "created", "1.5", 0),
        ("queued", "deadline", "soon", 0),
        ("started", "time", "yesterday", 0),
        ("done", "usage", '{"prompt_tokens":3,"cost":1e999}', {"prompt_tokens": 3, "cost": None}),
        ("error", "timings", '{"total_ms":1e999}', {"total_ms": None}),
        ("done", "usage", '{"prompt_tokens":null,"completion_tokens":2.0,"total_tokens":"3","x":1}',
         {"completion_tokens": 2, "x": 1}),
        ("done", "usage", '{"prompt_tokens":true,"completion_tokens":0.5}', {}),
    ],
)  # fmt: skip
def test_a_bad_number_from_a_server_leaves_the_entry_readable(name: str, field: str, text: str, value: object) -> None:
    entry = parse("3-4", {"type": name, "model": "m", field: text})
    assert getattr(entry, field) == value
    to_json(entry.as_dict())  # and can be written again


def test_resumed_must_name_an_earlier_entry() -> None:
    with pytest.raises(BadEntry, match=r"^entry 2-1 \(resumed\): field after cannot be read: "):
        parse("2-1", {"type": "resumed"})
    assert parse("2-1", {"type": "resumed", "after": "1"}) == Resumed(id=EntryId(2, 1), after="1")


def test_a_bad_entry_id_is_refused() -> None:
    with pytest.raises(ValueError, match="is not the id of a log entry"):
        parse("first", {"type": "delta"})


def test_json_is_compact_and_keeps_its_characters() -> None:
    assert to_json({"a": [1, None, "é世"], "b": {}}) == '{"a":[1,null,"é世"],"b":{}}'

"""An answer put together from the entries of its log, for every course that a log can take."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.answer import Answer, Choice
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
    parse,
    to_json,
)
from worker.contract.ids import QUEUED, SEAL, EntryId

OPENED = Opened(id=EntryId(1, 1), response_id="chatcmpl-1", model="reciter", created=7, role="assistant")


def delta(n: int = 2, attempt: int = 1, **fields: Any) -> Delta:  # noqa: ANN401
    return Delta(id=EntryId(attempt, n), **fields)


def answer(*entries: Entry) -> Answer:
    return Answer([Queued(id=QUEUED), Started(id=EntryId(1, 0), owner="o1"), *entries])


def calls(*pieces: Any) -> list[Any]:  # noqa: ANN401
    """The tool calls that these pieces make, one piece an entry."""
    made: list[Any] = answer(*(delta(n, tool_calls=[piece]) for n, piece in enumerate(pieces, 2))).choices[0].tool_calls
    return made


def test_an_empty_log_is_an_answer_that_has_not_begun() -> None:
    empty = Answer()
    assert (empty.text, empty.choices, empty.usage, empty.model, empty.outcome) == ("", [], {}, "", "")
    assert (empty.begun, empty.attempt, empty.error, empty.finish_reason) == (False, 0, "", "")
    assert (empty.started, empty.opened, empty.end) == (None, None, None)


def test_a_plain_answer() -> None:
    usage: Any = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    whole = answer(
        OPENED,
        delta(2, content="Hel"),
        delta(3, reasoning="hm", content="lo"),
        delta(4, finish_reason="stop", stop_reason="END"),
    )
    assert (whole.outcome, whole.finished(1), whole.begun) == ("", True, True)
    whole.add(Done(id=SEAL, attempt=1, finish_reason="stop", usage=usage, model="reciter-final"))
    assert (whole.text, whole.outcome, whole.usage, whole.model) == ("Hello", "done", usage, "reciter-final")
    assert (whole.finish_reason, whole.attempt, whole.error) == ("stop", 1, "")
    choice = whole.choices[0]
    assert (choice.content, choice.reasoning, choice.finish_reason, choice.stop_reason) == (
        "Hello",
        "hm",
        "stop",
        "END",
    )
    assert whole.started == Started(id=EntryId(1, 0), owner="o1")


def test_the_repr_of_an_answer_shows_its_state_and_no_text() -> None:
    log = answer(OPENED, delta(content="secret"), delta(3, extra={"delta": {"refusal": "secret"}}))
    assert repr(log) == "Answer(model='reciter', attempt=1, characters=6)"
    log.add(Failed(id=SEAL, code="deadline", message="secret", usage={"total_tokens": 3}))
    assert repr(log) == (
        "Answer(outcome='error', error='deadline', model='reciter', attempt=1, characters=6, usage={'total_tokens': 3})"
    )
    assert repr(Answer()) == "Answer()"


def test_choices_are_kept_apart_and_in_order() -> None:
    both = answer(
        delta(2, index=1, content="b", token_ids=[7]),
        delta(3, content="a", token_ids=[1]),
        delta(4, index=1, content="B", finish_reason="length"),
        delta(5, content="A"),
    )
    assert [(choice.index, choice.content, choice.token_ids) for choice in both.choices] == [
        (0, "aA", [1]),
        (1, "bB", [7]),
    ]
    assert (both.text, both.finish_reason) == ("aA", "length")
    assert (both.finished(1), both.finished(2)) == (False, False)
    both.add(delta(6, finish_reason="stop"))
    assert (both.finished(1), both.finished(2), both.finished(3)) == (True, True, False)
    assert both.finish_reason == "stop"


def test_a_choice_with_text_after_its_finish_reason_has_not_finished() -> None:
    log = answer(delta(2, content="a", finish_reason="stop"), delta(3, content="b"))
    assert not log.finished(1)
    assert log.add(delta(4, finish_reason="stop")).finished(1)
    assert log.add(delta(5, token_ids=[7])).finished(1)
    assert log.add(delta(6, extra={"delta": {"annotations": [1]}})).finished(1)
    assert not log.add(delta(7, extra={"delta": {"refusal": "no"}})).finished(1)


def test_finished_is_fast_for_any_number_of_choices() -> None:
    assert not answer(delta(2, finish_reason="stop")).finished(10**18)


# Tool calls


def test_tool_calls_with_an_index_are_put_together() -> None:
    made = calls(
        {"index": 0, "id": "c0", "type": "function", "function": {"name": "f"}},
        {"index": 0, "function": {"arguments": '{"a'}},
        {"index": 1, "id": "c1", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"index": 0, "function": {"arguments": '":1}'}},
        {"index": 1, "id": None, "function": {"name": None, "arguments": "{}"}},
    )
    assert made == [
        {"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"index": 1, "id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_tool_calls_without_an_index_begin_with_an_id_of_their_own() -> None:
    made = calls(
        {"id": "c0", "function": {"name": "f", "arguments": "{"}},
        {"function": {"arguments": "}"}},
        {"id": "c1", "function": {"name": "g", "arguments": "["}},
        {"id": "c1", "function": {"arguments": "]"}},
    )
    assert made == [
        {"id": "c0", "function": {"name": "f", "arguments": "{}"}},
        {"id": "c1", "function": {"name": "g", "arguments": "[]"}},
    ]


def function(name: str = "", arguments: str = "", **more: Any) -> Any:  # noqa: ANN401
    """A piece of a tool call."""
    return more | {"function": {"name": name, "arguments": arguments}}


TOOL_CALLS: list[tuple[str, list[Any], list[Any]]] = [
    # a name, the pieces, and the calls that they make
    (
        "an empty id, name or type overwrites nothing",
        [function("f", "{", index=0, id="c", type="function"), function("", "}", index=0, id="", type="")],
        [function("f", "{}", index=0, id="c", type="function")],
    ),
    (
        "a null overwrites nothing",
        [function("f", "{", index=0, id="c"), {"index": 0, "id": None, "function": None}, {"index": 0, "type": None}],
        [function("f", "{", index=0, id="c")],
    ),
    (
        "a new id with a name begins a call, also at the same index",
        [function("f", "1", index=0, id="c"), function("g", "2", index=0, id="d"), function("", "3", index=0)],
        [function("f", "1", index=0, id="c"), function("g", "23", index=0, id="d")],
    ),
    (
        "calls at the same index are continued by their ids",
        [function("f", "1", index=0, id="c"), function("g", "2", index=0, id="d"), function("", "3", index=0, id="c")],
        [function("f", "13", index=0, id="c"), function("g", "2", index=0, id="d")],
    ),
    (
        "equal ids at two indices are two calls",
        [function("f", "1", index=0, id="c"), function("g", "2", index=1, id="c"), function("", "3", index=0)],
        [function("f", "13", index=0, id="c"), function("g", "2", index=1, id="c")],
    ),
    (
        "without index and id a name begins a call",
        [function("f", "{}"), function("f", "["), function("", "]")],
        [function("f", "{}"), function("f", "[]")],
    ),
    (
        "of a new id in every piece the first stays",
        [function("f", "{", index=0, id="c"), function("", "}", index=0, id="d"), function("", " ", index=0, id="e")],
        [function("f", "{} ", index=0, id="c")],
    ),
    (
        "also without an index",
        [function("f", "{", id="c"), function("", "}", id="d"), function("", " ", id="e")],
        [function("f", "{} ", id="c")],
    ),
    (
        "an id that comes later than the name is that call's",
        [function("f", "{", index=0), function("", "}", index=0, id="c")],
        [function("f", "{}", index=0, id="c")],
    ),
    (
        "an index that comes only in later pieces",
        [function("f", "{", id="c"), function("", "}", index=0), function("", " ", index=0)],
        [function("f", "{} ", index=0, id="c")],
    ),
    ("an empty piece is no call", [{}], []),
    ("nor is one that has only an index and a type", [function("", "", index=0, type="function"), {"id": ""}], []),
    (
        "an empty piece is passed over between others",
        [function("f", "{", index=0, id="c"), {}, {"index": 1}, function("", "}", index=0)],
        [function("f", "{}", index=0, id="c")],
    ),
    (
        "the input of a custom tool is joined",
        [
            {"index": 0, "id": "c", "type": "custom", "custom": {"name": "x", "input": "a"}},
            {"index": 0, "custom": {"input": "b"}},
        ],
        [{"index": 0, "id": "c", "type": "custom", "custom": {"name": "x", "input": "ab"}}],
    ),
    (
        "a name may come in pieces, or with every piece",
        [function("get_", "", index=0), function("time", "{", index=0), function("x", "1", index=1),
         function("x", "2", index=1)],
        [function("get_time", "{", index=0), function("x", "12", index=1)],
    ),
    (
        "at the same index and without ids, another name after arguments begins a call",
        [function("f", "{}", index=0), function("g", "[", index=0), function("", "]", index=0)],
        [function("f", "{}", index=0), function("g", "[]", index=0)],
    ),
    (
        "and so it does where every call has the same id",
        [function("f", "{}", id="c"), function("g", "[", id="c"), function("", "]", id="c")],
        [function("f", "{}", id="c"), function("g", "[]", id="c")],
    ),
    (
        "arguments that are an object stay one",
        [{"index": 0, "function": {"name": "f", "arguments": {"a": 1}}}, function("", "", index=0)],
        [{"index": 0, "function": {"name": "f", "arguments": {"a": 1}}}],
    ),
    (
        "what is no function is in nobody's way",
        [{"index": 0, "id": "c", "function": "f"}, function("g", "{}", index=0)],
        [{"index": 0, "id": "c", "function": "f"}],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("pieces", "made"), [case[1:] for case in TOOL_CALLS], ids=[case[0] for case in TOOL_CALLS])
def test_pieces_of_tool_calls_are_put_together(pieces: list[Any], made: list[Any]) -> None:
    assert calls(*pieces) == made


def test_several_tool_calls_may_come_in_one_entry() -> None:
    pieces: Any = [{"index": n, "id": f"c{n}", "function": {"name": "f", "arguments": "{}"}} for n in range(2)]
    assert answer(delta(tool_calls=pieces)).choices[0].tool_calls == pieces


def test_reading_an_answer_twice_does_not_change_its_entries() -> None:
    first: Any = {"index": 0, "id": "c0", "function": {"name": "f", "arguments": "{"}}
    log = answer(delta(2, tool_calls=[first]), delta(3, tool_calls=[{"index": 0, "function": {"arguments": "}"}}]))
    assert log.choices == log.choices
    assert first == {"index": 0, "id": "c0", "function": {"name": "f", "arguments": "{"}}


# Logprobs, token ids and the rest


def test_logprobs_are_joined() -> None:
    pieces: list[Any] = [
        {"content": [{"token": "a"}], "refusal": None},
        None,
        {"content": [{"token": "b"}, {"token": "c"}]},
        {"content": None, "refusal": [{"token": "r"}]},
        {"refusal": [{"token": "s"}]},
    ]
    joined = answer(*(delta(n, logprobs=piece) for n, piece in enumerate(pieces[:3], 2))).choices[0].logprobs
    assert joined == {"content": [{"token": "a"}, {"token": "b"}, {"token": "c"}], "refusal": None}
    joined = answer(*(delta(n, logprobs=piece) for n, piece in enumerate(pieces[3:], 2))).choices[0].logprobs
    assert joined == {"content": None, "refusal": [{"token": "r"}, {"token": "s"}]}


def test_a_stop_reason_of_zero_is_kept() -> None:
    assert answer(delta(2, stop_reason=0), delta(3)).choices[0].stop_reason == 0


def test_extra_fields_are_kept_and_the_latest_holds() -> None:
    log = answer(delta(2, extra={"a": 1, "b": 1}), delta(3, extra={"b": 2}))
    assert log.choices[0].extra == {"a": 1, "b": 2}


OTHER_FIELDS: list[tuple[str, list[Any], dict[str, Any]]] = [
    # a name, a field of each delta, and the field of the message
    ("a refusal", ["I can", "not", None, ""], {"refusal": "I cannot"}),
    (
        "audio",
        [{"id": "a", "transcript": "Hi"}, {"id": "a", "transcript": " you", "data": "AA"}, {"expires_at": 7}],
        {"audio": {"id": "a", "transcript": "Hi you", "data": "AA", "expires_at": 7}},
    ),
    (
        "reasoning_details",
        [[{"type": "reasoning.text", "index": 0, "text": "hm", "format": "x"}],
         [{"type": "reasoning.text", "index": 0, "text": ", so", "format": "x"}],
         [{"type": "reasoning.encrypted", "index": 0, "data": "AA"}],
         [{"type": "reasoning.text", "index": 1, "text": "b"}]],
        {"reasoning_details": [
            {"type": "reasoning.text", "index": 0, "text": "hm, so", "format": "x"},
            {"type": "reasoning.encrypted", "index": 0, "data": "AA"},
            {"type": "reasoning.text", "index": 1, "text": "b"}]},
    ),
    (
        "a function_call",
        [{"name": "f", "arguments": ""}, {"arguments": "{"}, {"name": "", "arguments": "}"}],
        {"function_call": {"name": "f", "arguments": "{}"}},
    ),
    (
        "content parts",
        [[{"type": "text", "text": "a"}], [{"type": "text", "text": "b"}], []],
        {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ),
    ("images", [[{"image_url": {"url": "x"}}], [{"image_url": {"url": "y"}}]],
     {"images": [{"image_url": {"url": "x"}}, {"image_url": {"url": "y"}}]}),
    ("annotations", [[{"type": "url_citation"}], [], [{"type": "url_citation"}]],
     {"annotations": [{"type": "url_citation"}, {"type": "url_citation"}]}),
    ("pieces of other types", ["a", {"b": 1}, ["c"], 7, "d"], {"other": "ad"}),
    ("numbers", [1, 2], {"number": 2}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "made"), [case[1:] for case in OTHER_FIELDS], ids=[case[0] for case in OTHER_FIELDS]
)
def test_other_fields_of_deltas_are_joined_and_are_in_the_message(pieces: list[Any], made: dict[str, Any]) -> None:
    (name,) = made
    log = answer(*(delta(n, extra={"delta": {name: piece}}) for n, piece in enumerate(pieces, 2)))
    (choice,) = log.choices
    assert choice.extra == {"delta": made}
    assert choice.message() == {"role": "assistant", "content": choice.message()["content"]} | made
    assert log.choices == log.choices


def test_a_refusal_is_in_each_delta_and_in_the_choice() -> None:
    pieces = [delta(n, extra={"delta": {"refusal": text}}) for n, text in enumerate(["I can", "not"], 2)]
    assert [piece.refusal for piece in pieces] == ["I can", "not"]
    (choice,) = answer(*pieces).choices
    assert (choice.refusal, choice.content) == ("I cannot", "")
    assert choice.message() == {"role": "assistant", "content": None, "refusal": "I cannot"}
    assert (delta(extra={"delta": "odd"}).refusal, delta(extra={"delta": {"refusal": 1}}).refusal) == ("", "")


def test_beside_the_delta_the_latest_value_of_each_field_holds() -> None:
    log = answer(
        delta(2, extra={"chunk": {"system_fingerprint": "a", "cost": 1}, "filter": {"x": 1}}),
        delta(3, extra={"chunk": {"cost": 2}, "filter": {"y": 1}}),
    )
    assert log.choices[0].extra == {"chunk": {"system_fingerprint": "a", "cost": 2}, "filter": {"y": 1}}


LOGPROBS: list[tuple[str, list[Any], Any]] = [
    ("a null list erases nothing", [{"content": ["a"]}, {"content": None}, {"content": ["b"]}],
     {"content": ["a", "b"]}),
    ("nor an empty one", [{"content": ["a"]}, {"content": []}, {}], {"content": ["a"]}),
    ("nor null in place of all", [{"content": ["a"]}, None], {"content": ["a"]}),
    ("nor what is no list", [{"content": ["a"]}, {"content": "b"}, [], "c", 7], {"content": ["a"]}),
    ("of null first the list stays", [{"content": None, "refusal": None}, {"content": ["a"]}],
     {"content": ["a"], "refusal": None}),
]  # fmt: skip


@pytest.mark.parametrize(("pieces", "made"), [case[1:] for case in LOGPROBS], ids=[case[0] for case in LOGPROBS])
def test_logprobs_are_never_erased(pieces: list[Any], made: object) -> None:
    assert answer(*(delta(n, logprobs=piece) for n, piece in enumerate(pieces, 2))).choices[0].logprobs == made


def test_the_usage_of_an_answer_without_end_is_counted_from_its_token_ids() -> None:
    opened = Opened(id=EntryId(1, 1), prompt_tokens=5)
    log = answer(opened, delta(2, token_ids=[1, 2]), delta(3, index=1, token_ids=[3]))
    assert log.usage == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    log.add(Cancelled(id=SEAL))
    assert log.usage == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert answer(opened).usage == {}
    assert answer(OPENED, delta(2, token_ids=[1])).usage == {}
    assert answer(delta(2, token_ids=[1])).usage == {}


_NAMES = st.sampled_from(
    ["id", "index", "type", "name", "function", "arguments", "delta", "chunk", "refusal", "content"]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "delta"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
_OBJECT = st.dictionaries(_NAMES, _JSON, max_size=3)


@given(st.lists(st.builds(
    delta, index=st.integers(-1, 1), content=st.sampled_from(["", "a"]), logprobs=_JSON,
    tool_calls=st.lists(_OBJECT, max_size=3), extra=_OBJECT,
), max_size=4))  # fmt: skip
def test_any_deltas_make_an_answer_that_is_json(deltas: list[Delta]) -> None:
    before = to_json([entry.as_dict() for entry in deltas])
    log = answer(*deltas)
    assert to_json(log.completion()) == to_json(log.completion())
    for one in deltas:
        to_json(one.chunk(OPENED))
    assert to_json([entry.as_dict() for entry in deltas]) == before, "what was read has not changed"


# Attempts


def test_restarted_makes_earlier_deltas_void() -> None:
    log = answer(
        OPENED,
        delta(2, content="old", finish_reason="stop", token_ids=[1]),
        Claimed(id=EntryId(2, 0), owner="o2", reason="lease expired"),
        Restarted(id=EntryId(2, 1)),
    )
    assert (log.text, log.begun, log.attempt, log.finished(1), log.choices) == ("", False, 2, False, [])
    assert log.started == Claimed(id=EntryId(2, 0), owner="o2", reason="lease expired")
    assert log.add(delta(2, attempt=2, content="new")).text == "new"


def test_resumed_keeps_deltas_up_to_the_entry_that_it_names() -> None:
    log = answer(
        Opened(id=EntryId(1, 1), prompt_tokens=5),
        delta(2, content="a", token_ids=[1]),
        delta(3, token_ids=[2]),
        delta(4, token_ids=[3]),
        Claimed(id=EntryId(2, 0)),
        Resumed(id=EntryId(2, 1), after="1-2"),
        delta(2, attempt=2, content="b", token_ids=[2, 3]),
        delta(3, attempt=2, token_ids=[4]),
    )
    assert (log.text, log.choices[0].token_ids) == ("ab", [1, 2, 3, 4])
    assert log.usage["completion_tokens"] == 4
    # A second resume, which keeps only what the first had kept.
    log.add(Claimed(id=EntryId(3, 0))).add(Resumed(id=EntryId(3, 1), after="1-2"))
    assert (log.text, log.choices[0].token_ids, log.attempt) == ("a", [1], 3)
    log.add(delta(2, attempt=3, content="c", token_ids=[9]))
    assert (log.text, log.choices[0].token_ids) == ("ac", [1, 9])


def test_resumed_after_an_entry_of_the_second_attempt_keeps_the_first_as_well() -> None:
    log = answer(
        delta(2, content="a"),
        Claimed(id=EntryId(2, 0)),
        Resumed(id=EntryId(2, 1), after="1-2"),
        delta(2, attempt=2, content="b"),
        delta(3, attempt=2, token_ids=[4]),
        Claimed(id=EntryId(3, 0)),
        Resumed(id=EntryId(3, 1), after="2-2"),
    )
    assert (log.text, log.choices[0].token_ids) == ("ab", [])


def test_the_tokens_that_are_cut_off_with_a_character_are_void() -> None:
    log = answer(
        delta(
            2, content="a", token_ids=[1, 2, 3], logprobs={"content": [{"token": "a"}, {"token": ""}, {"token": ""}]}
        ),
        Claimed(id=EntryId(2, 0)),
        Resumed(id=EntryId(2, 1), after="1-2", cut=2),
        delta(2, attempt=2, content="世", token_ids=[2, 3], logprobs={"content": [{"token": ""}, {"token": "世"}]}),
    )
    (choice,) = log.choices
    assert (choice.content, choice.token_ids) == ("a世", [1, 2, 3])
    assert choice.logprobs == {"content": [{"token": "a"}, {"token": ""}, {"token": "世"}]}


@pytest.mark.parametrize("first", [Opened(id=EntryId(2, 1)), delta(1, attempt=2)], ids=["opened", "delta"])
def test_deltas_that_the_next_owner_did_not_find_are_void(first: Entry) -> None:
    """A failover has lost deltas that this reader has: the next owner would have written `resumed` or `restarted`."""
    log = answer(OPENED, delta(2, content="lost"), Claimed(id=EntryId(2, 0)), first)
    assert log.add(delta(2, attempt=2, content="new")).text == "new"


def test_a_claim_before_any_delta_changes_the_attempt_alone() -> None:
    log = answer(OPENED, Claimed(id=EntryId(2, 0), owner="o2"))
    assert (log.attempt, log.begun, log.opened) == (2, False, OPENED)
    assert log.add(delta(1, attempt=2, content="a")).text == "a"


def test_the_latest_opened_holds() -> None:
    log = answer(OPENED, delta(content="a"))
    log.add(Opened(id=EntryId(2, 2), response_id="chatcmpl-2", model="other", prompt_tokens=9))
    assert log.opened is not None
    assert (log.opened.response_id, log.model, log.text) == ("chatcmpl-2", "other", "a")


# Ends


@pytest.mark.parametrize(
    ("end", "outcome", "error"),
    [
        (Done(id=SEAL, attempt=1), "done", ""),
        (Failed(id=SEAL, attempt=1, code="deadline", message="too late"), "error", "too late (deadline)"),
        (Cancelled(id=SEAL), "cancelled", ""),
    ],
)
def test_each_outcome(end: Entry, outcome: str, error: str) -> None:
    log = answer(delta(content="a"), end)
    assert (log.outcome, log.error, log.end, log.text, log.attempt) == (outcome, error, end, "a", 1)


def test_an_end_without_a_beginning_has_its_attempt() -> None:
    assert Answer([Failed(id=SEAL, attempt=3, code="buried")]).attempt == 3
    assert Answer([Cancelled(id=SEAL)]).attempt == 0


def test_a_seal_of_another_type_still_ends_the_log() -> None:
    log = answer(delta(content="a"), Unknown(id=SEAL, name="suspended"))
    assert log.outcome == "error"
    assert log.error == "the log ended with an entry of type 'suspended' (unknown)"


def test_entries_of_other_types_are_ignored() -> None:
    log = answer(delta(content="a"), Unknown(id=EntryId(1, 3), name="paused"), delta(4, content="b"))
    assert (log.text, log.end) == ("ab", None)


# The shape of a completion


def test_an_answer_has_the_shape_of_a_chat_completion() -> None:
    usage: Any = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    log = answer(
        OPENED,
        delta(2, content="Hi", reasoning="hm", token_ids=[1, 2], logprobs={"content": []}),
        delta(3, finish_reason="stop", stop_reason=9),
        Done(id=SEAL, usage=usage),
    )
    assert log.completion() == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "reciter",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", "reasoning": "hm"},
                "finish_reason": "stop",
                "stop_reason": 9,
                "logprobs": {"content": []},
                "token_ids": [1, 2],
            }
        ],
        "usage": usage,
    }


def test_a_completion_of_tool_calls_has_no_content_and_no_index_in_its_calls() -> None:
    call: Any = {"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    shown: Any = answer(OPENED, delta(tool_calls=[call], finish_reason="tool_calls")).completion()
    assert shown["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c0", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    assert "token_ids" not in shown["choices"][0]


def test_the_completion_of_an_empty_answer_is_empty() -> None:
    shown = Answer([Cancelled(id=SEAL)]).completion()
    assert shown == {
        "id": "",
        "object": "chat.completion",
        "created": 0,
        "model": "",
        "choices": [],
        "usage": None,
    }
    stopped: Any = answer(delta(finish_reason="", content="a")).completion()
    assert stopped["choices"][0]["finish_reason"] is None
    ended: Any = answer(delta(finish_reason="stop")).completion()
    assert ended["choices"][0]["message"]["content"] == ""


def nested(kind: str, levels: int) -> str:
    """A value with this number of levels, as JSON."""
    return "[" * levels + "]" * levels if kind == "list" else '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("kind", ["list", "object"])
@pytest.mark.parametrize(
    ("field", "around"),
    [
        ("extra", '{"delta":{"x":%s}}'),
        ("tool_calls", '[{"index":0,"function":{"x":%s}}]'),
        ("logprobs", '{"content":%s}'),
        ("stop_reason", "%s"),
    ],
)
@pytest.mark.parametrize("levels", [130, 300, 330, 500, 900, 1000, 5000])
def test_an_entry_that_nests_too_deeply_cannot_be_read(levels: int, field: str, around: str, kind: str) -> None:
    text = around % nested(kind, levels)
    with pytest.raises(BadEntry, match=rf"field {field} cannot be read: it nests more than 128 levels"):
        parse("1-1", {"type": "delta", field: text})


@pytest.mark.parametrize("kind", ["list", "object"])
@pytest.mark.parametrize("field", ["extra", "tool_calls", "logprobs"])
def test_the_pieces_of_an_answer_that_nests_as_deeply_as_may_be_are_joined(field: str, kind: str) -> None:
    around = {"extra": '{"delta":{"x":%s}}', "tool_calls": '[{"index":0,"function":{"x":%s}}]', "logprobs": '{"c":%s}'}
    entry = parse("1-1", {"type": "delta", field: around[field] % nested(kind, 124)})
    answer = Answer([entry, parse("1-2", {"type": "delta", field: around[field] % nested(kind, 124)})])

    def deep_in_another_program(calls: int) -> object:
        return deep_in_another_program(calls - 1) if calls else answer.completion()

    assert deep_in_another_program(200)
    assert json.loads(entry.to_json())


def test_brackets_in_a_text_are_not_levels() -> None:
    entry = parse("1-1", {"type": "delta", "extra": json.dumps({"delta": {"x": "[{" * 500}})})
    assert isinstance(entry, Delta)
    assert entry.extra == {"delta": {"x": "[{" * 500}}


def seconds_to_read(make: Any, size: int) -> float:  # noqa: ANN401
    """The processor time that it takes to assemble an answer of so many deltas, in the fastest of three tries."""
    whole = answer(OPENED, *(make(n) for n in range(2, size + 2)))
    tries = []
    for _ in range(3):
        began = time.thread_time()
        whole.completion()
        tries.append(time.thread_time() - began)
    return min(tries)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: delta(n, content="x" * 4_000),
        lambda n: delta(n, reasoning="x" * 4_000),
        lambda n: delta(n, extra={"delta": {"refusal": "x" * 4_000}}),
        lambda n: delta(n, tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "x" * 4_000}}]),
    ],
)
def test_the_time_to_assemble_an_answer_grows_no_faster_than_its_text(make: Any) -> None:  # noqa: ANN401
    short, long = seconds_to_read(make, 250), seconds_to_read(make, 4_000)
    assert long < 16 * short * 3 + 0.05, f"{long:.3f} s for 16 times the text that took {short:.4f} s"


def test_a_choice_made_at_once_equals_one_made_delta_by_delta() -> None:
    deltas = [
        delta(2, content="a", reasoning="r", tool_calls=[{"index": 0, "id": "c", "function": {"name": "f"}}]),
        delta(3, tool_calls=[{"index": 0, "function": {"arguments": '{"a"'}}], logprobs={"content": [{"token": "a"}]}),
        delta(4, tool_calls=[{"index": 0, "function": {"arguments": ": 1"}}], extra={"delta": {"refusal": "n"}}),
        delta(5, content="b", tool_calls=[{"index": 0, "function": {"arguments": "}"}}], token_ids=[1]),
        delta(6, extra={"delta": {"refusal": "o", "parts": [{"index": 0, "text": "x"}]}}, finish_reason="stop"),
        delta(7, extra={"delta": {"refusal": "!", "parts": [{"index": 0, "text": "y"}]}}),
    ]
    one_by_one = Choice()
    for piece in deltas:
        one_by_one.add(piece)
    assert Choice.of(0, deltas) == one_by_one
    assert one_by_one.tool_calls[0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert (one_by_one.refusal, one_by_one.extra["delta"]["parts"]) == ("no!", [{"index": 0, "text": "xy"}])  # type: ignore[index,call-overload]

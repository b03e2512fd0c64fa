"""Chunks that hypothesis generates: no text is lost, and the fast path gives the entries of the slow one."""

import json
from operator import attrgetter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recordings import (
    WHOLE,
    Object,
    chunk,
    parsed,
    parser_for,
    payloads,
    read,
    recorded,
)

from worker.contract.answer import Answer
from worker.contract.entries import Delta, Fields, Opened
from worker.vllm.chunks.lenient_json import ChunkDecoder
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.chunks.shapes import RawObject
from worker.vllm.errors import UpstreamError

_CHARACTERS = st.sampled_from('ab {}"\\/\n\r\0\x7f\u0085\u2028\ufeffé世🙂')
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(_CHARACTERS, max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
_TEXT = st.none() | st.text(_CHARACTERS, max_size=6)
_NAMES = ["id", "created", "model", "object", "usage", "choices", "error", "prompt_token_ids", "odd"]
_WELL = st.fixed_dictionaries(
    {},
    optional={
        "index": st.none() | st.integers(0, 2),
        "delta": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                "role": st.none() | st.sampled_from(["assistant", ""]),
                "content": _TEXT,
                "reasoning": _TEXT,
                "tool_calls": st.none() | st.lists(st.fixed_dictionaries({"index": st.integers(0, 1)}), max_size=2),
                "odd": _JSON,
            },
        ),
        "finish_reason": st.sampled_from([None, "", "stop", "length"]),
        "stop_reason": st.none() | st.integers(0, 9) | _TEXT,
        "logprobs": st.none() | st.fixed_dictionaries({"content": st.lists(_JSON, max_size=2)}),
        "token_ids": st.none() | st.lists(st.integers(0, 2**31), max_size=3),
        "odd": _JSON,
    },
)
_CHUNK = st.fixed_dictionaries(
    {"id": st.just("chatcmpl-1")},
    optional={
        "choices": st.none() | st.lists(st.none() | _WELL, max_size=3),
        "created": _JSON,
        "usage": st.none() | st.dictionaries(st.sampled_from("abc"), st.integers(0, 9), max_size=2),
        "odd": _JSON,
    },
)
_ODD = st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=4) | st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.dictionaries(
                st.sampled_from(["index", "delta", "message", "finish_reason", "stop_reason", "logprobs", "token_ids"]),
                _JSON | st.dictionaries(st.sampled_from(["role", "content", "reasoning", "tool_calls"]), _JSON),
                max_size=4,
            ),
            max_size=2,
        )
    }
)


@given(st.lists(_CHUNK, max_size=5), st.booleans())
def test_all_text_of_any_well_formed_chunks_is_published(chunks: list[Object], escaped: bool) -> None:  # noqa: FBT001
    answer = Answer(parsed(*(json.dumps(one, ensure_ascii=escaped).encode() for one in chunks))[1])
    sent: dict[int, Object] = {}
    for choice in (choice for one in chunks for choice in one.get("choices") or [] if choice):
        so_far = sent.setdefault(choice.get("index") or 0, {"content": "", "reasoning": "", "ids": []})
        delta = choice.get("delta") or {}
        so_far["content"] += delta.get("content") or ""
        so_far["reasoning"] += delta.get("reasoning") or ""
        so_far["ids"] += choice.get("token_ids") or []
    published = {choice.index: choice for choice in answer.choices}
    for index, wanted in sent.items():
        if index in published:
            assert published[index].content == wanted["content"]
            assert published[index].reasoning == wanted["reasoning"]
            assert published[index].token_ids == wanted["ids"]
        else:
            assert wanted == {"content": "", "reasoning": "", "ids": []}


_NOTHING: tuple[Any, ...] = (None, "", [], {})
_OF_DELTAS = [
    "content", "reasoning", "reasoning_content", "tool_calls", "refusal", "audio", "reasoning_details", "function_call",
    "images", "annotations", "text", "index", "type", "delta", "message", "error_of", "0",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(_OF_DELTAS), _JSON, max_size=5))
def test_no_field_of_a_delta_is_lost(delta: Object) -> None:
    wanted = json.loads(msgspec.json.encode(delta))  # without NaN and Infinity
    if isinstance(calls := wanted.get("tool_calls"), list):
        wanted["tool_calls"] = [call for call in calls if call not in _NOTHING]
    wanted = {name: value for name, value in wanted.items() if value not in _NOTHING}
    kept: Object = {}
    for entry in parsed(chunk(delta))[1]:
        if isinstance(entry, Delta):
            beside: Any = entry.extra.get("delta", {})
            twice = {"reasoning_content": entry.reasoning}  # the other name of the same
            kept = {"content": entry.content, "reasoning": entry.reasoning, **twice, **beside}
            if isinstance(wanted.get("tool_calls"), list):  # what is no call is beside the calls
                others = beside.get("tool_calls", [])
                assert all(isinstance(call, dict) for call in entry.tool_calls)
                assert not any(isinstance(other, dict) for other in others)
                kept["tool_calls"] = sorted(entry.tool_calls + others, key=wanted["tool_calls"].index)
    assert {name: kept.get(name) for name in wanted} == wanted


@given(st.lists(_ODD, max_size=3))
def test_any_json_makes_readable_entries_or_an_upstream_error(chunks: list[Object]) -> None:
    parser = ChunkParser()
    error = None
    for one in chunks:
        try:
            published = read(parser.parse(msgspec.json.encode(one)))
        except UpstreamError as caught:
            error = caught
            break
        assert all(isinstance(entry, Opened | Delta) for entry in published)
    assert error is None or (error.code.startswith("upstream_") and error.message)


@given(st.binary(max_size=40) | st.text('[]{}":,0.eE+-ntru\\\x00', max_size=40).map(str.encode))
def test_any_bytes_make_entries_or_an_upstream_error(data: bytes) -> None:
    published: list[Fields] = []
    code = "upstream_malformed"
    try:
        published = ChunkParser().parse(data)
    except UpstreamError as error:
        code = error.code
    assert (published, code) == ([], "upstream_malformed")


class Thorough(ChunkParser):
    """A parser without the fast path."""

    def _plain(self, chunk: object) -> list[Fields]:
        raise msgspec.ValidationError(repr(chunk))

    def _rich(self, data: bytes) -> list[Fields]:
        raise msgspec.ValidationError(repr(data))

    _end_of_answer = _rich


def test_logprobs_and_tool_calls_are_checked_in_chunks_that_are_nearly_plain() -> None:
    """They take the slow path only when some reader might not decode them."""
    head: Object = {"id": "c", "model": "m", "created": 1}
    good: Object = {"content": [{"token": "a", "logprob": -1e-5}]}
    for odd in ('"\\ud83d"', "-1e999", "NaN", "9" * 400, "[" * 200 + "]" * 200, '"\xff"'):
        parser, thorough = ChunkParser(), Thorough()
        for logprobs in (good, good, {"content": "ODD"}, good):
            delta = {"content": "a", "tool_calls": [{"id": "x", "odd": logprobs}]}
            one = head | {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs}]}
            data = json.dumps(one).replace('"ODD"', odd).encode("latin-1")
            both(parser, thorough, data)


def both(parser: ChunkParser, thorough: ChunkParser, data: bytes) -> None:
    published: list[list[Fields] | str] = []
    for one in (parser, thorough):
        try:
            published.append(one.parse(data))
        except UpstreamError as error:
            published.append(str(error))
    assert published[0] == published[1]
    state = attrgetter(
        *(name for name in ChunkParser.__slots__ if name not in {"_decoder", "_extra", "_is_rich"}),
        "_decoder._halves",
        "_extra._latest",
        "_extra.unpublished",
    )
    assert state(parser) == state(thorough)


@pytest.mark.parametrize("name", WHOLE)
def test_the_fast_path_gives_the_entries_of_the_slow_path_for_recorded_answers(name: str) -> None:
    parser, thorough = parser_for(name), parser_for(name, Thorough)
    for data in payloads(recorded(name)):
        both(parser, thorough, data)
    assert parser.is_complete


@pytest.mark.parametrize("name", ["usage", "long"])
def test_only_the_opening_and_the_first_text_of_a_plain_answer_take_the_slow_path(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: list[bytes] = []
    decode = ChunkDecoder.decode

    def noted(decoder: ChunkDecoder, data: bytes) -> RawObject:
        slow.append(data)
        return decode(decoder, data)

    monkeypatch.setattr(ChunkDecoder, "decode", noted)
    answer = payloads(recorded(name))
    parser = parser_for(name)
    for data in answer:
        parser.parse(data)
    assert parser.usage
    assert slow == answer[:2]


_PLAINLY = st.fixed_dictionaries(
    {
        "delta": st.fixed_dictionaries(
            {},
            optional={
                "content": _TEXT,
                "reasoning": _TEXT,
                "role": st.just("x"),
                "tool_calls": st.none() | _JSON | st.lists(st.just({}) | st.just({"id": "a"}) | _JSON, max_size=2),
            },
        ),
        "index": st.sampled_from([0, 0, 0, 1, None]),
    },
    optional={
        "logprobs": st.none() | _JSON,
        "finish_reason": st.sampled_from([None, "", "stop"]),
        "stop_reason": st.none() | _JSON,
        "token_ids": st.none() | st.lists(st.integers(-1, 2**70), max_size=3),
    },
)
_NEARLY_PLAIN = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", "a", "b", None]), "model": st.just("m"),
        "created": st.sampled_from([1, 1, "1", 2, 1.5]),
        "choices": st.lists(_PLAINLY, max_size=2),
    },
    optional={"usage": st.none() | st.just({"a": 1}) | _JSON, "odd": _JSON,
              "object": st.sampled_from(["chunk", "chat.completion.chunk", "chat.completion.chunk", "error"]),
              "system_fingerprint": st.sampled_from([None, "", "f", "f", "g", 1])},
)  # fmt: skip


@given(st.lists(_NEARLY_PLAIN, max_size=5), st.booleans(), st.binary(max_size=2), st.integers(0, 200))
def test_the_fast_path_gives_the_entries_of_the_slow_path_for_nearly_plain_chunks(
    chunks: list[Object],
    escaped: bool,  # noqa: FBT001 - drawn
    noise: bytes,
    place: int,
) -> None:
    parser, thorough = ChunkParser(), Thorough()
    for one in chunks:
        data = json.dumps(one, ensure_ascii=escaped).encode()
        both(parser, thorough, data)
        if noise:
            both(parser, thorough, data[:place] + noise + data[place:])

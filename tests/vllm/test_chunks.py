"""Chunks to log entries: recorded answers, compared with a simple reading of them, and shapes of other servers."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from recordings import (
    WHOLE,
    Object,
    calls_in,
    chunk,
    error_of,
    fields_of,
    only_delta,
    parsed,
    parser_for,
    payloads,
    pieces_of,
    plainly,
    read,
    recorded,
    request_of,
)

from worker.contract.answer import Answer
from worker.contract.entries import Delta, Opened
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError

# Recorded answers


@pytest.mark.parametrize("name", WHOLE)
def test_the_entries_of_a_recorded_answer_have_the_content_of_its_chunks(name: str) -> None:
    body, parser = recorded(name), parser_for(name)
    chunks = plainly(body)
    answer = Answer(read(fields_of(parser, [body])))
    parser.check_complete()
    assert [choice.index for choice in answer.choices] == list(range(request_of(name).get("n", 1)))
    for choice in answer.choices:
        pieces = pieces_of(chunks, choice.index)
        assert choice.content == "".join(piece["delta"].get("content") or "" for piece in pieces)
        assert choice.reasoning == "".join(piece["delta"].get("reasoning") or "" for piece in pieces)
        assert choice.tool_calls == calls_in(pieces)
        assert choice.token_ids == [number for piece in pieces for number in piece.get("token_ids") or []]
        logprobs = [one for piece in pieces if piece["logprobs"] for one in piece["logprobs"]["content"]]
        assert choice.logprobs == ({"content": logprobs} if logprobs else None)
        assert choice.finish_reason == pieces[-1]["finish_reason"]
        assert choice.stop_reason == pieces[-1]["stop_reason"]
    usages = [one["usage"] for one in chunks if one.get("usage")]
    assert parser.usage == (usages[-1] if usages else {})
    assert parser.finish_reason == answer.finish_reason == pieces_of(chunks, 0)[-1]["finish_reason"]
    assert (parser.done, parser.has_delta, parser.model) == (True, True, "reciter")
    opened = answer.opened
    assert opened is not None
    first = chunks[0]
    assert (opened.response_id, opened.created, opened.model) == (first["id"], first["created"], first["model"])
    assert opened.role == "assistant"
    ids = first["prompt_token_ids"]
    assert opened.prompt_tokens == (len(ids) if ids else None)
    digest = hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()[:16]
    assert opened.prompt_digest == (digest if ids else "")


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value that is not empty, with the keys that lead to it. A list counts as one value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif value not in (None, "", []):
        yield path, value


def where_it_went(path: tuple[str, ...]) -> tuple[str, ...]:
    """The place of a chunk's value in a log: the type of the entry, and the keys that lead to the value."""
    match path:
        case ("id",):
            return ("opened", "response_id")
        case ("created" | "model",):
            return ("opened", *path)
        case ("delta", "role"):
            return ("opened", "role")
        case ("delta", "reasoning_content"):
            return ("delta", "reasoning")
        case ("delta", "content" | "reasoning" | "tool_calls"):
            return path
        case ("finish_reason" | "stop_reason" | "logprobs" | "token_ids", *_):
            return ("delta", *path)
        case ("delta", *rest):
            return ("delta", "extra", "delta", *rest)
        case _:
            return ("extra", *path)


def fields_of_chunk(one: Object, choice: Object) -> Iterator[tuple[tuple[str, ...], object]]:
    """The values of a chunk with one choice or none that the log must have."""
    known = {"choices", "object"}
    yield from leaves({name: value for name, value in one.items() if name not in known})
    yield from leaves({name: value for name, value in choice.items() if name != "index"})


def found(wanted: tuple[str, ...], published: list[Any]) -> list[object]:
    """The log's values at these keys. `extra` may be in an entry, in the `chunk` of one, or in the terminal entry."""
    if wanted[0] != "extra":
        return [value for one in published for path, value in leaves({one["type"]: one}) if path == wanted]
    tails = {wanted, ("extra", "chunk", *wanted[1:])}
    return [value for one in published for path, value in leaves(one) if path in tails]


@pytest.mark.parametrize("name", [*WHOLE, "engine_death_mid_stream"])
def test_no_field_of_a_recorded_answer_is_lost(name: str) -> None:
    parser = parser_for(name)
    sent = [one for one in plainly(recorded(name)) if "error" not in one]
    opened: list[Any] = []
    unsettled = []
    for one in sent:
        published: list[Any] = [entry.as_dict() for entry in read(parser.parse(json.dumps(one).encode()))]
        opened += [entry for entry in published if entry["type"] == "opened"]
        for choice in one["choices"] or [{}]:
            for path, value in fields_of_chunk(one, choice):
                wanted = where_it_went(path)
                if wanted[0] == "delta" and wanted[:2] != ("delta", "extra"):
                    assert value in found(wanted, published), path
                elif wanted[0] == "opened":
                    assert found(wanted, opened)[-1] == value, path
                else:
                    unsettled.append((path, wanted, value))
        # Fields beside the choices come with the next entry, or with the end.
        now = [*published, {"extra": dict(parser.extra)}, {"extra": {"usage": dict(parser.usage)}}]
        seen = [*opened, *now]
        for path, wanted, value in unsettled:
            if path != ("prompt_token_ids",) or request_of(name).get("return_token_ids"):
                assert value in found(wanted, seen), path
        unsettled.clear()


@pytest.mark.parametrize("name", WHOLE)
def test_the_entries_are_the_same_however_the_bytes_are_cut(name: str) -> None:
    body = recorded(name)
    whole = fields_of(parser_for(name), [body])
    for size in (1, 7, 64, 1000):
        assert fields_of(parser_for(name), (body[at : at + size] for at in range(0, len(body), size))) == whole


@pytest.mark.parametrize("name", ["length", "logprobs", "tool_call_auto", "n2"])
def test_the_entries_are_the_same_at_every_cut(name: str) -> None:
    body = recorded(name)
    body = body[: body.index(b"\n\n", 1200) + 2]
    whole = fields_of(parser_for(name), [body])
    assert len(whole) > 2
    for cut in range(len(body)):
        assert fields_of(parser_for(name), [body[:cut], body[cut:]]) == whole


def test_fields_that_stay_the_same_are_published_once() -> None:
    published = fields_of(parser_for("plain"), [recorded("plain")])
    assert [fields["type"] for fields in published[:2]] == ["opened", "delta"]
    assert published[1] == {"type": "delta", "content": "I"}
    assert sum(fields["type"] == "opened" for fields in published) == 1


def test_the_usage_of_each_chunk_is_kept_when_the_request_asks_for_it() -> None:
    body = recorded("continuous_usage_token_ids")
    published = read(fields_of(parser_for("continuous_usage_token_ids"), [body]))
    kept = [entry.extra["chunk"] for entry in published if isinstance(entry, Delta)]
    sent = [one["usage"] for one in plainly(body) if one["choices"][:1] and "role" not in one["choices"][0]["delta"]]
    assert [json.loads(json.dumps(one))["usage"] for one in kept] == sent
    assert all("usage" not in str(fields) for fields in fields_of(ChunkParser(), [body]))


def test_prompt_ids_are_kept_when_the_request_asks_for_them_and_otherwise_only_their_digest() -> None:
    body = recorded("chinese_token_ids")
    ids = plainly(body)[0]["prompt_token_ids"]
    kept = read(fields_of(parser_for("chinese_token_ids"), [body]))[0]
    assert isinstance(kept, Opened)
    assert kept.extra == {"prompt_token_ids": ids}
    plain = read(fields_of(ChunkParser(), [body]))[0]
    assert isinstance(plain, Opened)
    assert (plain.extra, plain.prompt_tokens, plain.prompt_digest) == ({}, len(ids), kept.prompt_digest)


def test_an_engine_that_dies_is_an_error_after_the_text_so_far() -> None:
    parser = parser_for("engine_death_mid_stream")
    *events, last, _ = payloads(recorded("engine_death_mid_stream"))
    published = [fields for event in events for fields in parser.parse(event)]
    with pytest.raises(UpstreamError, match="EngineCore encountered an issue") as caught:
        parser.parse(last)
    assert (caught.value.code, caught.value.status, caught.value.retryable) == ("upstream_error", 500, True)
    assert Answer(read(published)).text.startswith("The river kept a ledger")
    assert not parser.is_complete


# The end of an answer


def test_done_without_a_finish_reason_is_not_a_success() -> None:
    error = error_of(chunk({"content": "a"}))
    assert (error.code, error.retryable) == ("upstream_truncated", True)
    assert error_of().code == "upstream_truncated"


def test_an_answer_that_a_content_filter_ends_is_whole() -> None:
    parser = ChunkParser()
    parser.parse(json.dumps(chunk({"content": "a"}, "content_filter")).encode())
    parser.check_complete()
    assert parser.finish_reason == "content_filter"


def test_a_finish_reason_without_done_is_success() -> None:
    parser, _ = parsed(chunk({"content": "a"}), chunk({}, "stop"), done=False)
    parser.check_complete()
    assert (parser.is_complete, parser.done, parser.finish_reason) == (True, False, "stop")


@pytest.mark.parametrize(
    "reason",
    [
        "abort", "error", "cancelled", "canceled", "timeout", "CANCELLED", "ABORTED", "timed_out", "server_error",
        "request_timeout", "internal_error", "failed", "insufficient_system_resource", "interrupted", "engine_shutdown",
        "deadline_exceeded", "connection_lost", "lost_worker", "out_of_memory", "oom", "gpu_oom", "terminated",
        "expired", "max_time", "stopped_by_server", "stalled", "closed", "broken", "incomplete", "unload",
    ],
)  # fmt: skip
def test_a_finish_reason_may_show_that_the_server_broke_off(reason: str) -> None:
    published = parsed(chunk({"content": "a"}), chunk({"content": "b"}, reason))
    assert Answer(published[1]).text == "ab"
    assert Answer(published[1]).finish_reason == ""
    error = error_of(chunk({"content": "a"}), chunk({}, reason))
    assert (error.code, error.retryable) == ("upstream_aborted", True)
    assert reason in error.message


@pytest.mark.parametrize(
    "reason",
    [
        "stop", "length", "tool_calls", "function_call", "content_filter", "repetition", "eos_token", "stop_sequence",
        "STOP", "Length", "MAX_TOKENS", "end_turn", "model_length",
    ],
)  # fmt: skip
def test_good_finish_reasons_are_known(reason: str) -> None:
    parser, _ = parsed(chunk({"content": "a"}, reason))
    parser.check_complete()
    assert (parser.finish_reason, parser.unknown_reason) == (reason, "")


@pytest.mark.parametrize("reason", ["because", "unknown", "room", "boom"])
def test_an_unknown_finish_reason_ends_the_answer_and_is_reported(reason: str) -> None:
    parser, published = parsed(chunk({"content": "a"}), chunk({}, reason))
    parser.check_complete()
    assert (parser.finish_reason, parser.unknown_reason, Answer(published).finish_reason) == (reason, reason, reason)


@pytest.mark.parametrize("reason", ["null", "none", "not_finished"])
def test_a_word_for_no_finish_reason_does_not_end_the_answer(reason: str) -> None:
    assert error_of(chunk({"content": "a"}, reason), chunk({"content": "b"}, reason)).code == "upstream_truncated"


@pytest.mark.parametrize("more", [
    {"content": "b"}, {"reasoning": "b"}, {"tool_calls": [{"id": "x"}]},
    {"refusal": "b"}, {"content": [{"type": "text", "text": "b"}]}, {"function_call": {"name": "f"}},
])  # fmt: skip
@pytest.mark.parametrize("done", [True, False])
def test_text_after_a_finish_reason_continues_the_answer(more: Object, done: bool) -> None:  # noqa: FBT001 - a parameter
    both = [chunk({"content": "a"}, "stop"), chunk(more)]
    assert error_of(*both, done=done).code == "upstream_truncated"
    assert error_of(*both, chunk(more), done=done).code == "upstream_truncated"
    assert not Answer(parsed(*both, done=done)[1]).finished(1)
    parser, _ = parsed(*both, chunk({}, "length"), done=done)
    parser.check_complete()
    assert parser.finish_reason == "length"


@pytest.mark.parametrize("late", [{}, {"content": ""}, {"content": None}, {"annotations": [1]}])
def test_fields_without_text_may_follow_a_finish_reason(late: Object) -> None:
    parsed(chunk({"content": "a"}, "stop"), chunk(late), done=False)[0].check_complete()


@pytest.mark.parametrize("done", [True, False])
def test_every_choice_must_finish(done: bool) -> None:  # noqa: FBT001 - a parameter of the test
    both = [chunk({"content": "a"}, index=0), chunk({"content": "b"}, index=1)]
    assert error_of(*both, chunk({}, "stop", index=0), n=2, done=done).code == "upstream_truncated"
    parser, published = parsed(*both, chunk({}, "length", index=1), chunk({}, "stop", index=0), n=2, done=done)
    parser.check_complete()
    assert parser.finish_reason == "stop"
    assert [choice.finish_reason for choice in Answer(published).choices] == ["stop", "length"]


def test_an_answer_of_a_server_that_ignores_n_is_whole_after_done() -> None:
    parser, _ = parsed(chunk({"content": "a"}, "stop"), n=2)
    parser.check_complete()
    assert error_of(chunk({"content": "a"}, "stop"), n=2, done=False).code == "upstream_truncated"


def test_a_huge_n_costs_nothing() -> None:
    parser, published = parsed(chunk({"content": "a"}, "stop"), n=2**62, done=False)
    assert not parser.is_complete
    assert not Answer(published).finished(2**62)


def test_events_after_done_are_ignored() -> None:
    parser, published = parsed(chunk({"content": "a"}, "stop"), b"[DONE]", chunk({"content": "more"}), b"{not json")
    assert Answer(published).text == "a"
    parser.check_complete()


def test_empty_data_is_ignored() -> None:
    assert parsed(b"", chunk({"content": "a"}, "stop"), b"")[1] == parsed(chunk({"content": "a"}, "stop"))[1]


# Shapes of other servers


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"index": 0}]},
        {"choices": [{"index": 0, "delta": None}]},
        {"choices": [{"index": 3, "delta": {}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": None, "tool_calls": None, "reasoning": None}, "finish_reason": ""}]},
        {"choices": [{"delta": {"content": "", "tool_calls": [], "refusal": None}, "logprobs": None, "token_ids": []}]},
        {"error": None, "choices": []},
        {"error": "", "usage": None, "x": None, "y": {}, "z": []},
    ],
)
def test_an_empty_chunk_makes_no_entry(nothing: Object) -> None:
    parser, published = parsed(nothing)
    assert (published, parser.has_delta, parser.usage, parser.extra) == ([], False, {}, {})


def test_a_missing_or_null_index_is_the_first() -> None:
    published = parsed(
        {"choices": [{"delta": {"content": "a"}}]}, {"choices": [{"index": None, "delta": {"content": "b"}}]}
    )
    assert Answer(published[1]).text == "ab"


def test_text_may_come_in_the_finish_chunk_and_in_the_role_chunk() -> None:
    parser, published = parsed(chunk({"role": "assistant", "content": "a"}), chunk({"content": "b"}, "stop"))
    assert Answer(published).text == "ab"
    assert isinstance(published[-1], Delta)
    assert (published[-1].content, published[-1].finish_reason) == ("b", "stop")
    parser.check_complete()


def test_a_role_in_every_chunk_is_published_once() -> None:
    published = parsed(*(chunk({"role": "assistant", "content": text}) for text in "abc"))[1]
    assert [entry.type for entry in published] == ["opened", "delta", "delta", "delta"]


def test_a_head_that_changes_is_published_again() -> None:
    published = parsed(chunk({"content": "a"}), chunk({"content": "b"}) | {"model": "other"})[1]
    assert [entry.model for entry in published if isinstance(entry, Opened)] == ["reciter", "other"]


@pytest.mark.parametrize("delta", [{"reasoning_content": "why"}, {"reasoning": "why", "reasoning_content": "why"}])
def test_reasoning_is_read_under_two_names(delta: Object) -> None:
    entry = only_delta(chunk(delta))
    assert (entry.reasoning, entry.content, entry.extra) == ("why", "", {})


def test_two_different_reasonings_are_both_kept() -> None:
    entry = only_delta(chunk({"reasoning": "one", "reasoning_content": "two"}))
    assert (entry.reasoning, entry.extra) == ("one", {"delta": {"reasoning_content": "two"}})


def test_content_that_is_not_text_goes_to_extra() -> None:
    parts = [{"type": "text", "text": "a"}]
    entry = only_delta(chunk({"content": parts}))
    assert (entry.content, entry.extra) == ("", {"delta": {"content": parts}})


@pytest.mark.parametrize("beside", [{}, {"delta": None}, {"delta": {}}])
def test_a_message_may_stand_for_the_delta(beside: Object) -> None:
    whole = {"choices": [{"message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"} | beside]}
    parser, published = parsed(whole, done=False)
    assert (Answer(published).text, Answer(published).finish_reason) == ("a", "stop")
    parser.check_complete()


def test_a_message_beside_a_delta_goes_to_extra() -> None:
    entry = only_delta(chunk({"content": "a"}, message={"content": "all so far: a"}))
    assert (entry.content, entry.extra) == ("a", {"message": {"content": "all so far: a"}})


def test_tool_calls_without_an_index_are_put_together() -> None:
    first = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
    pieces = [[first], [{"function": {"arguments": '":1}'}}], [{"id": "call-2", "function": {"name": "g"}}]]
    choice = Answer(parsed(*(chunk({"tool_calls": piece}) for piece in pieces))[1]).choices[0]
    assert [call["function"] for call in choice.tool_calls] == [{"name": "f", "arguments": '{"a":1}'}, {"name": "g"}]


def test_separators_inside_the_text_stay() -> None:
    text = "a\u2028b\u2029c\u0085d\x0be"
    assert only_delta(chunk({"content": text})).content == text


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    entry = only_delta(rb'{"choices":[{"delta":{"content":"\ud83da"},"logprobs":{"content":[{"token":"\ude42"}]}}]}')
    assert (entry.content, entry.logprobs) == ("?a", {"content": [{"token": "?"}]})
    ended = rb'{"choices":[{"delta":{"content":"a\ud83d"},"finish_reason":"stop"}]}'
    assert only_delta(ended).content == "a?"
    assert only_delta(rb'{"choices":[{"delta":{"content":"\ud83d\ude42"}}]}').content == "🙂"
    assert only_delta(rb'{"choices":[{"delta":{"content":"a"},"odd":"\ud83d"}]}').extra == {"odd": "?"}


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    entry = only_delta(b'{"choices":[{"delta":{"content":"a\xff\xe4\xb8"},"odd":"\xfe"}]}')
    assert (entry.content, entry.extra) == ("a\ufffd\ufffd", {"odd": "\ufffd"})


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity"])
def test_numbers_that_json_does_not_know_become_null(value: bytes) -> None:
    entry = only_delta(b'{"choices":[{"delta":{"content":"a"},"logprobs":{"content":[{"logprob":%b}]}}]}' % value)
    assert (entry.content, entry.logprobs) == ("a", {"content": [{"logprob": None}]})


@pytest.mark.parametrize(
    "data",
    [
        b'{"choices":[{"index":0,"del',
        b"not json",
        b" ",
        b'{"choices":[{"delta":{"content":"a line\nfeed"}}]}',
        b"<html>",
        b"[]",
        b"null",
        b'"text"',
        b"17",
        b'{"choices":{}}',
        b'{"choices":"a"}',
        b'{"choices":["a"]}',
        b'{"choices":[{"delta":"a"}]}',
        b'{"choices":[{"delta":{"tool_calls":{}x}}]}',
        b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"odd":' + b"[" * 100_000,
    ],
)
def test_data_that_is_not_a_chunk_is_a_retryable_error(data: bytes) -> None:
    error = error_of(data)
    assert (error.code, error.retryable, error.status) == ("upstream_malformed", True, 0)
    assert len(error.message) < 300


@pytest.mark.parametrize("created", [1.5, "yesterday", 1e300, -1])
def test_a_time_that_is_not_an_integer_goes_to_extra(created: object) -> None:
    published = parsed(*[chunk({"content": "a"}) | {"created": created}] * 2)[1]
    opened = published[0]
    assert isinstance(opened, Opened)
    assert (opened.created, opened.extra) == (0, {"created": created})
    assert [entry.type for entry in published] == ["opened", "delta", "delta"]


@pytest.mark.parametrize(
    ("event", "code", "status", "message"),
    [
        ({"error": "out of memory"}, "upstream_error", 500, "out of memory"),
        ({"error": {"message": "bad top_k", "code": 400}}, "invalid_request", 400, "bad top_k"),
        ({"error": {"message": "slow down", "code": "429"}}, "rate_limited", 429, "slow down"),
        ({"error": {"message": "no", "code": "9" * 5000}}, "upstream_error", 500, "no"),
        ({"error": {"code": 503}}, "upstream_unavailable", 503, '{"code":503}'),
        ({"error": ["a", "b"]}, "upstream_error", 500, '["a","b"]'),
        ({"error": True}, "upstream_error", 500, 'the server sent an error without a message: {"error":true}'),
        ({"object": "error", "message": "bad", "code": 400}, "invalid_request", 400, "bad"),
        ({"choices": [], "error": {"message": "late", "code": 500}}, "upstream_error", 500, "late"),
    ],
)
def test_an_error_event_is_an_error_in_each_of_its_shapes(event: Object, code: str, status: int, message: str) -> None:
    error = error_of(chunk({"content": "a"}), event)
    assert (error.code, error.status, error.message) == (code, status, message)
    assert error.retryable == (status >= 429)


def test_fields_of_other_names_are_kept_at_every_level() -> None:
    published = parsed(
        chunk({"content": "a", "audio": {"id": "x"}}, odd=[1]) | {"system_fingerprint": "f", "service_tier": "fast"},
        chunk({"content": "b"}) | {"system_fingerprint": "f", "service_tier": "slow"},
    )[1]
    opened, first, second = published
    assert isinstance(opened, Opened)
    assert isinstance(first, Delta)
    assert isinstance(second, Delta)
    assert opened.extra == {"system_fingerprint": "f", "service_tier": "fast"}
    assert first.extra == {"odd": [1], "delta": {"audio": {"id": "x"}}}
    assert second.extra == {"chunk": {"service_tier": "slow"}}


def test_a_choice_with_only_unknown_fields_makes_an_entry() -> None:
    assert only_delta({"choices": [{"delta": {}, "odd": 0}]}).extra == {"odd": 0}
    assert only_delta({"choices": [{"delta": {"refusal": "no"}}]}).extra == {"delta": {"refusal": "no"}}


def test_fields_of_chunks_without_a_choice_go_to_the_terminal_entry() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    last = {"choices": [], "usage": usage, "system_fingerprint": "f", "timings": {"ms": 1}}
    parser, published = parsed(chunk({"content": "a"}, "stop"), last)
    assert [entry.type for entry in published] == ["opened", "delta"]
    assert (parser.usage, parser.extra) == (usage, {"system_fingerprint": "f", "timings": {"ms": 1}})


def test_an_answer_over_several_lines_is_read_as_one_on_one_line() -> None:
    one = chunk({"content": "a", "tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}, "stop", odd={"x": [1]})
    assert parsed(json.dumps(one, indent=2).encode())[1] == parsed(one)[1]


# Chunks at random

"""Resuming: the part of an answer that is kept, requests that cannot be resumed, and stop strings across the break."""

from typing import Any, cast

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.contract.answer import Answer
from worker.contract.entries import JSON, Delta, Opened, Resumed, parse
from worker.contract.ids import EntryId
from worker.vllm.chunks.shapes import digest_of_prompt
from worker.vllm.errors import CannotResume
from worker.vllm.resume.plan import KeptAnswer, ResumePlan, keep_answer, why_not_resumable
from worker.vllm.resume.resume import plan_resume
from worker.vllm.resume.resumed_chunks import ResumedChunkParser
from worker.vllm.resume.stop_strings import StopStrings
from worker.vllm.servers.pool import CHAT, COMPLETIONS, ServerPool
from worker.vllm.servers.server import Server

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Who are you?"}]}
PROMPT = [1, 2, 3]


def delta(n: int, content: str = "", *tokens: int, **more: Any) -> Delta:  # noqa: ANN401 - any field
    return Delta(id=EntryId(1, n), content=content, token_ids=list(tokens), **more)


def kept(*tokens: int, content: str = "text", plain: bool = True) -> KeptAnswer:
    return KeptAnswer(EntryId(1, 9), list(tokens), 1, content, plain)


def chunk(content: str, *tokens: int, prompt: list[int] | None = None, **choice: Any) -> bytes:  # noqa: ANN401 - any field
    body: dict[str, Any] = {"index": 0, "delta": {"content": content}, "token_ids": list(tokens), **choice}
    return msgspec.json.encode({"id": "x", "choices": [body]} | ({"prompt_token_ids": prompt} if prompt else {}))


def test_tokens_after_the_last_text_are_not_kept() -> None:
    deltas = [delta(2, "S", 10), delta(3, "", 11), delta(4, "u", 12), delta(5, "", 13), delta(6, "", 14)]
    assert keep_answer(deltas) == KeptAnswer(EntryId(1, 4), [10, 11, 12], 1, "Su", is_plain=True)


def test_without_text_only_the_entries_before_the_deltas_are_kept() -> None:
    assert keep_answer([delta(2, "", 10), delta(3, "", 11)]) == KeptAnswer(EntryId(1, 1), [], 0, "", is_plain=True)


def test_reasoning_is_text_but_not_plain() -> None:
    found = keep_answer([delta(2, "", 10, reasoning="Hm"), delta(3, "", 11)])
    assert (found.token_ids, found.is_plain, found.after) == ([10], False, EntryId(1, 2))


@pytest.mark.parametrize(
    ("deltas", "why"),
    [
        ([delta(2, "a")], "no token ids"),
        ([delta(2, "a", 10, index=1)], "more than text: index$"),
        ([delta(2, "", 10, tool_calls=[{"index": 0}])], "more than text: tool_calls$"),
        ([delta(2, "a", 10, extra={"delta": {"refusal": "no"}})], "more than text: refusal$"),
        ([delta(2, "a", 10, extra={"delta": {"foo": 1, "bar": 2}})], "more than text: foo, bar$"),
        ([delta(2, "a", 10, extra={"delta": None})], "more than text: delta$"),
        ([delta(2, "a", 10, extra={"delta": {"x" * 1000: 1}})], "more than text: x{200}$"),
    ],
)
def test_a_delta_that_cannot_be_turned_into_a_prompt_cannot_be_resumed(deltas: list[Delta], why: str) -> None:
    with pytest.raises(CannotResume, match=why):
        keep_answer(deltas)


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a+"}},
        {"n": 2},
        {"echo": True},
        {"prompt_logprobs": 1},
        {"truncate_prompt_tokens": 10},
        {"max_tokens": 50.0},
        {"max_completion_tokens": "50"},
        {"min_tokens": 5.0},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    ],
)
def test_the_reason_why_a_request_cannot_be_resumed_is_named(field: dict[str, Any]) -> None:
    assert why_not_resumable(ASKED | field)


@pytest.mark.parametrize(
    "field",
    [
        {},
        {"max_tokens": None, "max_completion_tokens": 50, "min_tokens": 0},
        {"n": 1, "tools": [], "response_format": {"type": "text"}, "stop": ["x"], "logprobs": True, "seed": 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}]},
        {"messages": [{"role": "assistant", "content": None}, {"role": "user"}]},
    ],
)
def test_these_requests_can_be_resumed(field: dict[str, Any]) -> None:
    assert not why_not_resumable(ASKED | field)


def test_the_limits_of_tokens_count_the_kept_tokens() -> None:
    plan = ResumePlan(ASKED | {"max_tokens": 10, "min_tokens": 5}, kept(7, 8), [*PROMPT, 7, 8], context_left=100)
    (chat, body), (completions, plain) = plan.requests
    assert (chat, completions) == (CHAT, COMPLETIONS)
    assert body == ASKED | {
        "max_tokens": 8, "min_tokens": 3, "kv_transfer_params": {"prompt_token_ids": [*PROMPT, 7, 8]}
    }  # fmt: skip
    assert plain == {"max_tokens": 8, "min_tokens": 3, "prompt": [*PROMPT, 7, 8]}


def test_without_a_limit_both_routes_may_fill_the_room_of_the_model() -> None:
    (_, body), (_, plain) = ResumePlan(ASKED, kept(7), [*PROMPT, 7], context_left=100).requests
    assert "max_tokens" not in body
    assert plain["max_tokens"] == 100


@pytest.mark.parametrize(
    "plan",
    [
        ResumePlan(ASKED, kept(7, plain=False), [*PROMPT, 7], context_left=9),
        ResumePlan(ASKED | {"logprobs": True}, kept(7), [*PROMPT, 7], context_left=9),
        ResumePlan(ASKED, kept(7), [*PROMPT, 7]),
    ],
    ids=["reasoning", "logprobs", "no limit known"],
)
def test_the_completions_route_is_for_plain_text(plan: ResumePlan) -> None:
    assert [route for route, _ in plan.requests] == [CHAT]


def test_with_nothing_kept_the_request_is_sent_as_it_is() -> None:
    assert list(ResumePlan(ASKED, kept(), []).requests) == [(CHAT, ASKED)]


@pytest.mark.parametrize(
    ("asked", "context_left", "over"), [({"max_tokens": 2}, 9, True), ({"max_tokens": 3}, 9, False), ({}, 0, True)]
)
def test_a_plan_without_tokens_left_is_exhausted(asked: dict[str, Any], context_left: int, *, over: bool) -> None:
    assert ResumePlan(ASKED | asked, kept(7, 8), [*PROMPT, 7, 8], context_left=context_left).is_exhausted is over


def parser_for(asked: dict[str, Any], held: str = "", content: str = "text") -> ResumedChunkParser:
    plan = ResumePlan(ASKED | asked, kept(7, 8, content=content), [*PROMPT, 7, 8], held)
    return ResumedChunkParser(plan, n=1, keep_prompt_ids=True, keep_usage=False)


def test_the_first_chunk_proves_that_the_server_goes_on() -> None:
    parser = parser_for({"presence_penalty": 0.5})
    resumed, opened, first = parser.parse(chunk("new", 9, prompt=[*PROMPT, 7, 8]))
    assert parser.needs_next_attempt, "it has written"
    assert parse("2-1", resumed) == Resumed(id=EntryId(2, 1), after="1-9", forgets=["presence_penalty"])
    assert (opened["prompt_tokens"], opened["prompt_digest"]) == ("3", digest_of_prompt(PROMPT))
    assert msgspec.json.decode(opened["extra"]) == {"prompt_token_ids": PROMPT}
    assert first == {"type": "delta", "content": "new", "token_ids": "[9]"}
    parser.parse(b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":1,"total_tokens":6}}')
    assert parser.usage == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


@pytest.mark.parametrize("prompt", [PROMPT, None], ids=["other ids", "no ids"])
def test_a_server_that_ignores_the_ids_writes_nothing(prompt: list[int] | None) -> None:
    parser = parser_for({})
    with pytest.raises(CannotResume):
        parser.parse(chunk("text", 9, prompt=prompt))
    assert not parser.needs_next_attempt


def test_chunks_of_a_text_completion_are_read_as_those_of_a_chat() -> None:
    parser = parser_for({})
    choice: dict[str, Any] = {"index": 0, "text": "new", "logprobs": None, "finish_reason": None, "token_ids": [9]}
    first = {"id": "x", "choices": [choice | {"prompt_token_ids": [*PROMPT, 7, 8]}]}
    _, opened, new = parser.parse(msgspec.json.encode(first))
    assert (opened["role"], new) == ("assistant", {"type": "delta", "content": "new", "token_ids": "[9]"})
    end = choice | {"text": "", "finish_reason": "stop", "stop_reason": None, "token_ids": [2]}
    (last,) = parser.parse(msgspec.json.encode({"id": "x", "choices": [end]}))
    assert (last["finish_reason"], parser.is_complete) == ("stop", True)


def test_a_stop_string_across_the_break_ends_the_answer() -> None:
    parser = parser_for({"stop": ["END"]}, held="E", content="some text ")
    _, _, first = parser.parse(chunk("N", 9, prompt=[*PROMPT, 7, 8]))
    assert "content" not in first
    (second,) = parser.parse(chunk("D and more", 10))
    assert second == {"type": "delta", "token_ids": "[10]", "finish_reason": "stop", "stop_reason": '"END"'}
    assert (parser.done, parser.is_complete, parser.finish_reason) == (True, True, "stop")
    assert parser.usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert parser.parse(chunk("nothing comes after it", 11)) == []


@given(
    text=st.lists(st.text("ab", max_size=3), max_size=8),
    cut=st.integers(0, 8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2),
    include=st.booleans(),
)
# Less text was published than the stop string is long
@example(text=["aa", "aa"], cut=1, stops=["aaaa"], include=True)
def test_a_cut_does_not_show_in_the_published_text(
    text: list[str], cut: int, stops: list[str], *, include: bool
) -> None:
    """The reference is a server that, as vLLM does, holds back text that may become a stop string."""
    whole, stopped = served(text, stops, include=include, last=False)
    whole += served(text, stops, include=include)[0][len(whole) :]
    before, ended = served(text[:cut], stops, include=include, last=False)
    if ended:
        return
    finder = StopStrings(
        {"stop": list[JSON](stops), "include_stop_str_in_output": include}, before, "".join(text[:cut])[len(before) :]
    )
    shown, count = before, cut
    for piece in text[cut:]:
        fields = {"type": "delta"} | ({"content": piece} if piece else {})
        shown += finder.apply(fields).get("content", "")
        count += 1
        if finder.found:
            break
    else:
        shown += finder.apply({"type": "delta", "finish_reason": "length"}).get("content", "")
    assert shown == whole
    assert finder.found is stopped
    if stopped:
        assert count == len(pieces(text, stops, include=include)), "it ends with the same token"


def served(text: list[str], stops: list[str], *, include: bool, last: bool = True) -> tuple[str, bool]:
    """The text that a server sends for these tokens, and whether a stop string ended it."""
    sent = list(pieces(text, stops, include=include, last=last))
    return "".join(piece for piece, _ in sent), bool(sent and sent[-1][1]) and not last


def pieces(text: list[str], stops: list[str], *, include: bool, last: bool = True) -> list[tuple[str, bool]]:
    """The text of each chunk, and whether it is the last one; without `last` the answer would go on."""
    whole, sent = "", 0
    chunks: list[tuple[str, bool]] = []
    hold = 0 if include else max(map(len, stops)) - 1
    for token in text:
        seen = len(whole)
        whole += token
        ends = [
            (start + len(stop), rank)
            for rank, stop in enumerate(stops)
            if (start := whole.find(stop, max(0, seen - len(stop) + 1))) >= 0
        ]
        if ends:
            end, rank = min(ends)
            return [*chunks, (whole[sent : end if include else end - len(stops[rank])], True)]
        upto = max(sent, len(whole) - hold)
        chunks.append((whole[sent:upto], False))
        sent = upto
    return [*chunks, (whole[sent:], True)] if last else chunks


class Tokenizer:
    """A pool whose server tokenizes as a SentencePiece model does: the text of whole tokens has no space before it."""

    async def post(self, _server: object, path: str, _body: object, *, caller: object) -> bytes:
        assert caller is None
        return msgspec.json.encode({"tokens": PROMPT} if path == "/tokenize" else {"prompt": "Hi there"})


async def test_a_space_that_only_the_stream_has_before_the_first_word_does_not_prevent_a_resume() -> None:
    opened = Opened(id=EntryId(1, 1), model="m", prompt_digest=digest_of_prompt(PROMPT))
    history = Answer([opened, delta(2, " Hi", 10), delta(3, " the", 11)])
    plan = await plan_resume(cast("ServerPool", Tokenizer()), cast("Server", None), ASKED | {"stop": ["END"]}, history)
    assert plan.prompt_ids == [*PROMPT, 10, 11]
    assert plan.withheld == "re"

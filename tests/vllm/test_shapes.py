"""Whole streams of other servers, as bytes, and the answer that a reader of the log gets from them.

A new shape is a line of the table. Where openai's own client gets it right, what it gets is compared as well.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai_reading import content_of, read_by_openai

from worker.contract import entries
from worker.contract.answer import Answer, Choice
from worker.contract.ids import EntryId
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.stream.sse import SSEDecoder

Object = dict[str, Any]


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(delta: object, finish_reason: object = None, **choice: object) -> Object:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
    said = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason} | choice
    return head | {"choices": [said]}


def x(delta: object, finish_reason: object = None, **choice: object) -> bytes:
    return event(chunk(delta, finish_reason, **choice))


def without_delta(finish_reason: object = None, **choice: object) -> bytes:
    value = chunk(None, finish_reason, **choice)
    del value["choices"][0]["delta"]
    return event(value)


COMPARED = frozenset({"content", "reasoning", "tool_calls", "finish_reason"})
ROLE = x({"role": "assistant", "content": ""})
DONE = b"data: [DONE]\n\n"
END = x({}, "stop") + DONE
CALL: list[Any] = [{"index": 0, "id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
HI: Object = {"role": "assistant", "content": "hi"}


def call(arguments: str, index: int = 0) -> Object:
    return {"index": index, "function": {"name": "f", "arguments": arguments}}


def more(arguments: str, index: int = 0) -> Object:
    return {"index": index, "function": {"arguments": arguments}}


@dataclass(frozen=True)
class Shape:
    """A stream, and its content. `openai`: whether openai's client gets the same content, reasoning and calls."""

    name: str
    body: bytes
    content: str = ""
    openai: bool = True
    reasoning: str = ""
    tool_calls: list[Object] = field(default_factory=list)
    finish_reason: str = "stop"
    token_ids: list[int] = field(default_factory=list)
    extra: list[Object] = field(default_factory=list)
    """The `extra` of each delta that has one."""


SHAPES = [
    Shape("a tool call beside an empty text", ROLE + x({"tool_calls": CALL}, text="") + END, tool_calls=CALL),
    Shape("content beside an empty text", ROLE + x({"content": "hi"}, text="") + END, "hi"),
    Shape("content beside a text of null", ROLE + x({"content": "hi"}, text=None) + END, "hi"),
    Shape("reasoning beside a text", x({"reasoning": "r"}, text="t") + END, reasoning="r", extra=[{"text": "t"}]),
    Shape("a text that repeats the delta", x({"content": "a"}, text="a") + x({"content": "b"}, text="b") + END, "ab"),
    Shape(
        "a text of all so far",
        ROLE + x({"content": "a"}, text="a") + x({"content": "b"}, text="ab") + x({"content": "c"}, text="abc") + END,
        "abc",
    ),
    Shape(
        "a text of all at the end",
        ROLE + x({"content": "a"}) + x({}, "stop", text="a") + DONE,
        "a",
        extra=[{"text": "a"}],
    ),
    Shape("a text without a delta", without_delta(text="a") + without_delta("stop", text="b") + DONE, "ab", False),
    Shape("a text beside a delta of null", x(None, text="a") + x(None, "stop", text="b") + DONE, "ab", False),
    Shape(
        "a closing frame with the whole message",
        ROLE + x({"content": "h"}) + x({"content": "i"}) + without_delta("stop", message=HI) + DONE,
        "hi",
        openai=False,  # it fails: the last choice has no delta
        extra=[{"message": HI}],
    ),
    Shape(
        "the whole message beside a delta of null",
        ROLE + x({"content": "hi"}) + x(None, "stop", message=HI) + DONE,
        "hi",
        openai=False,  # its stream helper fails, its chunks have the right content
        extra=[{"message": HI}],
    ),
    Shape(
        "the whole message beside an empty delta",
        ROLE + x({"content": "hi"}) + x({}, "stop", message=HI) + DONE,
        "hi",
        extra=[{"message": HI}],
    ),
    Shape(
        "the whole message after a tool call",
        ROLE + x({"tool_calls": CALL}) + x({}, "tool_calls", message={"tool_calls": CALL}) + DONE,
        tool_calls=CALL,
        finish_reason="tool_calls",
        extra=[{"message": {"tool_calls": CALL}}],
    ),
    Shape("a message alone", without_delta("stop", message=HI) + DONE, "hi", openai=False),
    Shape("a message after a role", ROLE + x({}, "stop", message=HI) + DONE, "hi", openai=False),
    Shape(
        "a message beside a role",
        x({"role": "assistant", "content": ""}, "stop", message=HI) + DONE,
        "hi",
        openai=False,
    ),
    Shape(
        "messages that are pieces",
        b"".join(without_delta(message={"role": "assistant", "content": text}) for text in "hey") + END,
        "hey",
        openai=False,
    ),
    Shape(
        "messages that are pieces, and the whole of them",
        b"".join(x({}, message={"content": text}) for text in "hi") + x({}, "stop", message=HI) + DONE,
        "hi",
        openai=False,
        extra=[{"message": HI}],
    ),
    Shape(
        "messages of all so far",
        b"".join(x(None, message={"reasoning": "r", "content": text}) for text in ("", "h", "hi", "hi")) + END,
        "hi",
        openai=False,
        reasoning="r",
        extra=[{"message": {"reasoning": "r", "content": "hi"}}],
    ),
    Shape(
        "a message with a tool call, twice",
        x({}, message={"tool_calls": CALL}) + x({}, "stop", message={"tool_calls": CALL}) + DONE,
        tool_calls=CALL,
        openai=False,
        extra=[{"message": {"tool_calls": CALL}}],
    ),
    Shape(
        "a message after a message and a delta",
        x({}, message={"content": "h"}) + x({"content": "i"}) + x({}, "stop", message=HI) + DONE,
        "hi",
        openai=False,
        extra=[{"message": HI}],
    ),
    Shape(
        "a message that is a text",
        ROLE + x({"content": "hi"}) + x({}, "stop", message="done") + DONE,
        "hi",
        extra=[{"message": "done"}],
    ),
    Shape(
        "a message of another choice",
        x({"content": "hi"}) + x({}, "stop") + x({}, "stop", message=HI, index=1) + DONE,
        "hi",
    ),
    Shape(
        "an object as tool calls",
        ROLE + x({"content": "a", "tool_calls": {"id": "x"}}) + x({"content": "b"}) + END,
        "ab",
        openai=False,
        extra=[{"delta": {"tool_calls": {"id": "x"}}}],
    ),
    Shape(
        "text as tool calls",
        ROLE + x({"content": "a", "tool_calls": "x"}) + END,
        "a",
        openai=False,
        extra=[{"delta": {"tool_calls": "x"}}],
    ),
    Shape(
        "null, text and an empty call among tool calls",
        ROLE + x({"content": "a", "tool_calls": [None, *CALL, "x", {}]}) + END,
        "a",
        openai=False,
        tool_calls=CALL,
        extra=[{"delta": {"tool_calls": ["x"]}}],
    ),
    Shape("nothing but null as tool calls", ROLE + x({"content": "a", "tool_calls": [None]}) + END, "a", False),
    *(
        Shape(
            f"{ids} as token ids",
            ROLE + x({"content": "a"}, token_ids=ids) + x({"content": "b"}, token_ids=[2]) + END,
            "ab",
            extra=[{"token_ids": ids}],
            token_ids=[2],
        )
        for ids in ([[1]], [1.5], [1.0], ["1"], [None], [True], "1", 1, {"a": 1})
    ),
    *(
        Shape(
            f"{ids} as the prompt's token ids",
            event(chunk({"content": "a"}) | {"prompt_token_ids": ids}) * 2 + END,
            "aa",
        )
        for ids in ("1 2", [[1]], [0.5], {"a": 1}, 7)
    ),
    *(
        Shape(
            f"{reason} as finish reason",
            ROLE + x({"content": "a"}) + x({}, reason) + DONE,
            "a",
            openai=False,
            extra=[{"finish_reason": reason}],
        )
        for reason in ({"type": "stop"}, {"reason": "stop", "at": 3})
    ),
    Shape("an index that is text", x({"content": "a"}, index="0") + END, "a", openai=False),
    Shape(
        "an index that is none",
        x({"content": "a"}, index="first") + x({"content": "b"}, index=[1]) + x({"content": "c"}, index=1.5) + END,
        "abc",
        openai=False,
        extra=[{"index": "first"}, {"index": [1]}, {"index": 1.5}],
    ),
    *(
        Shape(
            f"{usage} as usage",
            event(chunk({"content": "a"}) | {"usage": usage}) + END,
            "a",
            openai=False,
        )
        for usage in (7, "7", [7])
    ),
    Shape("an empty list as delta", ROLE + x([]) + x({"content": "a"}) + x([], "stop") + DONE, "a", openai=False),
    *(
        Shape(f"no blank line at the end but {end!r}", ROLE + x({"content": "a"}, "stop").rstrip() + end, "a", False)
        for end in (b"", b"\n", b"\r", b"\r\n")
    ),
    Shape(
        "several chunks in one event",
        ROLE + b"".join(x({"content": text})[:-1] for text in "abc") + END,
        "abc",
        openai=False,
    ),
    Shape(
        "several chunks in one event, and the end",
        ROLE + x({"content": "a"})[:-1] + x({}, "stop")[:-1] + DONE,
        "a",
        openai=False,
    ),
    Shape("halves of a character", ROLE + x({"content": "a\ud83d"}) + x({"content": "\ude42b"}) + END, "a🙂b"),
    Shape(
        "halves of a character with nothing between",
        ROLE + x({"content": "\ud83d"}) + x({"content": ""}) + x({}) + x({"content": "\ude42"}, "stop") + DONE,
        "🙂",
    ),
    Shape(
        "halves of many characters",
        ROLE + b"".join(x({"content": half}) for half in "\ud83d\ude42" * 3) + x({"content": "b"}) + END,
        "🙂🙂🙂b",
    ),
    Shape(
        "halves of a character of the reasoning",
        ROLE + x({"reasoning": "a\ud83d"}) + x({"reasoning": "\ude42"}) + x({"content": "b"}) + END,
        "b",
        reasoning="a🙂",
    ),
    Shape(
        "halves of a character of a tool call",
        ROLE
        + x({"tool_calls": [call("\ud83d"), call("\ud83c", 1)]})
        + x({"tool_calls": [more("\udf0a", 1), more("\ude42")]})
        + END,
        tool_calls=[call("🙂"), call("🌊", 1)],
    ),
    Shape(
        "half a character and no other",
        ROLE + x({"content": "a\ud83d"}) + x({"content": "b"}) + x({"content": "\ude42"}) + END,
        "a?b?",
        openai=False,
    ),
    Shape("half a character at the end", ROLE + x({"content": "a\ud83d"}) + END, "a?", openai=False),
    Shape(
        "half a character at the end, beside no delta",
        ROLE + x({"content": "a\ud83d"}) + x(None, "stop") + DONE,
        "a?",
        openai=False,
    ),
    Shape(
        "half a character at the end, beside what is no text",
        ROLE + x({"content": "a\ud83d"}) + x({"content": [1]}, "stop") + DONE,
        "a",
        openai=False,
        extra=[{"delta": {"content": [1]}}],
    ),
    Shape(
        "halves of a character without a delta",
        without_delta(text="\ud83d") + without_delta("stop", text="\ude42") + DONE,
        "🙂",
        openai=False,
    ),
    *(
        Shape(
            f"{number[:9]} as a number",
            (ROLE + x({"content": "a"}, odd="NUMBER", logprobs={"content": [{"logprob": "NUMBER"}]}) + END).replace(
                b'"NUMBER"', number.encode()
            ),
            "a",
            openai=len(number) < 309,
            extra=[] if value is None else [{"odd": value}],
        )
        for number, value in (
            ("-1e999", None),
            ("1E400", None),
            ("9" * 5000, None),
            ("9" * 400, None),
            ("9" * 301, None),
            ("NaN", None),
            ("-Infinity", None),
            ("1e-999", 0.0),
            ("1" * 300, int("1" * 300)),
        )
    ),
    Shape(
        "odd heads",
        event(chunk({"role": {"a": 1}, "content": "a"}) | {"id": [1], "model": 7}) + END,
        "a",
        openai=False,
    ),
]


def read(body: bytes) -> tuple[ChunkParser, Answer]:
    """The answer as a reader of the log gets it."""
    parser, answer, decoder = ChunkParser(), Answer(), SSEDecoder()
    fields = [fields for data in decoder.feed(body) + decoder.end() for fields in parser.parse(data)]
    for n, one in enumerate(fields, 1):
        raw = {name.encode(): value.encode() for name, value in one.items()}
        answer.add(entries.parse(str(EntryId(1, n)), raw))
    return parser, answer


def first_of(answer: Answer) -> Choice:
    return next((choice for choice in answer.choices if choice.index == 0), Choice())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_streams_of_other_servers_make_these_entries(shape: Shape) -> None:
    parser, answer = read(shape.body)
    parser.check_complete()
    choice = first_of(answer)
    assert (choice.content, choice.reasoning, choice.tool_calls) == (shape.content, shape.reasoning, shape.tool_calls)
    assert choice.token_ids == shape.token_ids
    assert choice.finish_reason == parser.finish_reason == shape.finish_reason
    assert [delta.extra for delta in answer.deltas if delta.extra] == shape.extra


def joined(message: Object) -> Object:
    """Joins halves of surrogate pairs, which openai's client does not."""
    text = json.dumps(message, ensure_ascii=False)
    together: Object = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16"))
    return together


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.openai], ids=lambda shape: shape.name)
def test_a_stream_of_another_server_is_read_as_openai_reads_it(shape: Shape) -> None:
    (message, *_) = content_of(joined(read_by_openai(shape.body)))
    ours = {"content": shape.content, "reasoning": shape.reasoning, "tool_calls": shape.tool_calls}
    choice = {"message": ours, "finish_reason": shape.finish_reason}
    assert content_of({"choices": [choice]}) == [{name: value for name, value in message.items() if name in COMPARED}]


def test_an_id_and_a_time_that_differ_in_each_chunk_are_published_once() -> None:
    chunks = [chunk({"content": text}) | {"id": f"chatcmpl-{n}", "created": n} for n, text in enumerate("abc", 5)]
    parser = ChunkParser()
    told = [fields for one in chunks for fields in parser.parse(json.dumps(one).encode())]
    head = {"type": "opened", "response_id": "chatcmpl-5", "model": "m", "created": "5"}
    assert told == [head, *({"type": "delta", "content": text} for text in "abc")]


def test_a_model_that_alternates_is_published_twice_at_most() -> None:
    chunks = [chunk({"content": text}) | {"model": "mn"[n % 2]} for n, text in enumerate("abcdef")]
    _, answer = read(b"".join(map(event, chunks)) + END)
    parser = ChunkParser()
    told = [fields for one in chunks for fields in parser.parse(json.dumps(one).encode())]
    assert [fields["model"] for fields in told if fields["type"] == "opened"] == ["m", "n"]
    assert answer.text == "abcdef"


def test_a_fractional_time_that_differs_in_each_chunk_is_published_once() -> None:
    _, answer = read(b"".join(event(chunk({"content": "a"}) | {"created": 1.5 + n}) for n in range(3)))
    assert answer.opened is not None
    assert answer.opened.extra == {"created": 1.5}
    assert [delta.extra for delta in answer.deltas] == [{}, {}, {}]


def test_a_head_that_is_empty_at_first_is_published_when_it_comes() -> None:
    first = {"id": "", "created": 0, "model": "", "object": "", "choices": [], "prompt_filter_results": [1]}
    _, answer = read(event(first) + x({"content": "a"}) + END)
    assert answer.opened is not None
    assert (answer.opened.response_id, answer.opened.created) == ("chatcmpl-1", 1700000000)
    assert answer.opened.extra == {"prompt_filter_results": [1]}


EARLY: Object = {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}
USAGE: Object = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


@pytest.mark.parametrize(
    "body",
    [
        x({"content": "a"}) + x({}, "stop", usage=USAGE) + DONE,
        x({"content": "a"}, usage={"prompt_tokens": 1}) + x({}, "stop", usage=USAGE) + DONE,
        x({"content": "a"}) + x({}, "stop") + DONE + event({"choices": [], "usage": USAGE}),
        x({"content": "a"}) + event(chunk({}, "stop") | {"usage": EARLY}) + DONE + event({"usage": USAGE}),
        x({"content": "a"}, usage=EARLY) + x({}, "stop") + DONE + event({"choices": [{"usage": USAGE}]}),
        x({"content": "a"}) + x({}, "stop") + DONE + event({"usage": USAGE}).rstrip(),
        x({"content": "a"}) + x({}, "stop") + DONE + b"data: {\n\n" + event({"usage": USAGE}),
        x({"content": "a"}) + event(chunk({}, "stop") | {"usage": USAGE}) + DONE + event({"usage": {"odd": 1}}),
    ],
)
def test_usage_is_read_in_a_choice_and_after_done(body: bytes) -> None:
    parser, answer = read(body)
    parser.check_complete()
    assert (answer.text, parser.usage, parser.extra) == ("a", USAGE, {})
    assert [delta.extra for delta in answer.deltas] == [{}, {}]


def test_fields_between_servers_do_not_reach_readers() -> None:
    secret: Object = {"kv_transfer_params": {"remote_host": "10.0.0.1"}, "ec_transfer_params": {"ids": [1]}}
    parser, answer = read(
        event(chunk({"content": "a", **secret}, **secret) | secret)
        + event(chunk({}, "stop") | secret)
        + event({"choices": [], **secret})
        + DONE
    )
    parser.check_complete()
    assert answer.text == "a"
    assert "transfer_params" not in str([answer.opened, answer.deltas, parser.extra])


def test_odd_fields_beside_the_choices_are_kept_once() -> None:
    _, answer = read(event(chunk({"content": "a"}) | {"prompt_token_ids": "1 2", "usage": 7}) * 2 + END)
    assert answer.opened is not None
    assert (answer.opened.extra, answer.opened.prompt_tokens) == ({"prompt_token_ids": "1 2", "usage": 7}, None)
    assert [delta.extra for delta in answer.deltas] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("index", "number"),
    [
        ("0", 0), ("1", 1), ("12", 12), ("0" * 5000, 0), ("-1", 0), ("\u0661", 0),
        (0.0, 0), (1.0, 1), (1.5, 0), (-1, 0), (-1.0, 0), (True, 0),
    ],
)  # fmt: skip
def test_an_index_may_be_text_or_a_float(index: object, number: int) -> None:
    assert [choice.index for choice in read(x({"content": "a"}, index=index))[1].choices] == [number]


@pytest.mark.parametrize(("reason", "text"), [({"at": 3}, '{"at":3}'), (7, "7"), (["stop"], '["stop"]')])
def test_a_finish_reason_that_is_not_text_ends_the_answer(reason: object, text: str) -> None:
    parser, answer = read(x({"content": "a"}) + x({}, reason))
    parser.check_complete()
    assert answer.finish_reason.replace(" ", "") == text


@pytest.mark.parametrize("reason", [False, 0, [], {}, None, ""])
def test_an_empty_finish_reason_does_not_end_the_answer(reason: object) -> None:
    assert not read(x({"content": "a"}, reason))[0].is_complete


@pytest.mark.parametrize(("levels", "kept"), [(40, 40), (90, 90), (300, 97), (900, 97)])
@pytest.mark.parametrize("half", ["", "\ud83d"])
def test_deep_nesting_does_not_make_a_log_unreadable(levels: int, kept: int, half: str) -> None:
    deep = "[" * levels + "1" + "]" * levels
    body = ROLE + x({"content": "a" + half}) + x({"content": half and "\ude42"}, odd="DEEP", also=["DEEP"]) + END
    _, answer = read(body.replace(b'"DEEP"', deep.encode()))
    assert answer.text == ("a🙂" if half else "a")
    (extra,) = [delta.extra for delta in answer.deltas if delta.extra]
    assert isinstance(extra["also"], list)
    for value, most in ((extra["odd"], kept), (extra["also"][0], min(kept, 96))):
        found, inner = 0, value
        while isinstance(inner, list):
            found, (inner,) = found + 1, inner
        assert (found, inner) == (most, 1 if most == levels else None)


@pytest.mark.parametrize("number", ["-1e999", "NaN", "9" * 5000, "9" * 400])
@pytest.mark.parametrize(
    "where",
    [
        {"created": "NUMBER"},
        {"usage": {"prompt_tokens": "NUMBER"}},
        {"odd": ["NUMBER"]},
        {"choices": [{"delta": {"content": "b", "odd": "NUMBER"}}]},
        {"choices": [{"delta": {"content": "b"}, "stop_reason": "NUMBER"}]},
        {"choices": [{"delta": {"content": "b"}, "token_ids": ["NUMBER"]}]},
        {"choices": [{"delta": {"content": "b", "tool_calls": [{"function": {"x": "NUMBER"}}]}}]},
        {"choices": [{"index": "NUMBER", "delta": {"content": "b"}}]},
        {"choices": [{"delta": {"content": "b"}, "finish_reason": "NUMBER"}]},
    ],
)
def test_odd_numbers_do_not_make_a_log_unreadable(where: Object, number: str) -> None:
    body = event(chunk({"content": "a"}) | where).replace(b'"NUMBER"', number.encode())
    parser, answer = read(x({"content": "a"}) + body + END)
    parser.check_complete()
    assert answer.text == ("ab" if "choices" in where else "aa")
    assert json.loads(json.dumps([parser.usage, parser.extra], allow_nan=False))

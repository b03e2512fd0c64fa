"""Streams of servers that do not stream as vLLM does, made by hand: a table of bytes with a row for each stream.

openai's own client and ours read each stream (`tests/contract/test_streams.py`), and both must get the same message.
Where openai's client fails or loses something, the row has the right message.

`x` is the event of one chunk, given its delta, its finish reason, and further fields of the choice.
"""

import json
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """One stream. `group` is the part of the format in which the stream differs (issue 21)."""

    group: str
    shows: str
    body: bytes
    right: Object | None = None
    """The right message if openai's client gets another one or fails; None if it gets the right one.

    It has `finish_reason` (`stop` if left out), `logprobs` and `usage`, and no empty values.
    """

    def __str__(self) -> str:
        return f"{self.group}: {self.shows}"


HEAD: Object = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}


def event(value: object) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def chunk(*choices: Object, **more: object) -> bytes:
    """The event of a chunk with these choices, which must be complete."""
    return event(HEAD | {"choices": list(choices)} | more)


def x(delta: object, finish_reason: object = None, **choice: object) -> bytes:
    """The event of a usual chunk, with one choice."""
    return chunk({"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason} | choice)


def call(name: str | None = "", arguments: str | None = "", **more: object) -> bytes:
    """The event of a chunk with a piece of one tool call."""
    return calls(piece(name, arguments, **more))


def calls(*pieces: object) -> bytes:
    """The event of a chunk with pieces of tool calls."""
    return x({"tool_calls": list(pieces)})


def piece(name: str | None = "", arguments: str | None = "", **more: object) -> Object:
    """A piece of a tool call, or a whole one."""
    return more | {"function": {"name": name, "arguments": arguments}}


def raw(delta: str, **choice: str) -> bytes:
    """The event of a chunk with the given pieces of JSON as they are."""
    choice = {"index": "0", "delta": delta, "finish_reason": "null"} | choice
    text = ",".join(f'"{name}":{value}' for name, value in choice.items())
    return b"data: " + json.dumps(HEAD)[:-1].encode() + f',"choices":[{{{text}}}]}}\n\n'.encode()


def thought(**fields: object) -> bytes:
    """The event of a chunk with a piece of reasoning."""
    return x({"reasoning_details": [{"type": "reasoning.text", "index": 0} | fields]})


def image(url: str, **more: object) -> bytes:
    """The event of a chunk with an image."""
    return x({"images": [more | {"image_url": {"url": url}}]})


ROLE = x({"role": "assistant", "content": ""})
DONE = b"data: [DONE]\n\n"
STOP = x({}, "stop")
END = STOP + DONE
HI: Object = {"role": "assistant", "content": "hi"}
F, G = piece("f", "{}", id="c"), piece("g", "[]", id="d")
TWO_CALLS: Object = {"tool_calls": [F, G]}
USED: Object = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
LOGPROB: Object = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
SURE = x({"content": "a"}, logprobs={"content": [LOGPROB]})


def whole(*events: bytes) -> bytes:
    """A stream with these events between its beginning and its end."""
    return ROLE + b"".join(events) + END


STREAMS = [
    Stream("text", "tool calls beside an empty text", whole(x({"tool_calls": [F | {"index": 0}]}, text=""))),
    Stream("text", "content beside an empty text", whole(x({"content": "hi"}, text=""))),
    Stream("text", "content beside a text of null", whole(x({"content": "hi"}, text=None))),
    Stream("text", "a text of all so far", whole(x({"content": "a"}, text="a"), x({"content": "b"}, text="ab"))),
    Stream("text", "text alone",
           chunk({"index": 0, "text": "a"}) + chunk({"index": 0, "text": "b", "finish_reason": "stop"}) + DONE,
           {"content": "ab"}),
    Stream("tools", "two calls in pieces",
           whole(call("f", index=0, id="c", type="function"), call(None, "{", index=0),
                 call("g", index=1, id="d", type="function"), call(None, "[]", index=1), call(None, "}", index=0))),
    Stream("tools", "an empty id, name and type",
           whole(call("f", "{", index=0, id="c", type="function"), call("", "}", index=0, id="", type="")),
           {"tool_calls": [F | {"type": "function"}]}),
    Stream("tools", "an empty id and name", whole(call("f", "{", index=0, id="c"), call("", "}", index=0, id=""))),
    Stream("tools", "two calls at one index", whole(calls(F | {"index": 0}), calls(G | {"index": 0})), TWO_CALLS),
    Stream("tools", "two calls at one index in one chunk", whole(calls(F | {"index": 0}, G | {"index": 0})), TWO_CALLS),
    Stream("tools", "calls without an index", whole(calls(F), calls(G)), TWO_CALLS),
    Stream("tools", "calls without an index, in pieces",
           whole(call("f", "{", id="c"), call("", "}"), call("g", "[", id="d"), call("", "]")), TWO_CALLS),
    Stream("tools", "calls without index and id", whole(call("f", "{}"), call("g", "[]")),
           {"tool_calls": [piece("f", "{}"), piece("g", "[]")]}),
    Stream("tools", "calls at one index without ids", whole(call("f", "{}", index=0), call("g", "[]", index=0)),
           {"tool_calls": [piece("f", "{}"), piece("g", "[]")]}),
    Stream("tools", "an empty call", whole(calls({}), x({"content": "hi"})), {"content": "hi"}),
    Stream("tools", "a call of an index and a type", whole(call(index=0, type="function"), x({"content": "hi"})),
           {"content": "hi"}),
    Stream("tools", "a new id in every piece",
           whole(call("f", index=0, id="c"), call(None, "{", index=0, id="d"), call(None, "}", index=0, id="e")),
           {"tool_calls": [F]}),
    Stream("tools", "the same id and name in every piece",
           whole(call("f", "{", index=0, id="c"), call("f", "}", index=0, id="c")), {"tool_calls": [F]}),
    Stream("tools", "the input of a custom tool",
           whole(calls({"index": 0, "id": "c", "type": "custom", "custom": {"name": "x", "input": "a"}}),
                 calls({"index": 0, "custom": {"input": "b"}}))),
    Stream("message", "the whole message beside an empty delta",
           ROLE + x({"content": "hi"}) + x({}, "stop", message=HI) + DONE),
    Stream("message", "the whole message beside a delta of null",
           ROLE + x({"content": "hi"}) + x(None, "stop", message=HI) + DONE, {"content": "hi"}),
    Stream("message", "the whole message without a delta",
           ROLE + x({"content": "hi"}) + chunk({"index": 0, "finish_reason": "stop", "message": HI}) + DONE,
           {"content": "hi"}),
    Stream("message", "the whole message alone", chunk({"index": 0, "finish_reason": "stop", "message": HI}) + DONE,
           {"content": "hi"}),
    Stream("fields", "a refusal", whole(x({"refusal": "I can"}), x({"refusal": "not"}))),
    Stream("fields", "audio",
           whole(x({"audio": {"id": "a", "transcript": "Hi"}}), x({"audio": {"transcript": " you", "data": "AA"}}),
                 x({"audio": {"expires_at": 7}}))),
    Stream("fields", "audio with its id and time in every piece",
           whole(*(x({"audio": {"id": "a", "transcript": text, "expires_at": 7}}) for text in ("Hi", " you"))),
           {"audio": {"id": "a", "transcript": "Hi you", "expires_at": 7}}),
    Stream("fields", "reasoning_details", whole(thought(text="hm"), thought(text=", so"))),
    Stream("fields", "reasoning_details that repeat their format",
           whole(thought(text="hm", format="x"), thought(text=", so", format="x")),
           {"reasoning_details": [{"type": "reasoning.text", "index": 0, "text": "hm, so", "format": "x"}]}),
    Stream("fields", "reasoning_details of two types at one index",
           whole(thought(text="hm"), thought(type="reasoning.encrypted", data="AA")),
           {"reasoning_details": [{"type": "reasoning.text", "index": 0, "text": "hm"},
                                  {"type": "reasoning.encrypted", "index": 0, "data": "AA"}]}),
    Stream("fields", "a function_call",
           whole(x({"function_call": {"name": "f", "arguments": ""}}), x({"function_call": {"arguments": "{"}}),
                 x({"function_call": {"arguments": "}"}}))),
    Stream("fields", "content parts",
           x({"content": [{"type": "text", "text": "a"}]}) + x({"content": [{"type": "text", "text": "b"}]}) + END,
           {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
    Stream("fields", "content in parts, and then as text",
           x({"content": [{"type": "thinking", "thinking": []}]}) + x({"content": "a"}) + x({"content": "b"}) + END,
           {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "ab"}]}),
    Stream("fields", "images", whole(image("x", index=0), image("y", index=1))),
    Stream("fields", "images without an index", whole(image("x"), image("y")),
           {"images": [{"image_url": {"url": "x"}}, {"image_url": {"url": "y"}}]}),
    Stream("fields", "annotations",
           whole(x({"content": "a", "annotations": [{"type": "url_citation"}]}),
                 x({"annotations": [{"type": "file_citation"}]})),
           {"content": "a", "annotations": [{"type": "url_citation"}, {"type": "file_citation"}]}),
    Stream("fields", "an unknown field", whole(x({"aside": "a"}), x({"aside": "b"}))),
    Stream("fields", "reasoning under both of its names", whole(x({"reasoning": "a", "reasoning_content": "a"})),
           {"reasoning": "a"}),
    Stream("tools", "an index as text and as a number",
           whole(x({"tool_calls": [{"index": "0", "id": "a", "function": {"name": "f", "arguments": "{"}}]}),
                 x({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}))),
    Stream("fields", "refusals of two choices",
           whole(x({"refusal": "a"}, index=1), x({"refusal": "b"}), x({"refusal": "c"}, "stop", index=1))),
    Stream("logprobs", "a null list among logprobs",
           whole(SURE, x({"content": "b"}, logprobs={"content": None}), SURE)),
    Stream("logprobs", "null among logprobs", whole(SURE, x({"content": "b"}), SURE)),
    Stream("logprobs", "an empty list among logprobs",
           whole(SURE, x({"content": "b"}, logprobs={"content": []}), SURE)),
    Stream("logprobs", "logprobs of a refusal",
           whole(*(x({"refusal": text}, logprobs={"content": None, "refusal": [LOGPROB]}) for text in "ab"))),
    Stream("logprobs", "a number that is too large",
           whole(raw('{"content":"a"}', logprobs='{"content":[{"token":"a","logprob":-1e999}]}')),
           {"content": "a", "logprobs": {"content": [{"token": "a"}]}}),
    Stream("logprobs", "a number that is infinite",
           whole(raw('{"content":"a"}', logprobs='{"content":[{"token":"a","logprob":-Infinity}]}')),
           {"content": "a", "logprobs": {"content": [{"token": "a"}]}}),
    Stream("framing", "a last event with one line end", ROLE + x({"content": "a"}) + STOP[:-1], {"content": "a"}),
    Stream("framing", "a last event without a line end", ROLE + x({"content": "a"}) + STOP[:-2], {"content": "a"}),
    Stream("framing", "several data lines of an event, each a chunk",
           whole(x({"content": "a"})[:-1] + x({"content": "b"})), {"content": "ab"}),
    Stream("types", "an object as tool calls", whole(x({"content": "a", "tool_calls": {"id": "c"}})), {"content": "a"}),
    Stream("types", "null among tool calls", whole(x({"content": "a", "tool_calls": [None]})), {"content": "a"}),
    Stream("types", "odd token ids", whole(x({"content": "a"}, token_ids=[[1]]), x({"content": "b"}, token_ids=[0.5]))),
    Stream("types", "the prompt's token ids as text",
           whole(chunk({"index": 0, "delta": {"content": "a"}}, prompt_token_ids="1 2"))),
    Stream("types", "an object as finish reason", ROLE + x({"content": "a"}) + x({}, {"type": "stop"}) + DONE,
           {"content": "a"}),
    Stream("types", "an index as text", whole(x({"content": "a"}, index="0")), {"content": "a"}),
    Stream("types", "a character in two chunks, each with half of a surrogate pair",
           whole(raw('{"content":"a\\ud83d"}'), raw('{"content":"\\ude42b"}')), {"content": "a🙂b"}),
    Stream("usage", "usage in the choice", ROLE + x({"content": "a"}) + x({}, "stop", usage=USED) + DONE,
           {"content": "a", "usage": USED}),
    Stream("usage", "usage after [DONE]", ROLE + x({"content": "a"}) + STOP + DONE + chunk(usage=USED),
           {"content": "a", "usage": USED}),
    Stream("usage", "usage after the end", ROLE + x({"content": "a"}) + STOP + chunk(usage=USED) + DONE),
    Stream("usage", "another id in each chunk", whole(x({"content": "a"}).replace(b"chatcmpl-1", b"chatcmpl-2"))),
]  # fmt: skip

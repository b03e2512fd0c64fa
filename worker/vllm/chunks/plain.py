"""The chunks that nearly all events of vLLM are, decoded at a fraction of the price of any other. No I/O.

Each decoder raises MsgspecError or UnicodeDecodeError for a chunk that says more.
"""

from typing import Literal

import msgspec
from msgspec import Raw

from ...contract.entries import Fields
from .lenient_json import is_readable
from .shapes import NULL, RawObject, read_tool_calls, says


class _PlainDelta(msgspec.Struct, forbid_unknown_fields=True):
    content: str = ""
    reasoning: str = ""


class _PlainChoice(msgspec.Struct, forbid_unknown_fields=True):
    delta: _PlainDelta
    index: Literal[0]
    logprobs: None = None
    finish_reason: None = None
    stop_reason: None = None
    token_ids: list[int] | None = None


class PlainChunk(msgspec.Struct, forbid_unknown_fields=True):
    """What nearly every chunk is: one choice with text and token ids, and nothing else that says something."""

    id: str
    model: str
    created: int
    choices: tuple[_PlainChoice]
    object: str = ""
    usage: None = None
    system_fingerprint: str | None = None


class _RichDelta(msgspec.Struct, forbid_unknown_fields=True):
    content: str | None = None
    reasoning: str | None = None
    tool_calls: Raw = NULL


class _RichChoice(msgspec.Struct, forbid_unknown_fields=True):
    delta: _RichDelta
    index: Literal[0]
    logprobs: Raw = NULL
    finish_reason: None = None
    stop_reason: None = None
    token_ids: list[int] | None = None


class RichChunk(msgspec.Struct, forbid_unknown_fields=True):
    """A plain chunk that may also hold logprobs and pieces of tool calls, as the JSON that came."""

    id: str
    model: str
    created: int
    choices: tuple[_RichChoice]
    object: str = ""
    usage: None = None
    system_fingerprint: str | None = None


_decode = msgspec.json.decode
_encode = msgspec.json.encode
decode_plain = msgspec.json.Decoder(PlainChunk).decode
decode_rich = msgspec.json.Decoder(RichChunk).decode


def rich_fields(chunk: RichChunk) -> Fields:
    """The fields of a chunk's delta.

    Raises:
        ValidationError: where a part cannot go out as it came.
        DecodeError: where a part is no JSON.
    """
    (choice,) = chunk.choices
    delta, fields = choice.delta, Fields(type="delta")
    if delta.content:
        fields["content"] = delta.content
    if delta.reasoning:
        fields["reasoning"] = delta.reasoning
    if says(delta.tool_calls):
        rest: RawObject = {"tool_calls": _readable(delta.tool_calls)}
        read_tool_calls(rest, fields)
        if says(rest["tool_calls"]):
            raise msgspec.ValidationError("what is no tool call")
    if says(choice.logprobs):
        fields["logprobs"] = bytes(_readable(choice.logprobs)).decode()
    if choice.token_ids:
        fields["token_ids"] = _encode(choice.token_ids).decode()
    return fields


def _readable(part: Raw) -> Raw:
    if not is_readable(_decode(part), bytes(part)):
        raise msgspec.ValidationError("not every reader can decode this")
    return part

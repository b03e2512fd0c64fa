"""The fast path: decodes the chunks of the two shapes that vLLM nearly always sends, at a fraction of the cost. No I/O.

The decoders raise MsgspecError or UnicodeDecodeError for a chunk with other fields; the parser then takes the slow
path.

`RichChunk` could decode plain chunks too. `PlainChunk` exists for speed: the checks of undecoded parts make each chunk
a fifth slower, and there is one chunk a token. Fields of both shapes are inherited, which costs nothing.
"""

from typing import Literal

import msgspec
from msgspec import Raw

from ...contract.entries import Fields
from .lenient_json import is_readable
from .shapes import NULL, RawObject, has_value, read_tool_calls


class _FastChoice(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    index: Literal[0]
    finish_reason: None = None
    stop_reason: None = None
    token_ids: list[int] | None = None


class _FastChunk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: str
    model: str
    created: int
    object: str = ""
    usage: None = None
    system_fingerprint: str | None = None


class _PlainDelta(msgspec.Struct, forbid_unknown_fields=True):
    content: str = ""
    reasoning: str = ""


class _PlainChoice(_FastChoice, forbid_unknown_fields=True, kw_only=True):
    delta: _PlainDelta
    logprobs: None = None


class PlainChunk(_FastChunk, forbid_unknown_fields=True, kw_only=True):
    """A chunk of one choice with only text and token ids."""

    choices: tuple[_PlainChoice]


class _RichDelta(msgspec.Struct, forbid_unknown_fields=True):
    content: str | None = None
    reasoning: str | None = None
    tool_calls: Raw = NULL


class _RichChoice(_FastChoice, forbid_unknown_fields=True, kw_only=True):
    delta: _RichDelta
    logprobs: Raw = NULL


class RichChunk(_FastChunk, forbid_unknown_fields=True, kw_only=True):
    """A plain chunk that may also have logprobs and pieces of tool calls, which stay the JSON of the server."""

    choices: tuple[_RichChoice]


_decode = msgspec.json.decode
_encode = msgspec.json.encode
decode_plain = msgspec.json.Decoder(PlainChunk).decode
decode_rich = msgspec.json.Decoder(RichChunk).decode


def rich_fields(chunk: RichChunk) -> Fields:
    """The fields of a chunk's `delta` entry.

    Raises:
        ValidationError: when a part cannot be published unchanged.
        DecodeError: when a part is not JSON.
    """
    (choice,) = chunk.choices
    delta, fields = choice.delta, Fields(type="delta")
    if delta.content:
        fields["content"] = delta.content
    if delta.reasoning:
        fields["reasoning"] = delta.reasoning
    if has_value(delta.tool_calls):
        rest: RawObject = {"tool_calls": _checked(delta.tool_calls)}
        read_tool_calls(rest, fields)
        if has_value(rest["tool_calls"]):
            raise msgspec.ValidationError("not a tool call")
    if has_value(choice.logprobs):
        fields["logprobs"] = bytes(_checked(choice.logprobs)).decode()
    if choice.token_ids:
        fields["token_ids"] = _encode(choice.token_ids).decode()
    return fields


def _checked(part: Raw) -> Raw:
    """Check that every reader can decode a part; returns the part.

    Raises:
        ValidationError: when some reader may not.
        DecodeError: when the part is not JSON.
    """
    if not is_readable(_decode(part), bytes(part)):
        raise msgspec.ValidationError("not every reader can decode this")
    return part

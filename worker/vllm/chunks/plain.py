"""The fast path: decodes the chunks of the shapes that vLLM nearly always sends, at a fraction of the cost. No I/O.

The decoders raise MsgspecError or UnicodeDecodeError for a chunk with other fields; the parser then takes the slow
path.

`_RichChunk` could decode plain chunks too. `PlainChunk` exists for speed: the checks of undecoded parts make each chunk
a fifth slower, and there is one chunk a token. Fields of both shapes are inherited, which costs nothing.
"""

from typing import Literal

import msgspec
from msgspec import Raw

from ...contract.entries import Fields
from .lenient_json import is_readable
from .shapes import NULL, RawObject, has_value, read_tool_calls


class _AnyChoice(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    index: Literal[0]
    stop_reason: None = None
    token_ids: list[int] | None = None


class _FastChoice(_AnyChoice, forbid_unknown_fields=True, kw_only=True):
    finish_reason: None = None


class _AnyChunk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: str
    model: str
    created: int


class _FastChunk(_AnyChunk, forbid_unknown_fields=True, kw_only=True):
    """What the chunks with a choice have."""

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


class _RichChunk(_FastChunk, forbid_unknown_fields=True, kw_only=True):
    """A plain chunk that may also have logprobs and pieces of tool calls, which stay the JSON of the server."""

    choices: tuple[_RichChoice]


class _LastChoice(_AnyChoice, forbid_unknown_fields=True, kw_only=True):
    delta: _PlainDelta
    logprobs: None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class _LastChunk(_FastChunk, forbid_unknown_fields=True, kw_only=True):
    """A plain chunk that ends its choice."""

    choices: tuple[_LastChoice]


class _UsageChunk(_AnyChunk, forbid_unknown_fields=True, kw_only=True):
    """The chunk after the last choice. Its object shows that it is no error."""

    object: Literal["chat.completion.chunk"]
    choices: tuple[()]
    usage: Raw
    system_fingerprint: Raw = NULL


_decode = msgspec.json.decode
_encode = msgspec.json.encode
decode_plain = msgspec.json.Decoder(PlainChunk).decode
_decode_rich = msgspec.json.Decoder(_RichChunk).decode
_decode_last = msgspec.json.Decoder(_LastChunk).decode
_decode_usage = msgspec.json.Decoder(_UsageChunk).decode


def last_fields(data: bytes, model: str, fingerprint: str) -> Fields:
    """The fields of the `delta` entry of the plain chunk that ends the only choice.

    Raises:
        ValidationError: for any other chunk, and when the model or the fingerprint differs.
    """
    chunk = _decode_last(data)
    _check_head(chunk, model, fingerprint)
    (choice,) = chunk.choices
    fields: Fields = {"type": "delta"}
    if choice.delta.content:
        fields["content"] = choice.delta.content
    if choice.delta.reasoning:
        fields["reasoning"] = choice.delta.reasoning
    fields["finish_reason"] = choice.finish_reason
    if choice.token_ids:
        fields["token_ids"] = _encode(choice.token_ids).decode()
    return fields


def usage_after_last(data: bytes, model: str) -> RawObject:
    """The usage in the chunk after the last choice, and the other field that this chunk may have.

    Raises:
        ValidationError: for any other chunk, and when the model differs.
        DecodeError: when a part is not JSON.
    """
    chunk = _decode_usage(data)
    if chunk.model != model:
        raise msgspec.ValidationError("another model")
    return {"usage": _checked(chunk.usage), "system_fingerprint": _checked(chunk.system_fingerprint)}


def rich_fields(data: bytes, model: str, fingerprint: str) -> Fields:
    """The fields of the `delta` entry of a rich chunk.

    Raises:
        ValidationError: when a part cannot be published unchanged, and when the model or the fingerprint differs.
        DecodeError: when a part is not JSON.
    """
    chunk = _decode_rich(data)
    _check_head(chunk, model, fingerprint)
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


def _check_head(chunk: _FastChunk, model: str, fingerprint: str) -> None:
    if chunk.model != model or (chunk.system_fingerprint and chunk.system_fingerprint != fingerprint):
        raise msgspec.ValidationError("another model or fingerprint")


def _checked(part: Raw) -> Raw:
    """Check that every reader can decode a part; returns the part.

    Raises:
        ValidationError: when some reader may not.
        DecodeError: when the part is not JSON.
    """
    if not is_readable(_decode(part), bytes(part)):
        raise msgspec.ValidationError("not every reader can decode this")
    return part

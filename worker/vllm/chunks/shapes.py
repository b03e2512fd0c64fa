"""Converts the chunks of other servers into the shape of vLLM's chat route, one choice at a time. No I/O.

Each function removes the fields that it reads from the choice. The remaining fields are published unchanged in `extra`.
"""

import hashlib
from typing import TypeAlias

import msgspec
from msgspec import Raw

from ...contract.entries import Fields

RawObject: TypeAlias = dict[str, Raw]

NULL = Raw(b"null")
PRIVATE = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""Fields that one server sends to another, such as the address of a cache. They are not published."""
_NOTHING = frozenset({b"null", b'""', b"[]", b"{}"})
_TEXTS = ("reasoning", "reasoning_content", "content")
_EMPTY_LIST = b"[]"
"""An empty object, as servers in PHP write it."""
_LONGEST_INDEX = 18
"""Digits of an index that is text."""
_UNFINISHED = ("null", "none", "None", "not_finished")
"""Values of `finish_reason` that some servers send while a choice continues."""
_ASSISTANT = Raw(b'"assistant"')

_decode = msgspec.json.decode
_encode = msgspec.json.encode
_decode_ids = msgspec.json.Decoder(list[int]).decode
_decode_list = msgspec.json.Decoder(list[Raw]).decode
_decode_delta = msgspec.json.Decoder(RawObject | None).decode


def has_value(raw: Raw) -> bool:
    """Whether a value is neither null nor empty."""
    return bytes(raw) not in _NOTHING


def as_text(raw: Raw | bytes) -> str:
    """The value of a field as text: a string without quotes, anything else as JSON."""
    text = bytes(raw).decode()
    return _decode(raw, type=str) if text.startswith('"') else text


def delta_of(choice: RawObject, *, published: str | None) -> RawObject:
    """The delta of a choice, or the field that a server sends instead of a delta.

    `/v1/completions` sends `text`, which is used only if the choice has no delta. If it has both, `text` is empty, or
    repeats the delta, alone or after all text before it. A repetition is dropped: otherwise the size of the log would
    grow with the square of its length.

    A `message` belongs to an answer that is not streamed, or repeats the whole answer at its end. It is used only if
    the delta is empty and the choice has had only such messages so far.

    Args:
        choice: the choice, from which the fields that are read are removed.
        published: the reasoning and text of the choice so far, if all of it came in messages; else None. A message that
            begins with this text repeats it.

    Raises:
        ValidationError: when the delta is not an object.
    """
    raw = choice.pop("delta", NULL)
    given = {} if bytes(raw) == _EMPTY_LIST else _decode_delta(raw)
    delta = given or {}
    if given is None and "text" in choice:
        delta = {"role": _ASSISTANT, "content": choice.pop("text")}
    elif "text" in choice and _repeats(choice["text"], delta.get("content", NULL)):
        del choice["text"]
    if published is None or "message" not in choice or not bytes(choice["message"]).startswith(b"{"):
        return delta
    if not any(name != "role" and has_value(raw) for name, raw in delta.items()):
        message = _decode_delta(choice["message"]) or {}
        if not published or ((text := text_of(message)) and text != published):
            del choice["message"]
            delta |= _without(message, published) if published and text.startswith(published) else message
    return delta


def text_of(message: RawObject) -> str:
    """The reasoning and the content of a message or a delta, if they are text."""
    texts = (_decode(message[name]) for name in _TEXTS if name in message)
    return "".join(text for text in texts if isinstance(text, str))


def lift_fields(chunk: RawObject, choice: RawObject) -> None:
    """Move fields of a choice to the chunk, where the chat route has them.

    `/v1/completions` has the prompt's token ids in the choice, and Moonshot's servers have the usage there.
    """
    for name in ("prompt_token_ids", "usage"):
        if has_value(choice.get(name, NULL)) and not has_value(chunk.get(name, NULL)):
            chunk[name] = choice.pop(name)


def unread_in(part: RawObject) -> RawObject:
    """The fields of a choice or a delta that were not read, without private and empty ones."""
    return {name: raw for name, raw in part.items() if name not in PRIVATE and has_value(raw)}


def read_message(delta: RawObject, fields: Fields) -> None:
    """Move text and tool calls out of a delta into the fields of an entry."""
    for name, field in (("content", "content"), ("reasoning", "reasoning"), ("reasoning_content", "reasoning")):
        if (raw := delta.get(name)) is None or not has_value(raw):
            continue
        text = _decode(raw)
        if isinstance(text, str) and fields.get(field, text) == text:
            fields[field] = text
            del delta[name]
    read_tool_calls(delta, fields)


def read_tokens(choice: RawObject, fields: Fields) -> None:
    """Move logprobs and token ids out of a choice into the fields of an entry."""
    if (raw := choice.pop("logprobs", None)) is not None and has_value(raw):
        fields["logprobs"] = bytes(raw).decode()
    ids = ids_of(choice.get("token_ids", NULL))
    if ids is not None:
        del choice["token_ids"]
        if ids:
            fields["token_ids"] = _encode(ids).decode()


def ids_of(raw: Raw) -> list[int] | None:
    """A list of token ids; None for any other value."""
    try:
        return _decode_ids(raw)
    except msgspec.ValidationError:
        return None


def digest_of_prompt(prompt: list[int]) -> str:
    """The first 16 hex digits of SHA-256 over a prompt's token ids as compact JSON."""
    return hashlib.sha256(_encode(prompt)).hexdigest()[:16]


def read_index(choice: RawObject) -> int:
    """The index of a choice, which may be text or a float; 0 for any other value."""
    raw = choice.get("index", NULL)
    value = _decode(raw)
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value[:_LONGEST_INDEX])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return 0
    del choice["index"]
    return value


def read_finish_reason(choice: RawObject) -> str:
    """The reason why a choice ended; empty while it continues.

    Some servers send an object that contains the reason. Any other value that is not text is returned as JSON.
    """
    raw = choice.get("finish_reason", NULL)
    value = _decode(raw)
    if isinstance(value, dict):
        named = next((reason for name in ("type", "reason") if isinstance(reason := value.get(name), str)), "")
        return named or (bytes(raw).decode() if value else "")
    if not value or value in _UNFINISHED:
        return ""
    del choice["finish_reason"]
    return value if isinstance(value, str) else bytes(raw).decode()


def read_tool_calls(delta: RawObject, fields: Fields) -> None:
    """Move tool calls out of a delta. Readers rely on a list of objects: other values stay in the delta."""
    raw = delta.get("tool_calls", NULL)
    if not has_value(raw):
        return
    try:
        calls = _decode_list(raw)
    except msgspec.ValidationError:
        return
    calls = [call for call in calls if has_value(call)]
    whole = [call for call in calls if bytes(call).startswith(b"{")]
    others = [call for call in calls if not bytes(call).startswith(b"{")]
    if whole:
        fields["tool_calls"] = _encode(whole).decode()
    delta["tool_calls"] = Raw(_encode(others))


def _repeats(text: Raw, content: Raw) -> bool:
    whole, new = _decode(text), _decode(content)
    return isinstance(whole, str) and isinstance(new, str) and bool(new) and whole.endswith(new)


def _without(message: RawObject, published: str) -> RawObject:
    """A message without the published text with which it begins."""
    for name in _TEXTS:
        if isinstance(text := _decode(message.get(name, NULL)), str):
            message[name], published = Raw(_encode(text[len(published) :])), published[len(text) :]
    return message

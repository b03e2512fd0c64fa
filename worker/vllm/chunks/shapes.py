"""The shapes of other servers brought into that of vLLM's chat route, a choice of a chunk at a time and without I/O.

Each function takes what it can read out of the choice. What it leaves there goes to `extra`, as it came.
"""

from typing import TypeAlias

import msgspec
from msgspec import Raw

from ...contract.entries import Fields

RawObject: TypeAlias = dict[str, Raw]

NULL = Raw(b"null")
PRIVATE = frozenset({"kv_transfer_params", "ec_transfer_params"})
"""What a server says to another, such as where its cache is to be had: nothing for readers."""
_NOTHING = frozenset({b"null", b'""', b"[]", b"{}"})
_TEXTS = ("reasoning", "reasoning_content", "content")
_EMPTY_LIST = b"[]"
"""What servers in PHP write for an empty object."""
_LONGEST_INDEX = 18
"""Digits of an index that comes as text."""
_UNFINISHED = ("null", "none", "None", "not_finished")
"""Texts that some servers put into `finish_reason` while a choice goes on."""
_ASSISTANT = Raw(b'"assistant"')

_decode = msgspec.json.decode
_encode = msgspec.json.encode
_decode_ids = msgspec.json.Decoder(list[int]).decode
_decode_list = msgspec.json.Decoder(list[Raw]).decode
_decode_delta = msgspec.json.Decoder(RawObject | None).decode


def says(raw: Raw) -> bool:
    """Whether a value is more than null or empty."""
    return bytes(raw) not in _NOTHING


def as_text(raw: Raw | bytes) -> str:
    """A value as the text of a field: a string without its quotes, anything else as JSON."""
    text = bytes(raw).decode()
    return _decode(raw, type=str) if text.startswith('"') else text


def delta_of(choice: RawObject, *, said: str | None) -> RawObject:
    """What a choice adds: its `delta`, or what stands for it.

    `text` is that of `/v1/completions`, and counts only where there is no delta. Beside one it is empty or repeats
    the delta, alone or with all text before it. What repeats is dropped: a log would grow with the square of it.

    A `message` is that of an answer that is no stream, or repeats the whole answer at its end. It counts only where the
    delta says nothing, and the choice has said nothing so far but what came in such messages. That is `said`: its
    reasoning and text, or None where the choice has said something else. A message that begins with it repeats it.

    Raises:
        ValidationError: when the delta is no object.
    """
    raw = choice.pop("delta", NULL)
    given = {} if bytes(raw) == _EMPTY_LIST else _decode_delta(raw)
    delta = given or {}
    if given is None and "text" in choice:
        delta = {"role": _ASSISTANT, "content": choice.pop("text")}
    elif "text" in choice and _repeats(choice["text"], delta.get("content", NULL)):
        del choice["text"]
    if said is not None and "message" in choice and not _speaks(delta) and bytes(choice["message"]).startswith(b"{"):
        message = _decode_delta(choice["message"]) or {}
        if not said or ((text := text_of(message)) and text != said):
            del choice["message"]
            delta |= _without(message, said) if said and text.startswith(said) else message
    return delta


def text_of(message: RawObject) -> str:
    """The reasoning and the content of a message or a delta, as far as they are text."""
    texts = (_decode(message[name]) for name in _TEXTS if name in message)
    return "".join(text for text in texts if isinstance(text, str))


def lift(chunk: RawObject, choice: RawObject) -> None:
    """Put what stands in a choice where the chat route has it: beside the choices.

    `/v1/completions` has the prompt's ids there, Moonshot's servers the usage.
    """
    for name in ("prompt_token_ids", "usage"):
        if says(choice.get(name, NULL)) and not says(chunk.get(name, NULL)):
            chunk[name] = choice.pop(name)


def said_in(part: RawObject) -> RawObject:
    """What is left of a choice or a delta, and is for readers."""
    return {name: raw for name, raw in part.items() if name not in PRIVATE and says(raw)}


def read_message(delta: RawObject, fields: Fields) -> None:
    """Move text and tool calls out of a delta into the fields of an entry."""
    for name, field in (("content", "content"), ("reasoning", "reasoning"), ("reasoning_content", "reasoning")):
        if (raw := delta.get(name)) is None or not says(raw):
            continue
        text = _decode(raw)
        if isinstance(text, str) and fields.get(field, text) == text:
            fields[field] = text
            del delta[name]
    read_tool_calls(delta, fields)


def read_tokens(choice: RawObject, fields: Fields) -> None:
    """Move logprobs and token ids out of a choice into the fields of an entry."""
    if (raw := choice.pop("logprobs", None)) is not None and says(raw):
        fields["logprobs"] = bytes(raw).decode()
    ids = ids_of(choice.get("token_ids", NULL))
    if ids is not None:
        del choice["token_ids"]
        if ids:
            fields["token_ids"] = _encode(ids).decode()


def ids_of(raw: Raw) -> list[int] | None:
    """A list of token ids; None when it is anything else."""
    try:
        return _decode_ids(raw)
    except msgspec.ValidationError:
        return None


def read_index(choice: RawObject) -> int:
    """The index of a choice, which may be text or a float. What is no index counts as the first."""
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
    """Why a choice ended; empty while it goes on.

    Some servers give an object that has the reason in it. Anything else that is no text is a reason by its JSON.
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
    """Move tool calls out of a delta. Readers rely on a list of objects: what is none stays where it was."""
    raw = delta.get("tool_calls", NULL)
    if not says(raw):
        return
    try:
        calls = _decode_list(raw)
    except msgspec.ValidationError:
        return
    calls = [call for call in calls if says(call)]
    whole = [call for call in calls if bytes(call).startswith(b"{")]
    others = [call for call in calls if not bytes(call).startswith(b"{")]
    if whole:
        fields["tool_calls"] = _encode(whole).decode()
    delta["tool_calls"] = Raw(_encode(others))


def _repeats(text: Raw, content: Raw) -> bool:
    said, new = _decode(text), _decode(content)
    return isinstance(said, str) and isinstance(new, str) and bool(new) and said.endswith(new)


def _without(message: RawObject, said: str) -> RawObject:
    """A message less what was said of it, with which its text begins."""
    for name in _TEXTS:
        if isinstance(text := _decode(message.get(name, NULL)), str):
            message[name], said = Raw(_encode(text[len(said) :])), said[len(text) :]
    return message


def _speaks(delta: RawObject) -> bool:
    return any(name != "role" and says(raw) for name, raw in delta.items())

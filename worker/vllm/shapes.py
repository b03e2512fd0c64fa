"""The shapes of other servers brought into that of vLLM's chat route, a choice of a chunk at a time and without I/O.

Each function takes what it can read out of the choice. What it leaves there goes to `extra`, as it came.
"""

from typing import TypeAlias

import msgspec
from msgspec import Raw

from worker.contract.entries import Fields

RawObject: TypeAlias = dict[str, Raw]

NULL = Raw(b"null")
_NOTHING = frozenset({b"null", b'""', b"[]", b"{}"})
_ASSISTANT = Raw(b'"assistant"')

_decode = msgspec.json.decode
_encode = msgspec.json.encode
_decode_ids = msgspec.json.Decoder(list[int]).decode
_decode_calls = msgspec.json.Decoder(list[RawObject]).decode
_decode_delta = msgspec.json.Decoder(RawObject | None).decode


def says(raw: Raw) -> bool:
    """Whether a value is more than null or empty."""
    return bytes(raw) not in _NOTHING


def delta_of(choice: RawObject, *, has_spoken: bool) -> RawObject:
    """What a choice adds: its `delta`, or what stands for it.

    `text` is that of `/v1/completions`, and counts only where there is no delta. Beside one it is empty or repeats
    the delta, alone or with all text before it. What repeats is dropped: a log would grow with the square of it.

    A `message` is that of an answer that is no stream, or repeats the whole answer at its end. It counts only where
    neither the delta nor the choice so far (`has_spoken`) says anything.

    Raises:
        ValidationError: when the delta is no object.
    """
    given = _decode_delta(choice.pop("delta", NULL))
    delta = given or {}
    if given is None and "text" in choice:
        delta = {"role": _ASSISTANT, "content": choice.pop("text")}
    elif "text" in choice and _repeats(choice["text"], delta.get("content", NULL)):
        del choice["text"]
    if not has_spoken and "message" in choice and not _speaks(delta) and bytes(choice["message"]).startswith(b"{"):
        delta |= _decode_delta(choice.pop("message")) or {}
    return delta


def lift_prompt_ids(chunk: RawObject, choice: RawObject) -> None:
    """Put the prompt's ids where the chat route has them; `/v1/completions` has them in the choice."""
    ids = choice.get("prompt_token_ids", NULL)
    if says(ids) and not says(chunk.get("prompt_token_ids", NULL)):
        chunk["prompt_token_ids"] = choice.pop("prompt_token_ids")


def read_message(delta: RawObject, fields: Fields) -> None:
    """Move text and tool calls out of a delta into the fields of an entry."""
    for name, field in (("content", "content"), ("reasoning", "reasoning"), ("reasoning_content", "reasoning")):
        if (raw := delta.get(name)) is None or not says(raw):
            continue
        text = _decode(raw)
        if isinstance(text, str) and fields.get(field, text) == text:
            fields[field] = text
            del delta[name]
    if (raw := delta.pop("tool_calls", None)) is not None and says(raw):
        _decode_calls(raw)  # readers rely on a list of objects
        fields["tool_calls"] = bytes(raw).decode()


def read_tokens(choice: RawObject, fields: Fields) -> None:
    """Move logprobs and token ids out of a choice into the fields of an entry."""
    if (raw := choice.pop("logprobs", None)) is not None and says(raw):
        fields["logprobs"] = bytes(raw).decode()
    if (raw := choice.pop("token_ids", None)) is not None and says(raw):
        fields["token_ids"] = _encode(_decode_ids(raw)).decode()


def _repeats(text: Raw, content: Raw) -> bool:
    said, new = _decode(text), _decode(content)
    return isinstance(said, str) and isinstance(new, str) and bool(new) and said.endswith(new)


def _speaks(delta: RawObject) -> bool:
    return any(name != "role" and says(raw) for name, raw in delta.items())

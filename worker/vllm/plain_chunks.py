"""The chunk that nearly every event of vLLM is, decoded at a fifth of the price of any other. No I/O."""

from typing import Literal

import msgspec


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


decode_plain = msgspec.json.Decoder(PlainChunk).decode
"""Raises MsgspecError and UnicodeDecodeError for a chunk that says more."""

"""The record of what a simulated vLLM sent, for whoever checks what became of it. Pure data, no I/O."""

from hashlib import sha256

import msgspec

from .requests import Json

__all__ = ["Served", "digest"]


class Served(msgspec.Struct, kw_only=True):
    """What was sent for one chat or text completion. Times are monotonic seconds."""

    order: int
    """Requests are numbered from 1 as they come."""
    route: str
    """The path."""
    request: Json
    """The body; empty if it was not a JSON object."""
    status: int | None = None
    """Of HTTP; None while nothing is answered."""
    fault: str | None = None
    """The fault that struck."""
    prompt: str | None = None
    """A digest of the messages' token ids, the same on both routes: as `prompt_digest` of an answer not gone on from.
    None where no answer began."""
    after: int = 0
    """Tokens of the answer that were given, and gone on from."""
    texts: list[str] = []
    """The content sent so far, by choice."""
    reasonings: list[str] = []
    """The reasoning sent so far, by choice."""
    arguments: list[str] = []
    """The arguments of a tool call sent so far, by choice."""
    chunks: int = 0
    """Delta chunks sent, finish chunks included."""
    tokens: int = 0
    """Tokens generated for all choices, end tokens included."""
    finished: bool = False
    """Whether a good answer was sent whole (a missing [DONE] is no matter)."""
    closed_early: bool = False
    """Whether the connection was closed from outside before the answer ended."""
    started: float
    first_chunk: float | None = None
    ended: float | None = None


def digest(ids: list[int]) -> str:
    """Of token ids: the first 16 hex digits of the SHA-256 of their compact JSON."""
    return sha256(msgspec.json.encode(ids)).hexdigest()[:16]

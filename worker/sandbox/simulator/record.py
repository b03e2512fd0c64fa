"""The record of what a simulated vLLM sent, for tests that compare it with what followers read. Pure data, no I/O."""

from hashlib import sha256

import msgspec

from .requests import Json

__all__ = ["Served", "digest"]


class Served(msgspec.Struct, kw_only=True):
    """What the server sent for one chat or text completion. Times are monotonic seconds."""

    order: int
    """The number of the request, from 1 in the order of arrival."""
    route: str
    """The path of the request."""
    request: Json
    """The body; empty if it was not a JSON object."""
    status: int | None = None
    """The HTTP status; None until it is sent."""
    fault: str | None = None
    """The fault that the request met."""
    prompt: str | None = None
    """The digest of the messages' token ids, the same on both routes: the log's `prompt_digest` of a first attempt.
    None where no answer began."""
    after: int = 0
    """Tokens of the answer that the request already held, to continue after."""
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
    """Whether a correct answer was sent to its end; a missing [DONE] does not count."""
    closed_early: bool = False
    """Whether the client closed the connection before the answer ended."""
    started: float
    first_chunk: float | None = None
    ended: float | None = None


def digest(ids: list[int]) -> str:
    """The digest of token ids: the first 16 hex digits of the SHA-256 of their compact JSON."""
    return sha256(msgspec.json.encode(ids)).hexdigest()[:16]

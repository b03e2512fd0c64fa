"""The record of the answers that a simulated vLLM sent, for comparison with what followers read. No I/O."""

from hashlib import sha256

import msgspec

from .requests import Json

__all__ = ["Served", "digest"]


class Served(msgspec.Struct, kw_only=True):
    """The record of one chat or text completion. Times are monotonic seconds."""

    order: int
    """The number of the request, from 1 in the order of arrival."""
    route: str
    """The path of the request."""
    request: Json
    """The body; empty if it was not a JSON object."""
    traceparent: str = ""
    """The header of W3C trace context."""
    status: int | None = None
    """The HTTP status; None until it is sent."""
    fault: str | None = None
    """The fault that was applied to the request."""
    prompt: str | None = None
    """The digest of the messages' token ids, the same on both routes: the log's `prompt_digest` of a first attempt.
    None if no answer began."""
    after: int = 0
    """The number of tokens in the request after which the answer continues."""
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
    scheduled: float | None = None
    """When the answer began to be generated, after the request had waited for others; None if it never did."""
    first_chunk: float | None = None
    ended: float | None = None


def digest(ids: list[int]) -> str:
    """The digest of token ids: the first 16 hex digits of the SHA-256 of their compact JSON."""
    return sha256(msgspec.json.encode(ids)).hexdigest()[:16]

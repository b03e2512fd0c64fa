"""What a simulated vLLM is like: the properties of a server, and how it answers a request. Pure data, no I/O."""

from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Fault", "Options", "Scenario", "Shape"]

Fault = Literal[
    "refuse",  # before an answer: the server closes the connection without a byte
    "429",
    "503",
    "500",
    "hang",  # never sends a byte
    "html",  # 200 with a web page
    "json",  # 200 with a complete chat.completion in place of the stream
    "stall",  # after `after` delta chunks: sends nothing more, and keeps the connection open
    "freeze",  # the same, but keep-alive comments are still sent
    "cut",  # ends the body cleanly, with neither finish nor [DONE]
    "reset",  # TCP RST
    "malformed",  # one chunk that is not JSON, and then the rest
    "error_under_200",  # an error event and [DONE]
    "abort",  # finish_reason `abort` and [DONE]
    "no_done",  # at the end: [DONE] is missing
    "prefill",  # refuses to continue after given token ids; every other request is answered
]
Shape = Literal[
    "no_space",  # `data:` without a space
    "crlf",
    "cr",
    "comments",  # a keep-alive comment before every event
    "sloppy",  # odd chunks in between, and finish_reason "" instead of null
    "bom",
    "multiline",  # the JSON of an event over several data lines
    "finish_text",  # the last text in the finish chunk
    "reasoning_content",  # reasoning under this name, as older servers send it
]


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a request is answered. A server has a scenario, and a request's `simulate` field overrides parts of it."""

    text: str | None = None
    """The exact text of the answer."""
    tokens: int | None = None
    """The answer is pseudo-text of this many tokens."""
    rate: float = 0.0
    """Tokens per second and stream; 0 is as fast as possible."""
    first_token: float = 0.0
    """Seconds before the first chunk."""
    fault: Fault | None = None
    after: int = 0
    """Delta chunks, including the finish chunk, that are sent before the fault. A shorter answer has no fault."""
    times: int | None = None
    """How many requests for the same messages have the fault, from the first; None for all of them."""
    then: Fault | None = None
    """The fault of the requests after the first `times`."""
    retry_after: float | None = None
    """Seconds, for the Retry-After header of 429 and 503."""
    shape: Shape | frozenset[Shape] = frozenset()

    @property
    def shapes(self) -> frozenset[Shape]:
        return frozenset((self.shape,)) if isinstance(self.shape, str) else self.shape


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The properties of a simulated server."""

    model: str = "reciter"
    api_key: str | None = None
    """The key that the server requires under /v1, as `Authorization: Bearer …`."""
    max_model_len: int = 4096
    """Tokens of prompt and answer together."""
    reasoning: bool = True
    """Whether a reasoning parser is on."""
    rejects: frozenset[str] = frozenset()
    """Request fields answered with a 400 that names them."""
    reject_style: Literal["openai", "vllm", "fastapi"] = "openai"
    ignores: frozenset[str] = frozenset()
    """Request fields that the server ignores."""
    lacks: frozenset[str] = frozenset()
    """Paths answered with a 404, such as `/tokenize`."""
    max_num_seqs: int | None = None
    """How many answers are generated at once; further requests wait in silence. None for any number."""
    max_num_queued_reqs: int | None = None
    """How many requests may be in the server, running or waiting; further ones are refused. None for any number."""
    full_status: Literal[200, 429, 503] = 503
    """The status of the requests that a full server refuses. vLLM's own is 503, or 200 with an error event in the
    stream if it notices late, as it does with most requests of a burst. A proxy with a rate limit sends 429."""
    full_retry_after: float | None = None
    """Seconds, for the Retry-After header of these refusals; vLLM itself sends none."""
    keep_alive: float = 1.0
    """Seconds between the comments of a frozen stream."""
    scenario: Scenario = Scenario()
    record: Path | None = None
    """The file to which the record of each request is appended as a JSON line, when its answer begins and ends."""

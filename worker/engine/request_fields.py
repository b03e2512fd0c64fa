"""What the engine reads of a request's body. No I/O."""

from typing import TypedDict

from ..contract.entries import Object


def choices_of(request: Object) -> int:
    """The number of choices (`n`) of a request."""
    n = request.get("n")
    return n if isinstance(n, int) else 1


def model_of(request: Object) -> str:
    """The model of a request; empty if the server chooses the model."""
    model = request.get("model")
    return model if isinstance(model, str) else ""


class ParserOptions(TypedDict):
    """The options of `ChunkParser` that depend on the request."""

    n: int
    keep_prompt_ids: bool
    keep_usage: bool


def parser_options(request: Object) -> ParserOptions:
    """The options of the parser that depend on the request."""
    options = request.get("stream_options")
    return {
        "n": choices_of(request),
        "keep_prompt_ids": bool(request.get("return_token_ids")),
        "keep_usage": isinstance(options, dict) and bool(options.get("continuous_usage_stats")),
    }

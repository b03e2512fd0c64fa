"""The names of OpenTelemetry's semantic conventions for generative AI that the spans of jobs use, and their attributes.

The conventions are in development, so their names may change; all of them are here. The package
opentelemetry-semantic-conventions 0.66 only has deprecated copies. Source: `docs/gen-ai/client-inference.md` in
open-telemetry/semantic-conventions-genai. Attributes that hold content (messages, stop sequences, tool definitions) are
left out on purpose.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeGuard
from urllib.parse import urlsplit

Attribute: TypeAlias = str | bool | int | float | Sequence[str]

CHAT = "chat"
ERROR_TYPE = "error.type"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
RESPONSE_MODEL = "gen_ai.response.model"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
"""Seconds from the first start of the job, by any worker, to its first delta."""

_NUMBERS = {
    # the field of the request, and the attribute
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
}


def span_name(request: Mapping[str, object]) -> str:
    """The name of the span of a chat completion."""
    return f"{CHAT} {model}" if (model := _model_of(request)) else CHAT


def request_attributes(request: Mapping[str, object]) -> dict[str, Attribute]:
    """The attributes of a chat completion's request that are no content."""
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": CHAT,
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.stream": True,
    }
    if model := _model_of(request):
        attributes["gen_ai.request.model"] = model
    for field, name in _NUMBERS.items():
        if _is_number(value := request.get(field)):
            attributes[name] = value
    if _is_number(choices := request.get("n")) and choices != 1:
        attributes["gen_ai.request.choice.count"] = choices
    shape = request.get("response_format")
    if isinstance(shape, dict) and shape.get("type") in {"json_object", "json_schema"}:
        attributes["gen_ai.output.type"] = "json"
    return attributes


def server_attributes(url: str) -> dict[str, Attribute]:
    """Host and port of a server, from a URL that was checked."""
    parts = urlsplit(url)
    return {
        "server.address": parts.hostname or "",
        "server.port": parts.port or (443 if parts.scheme == "https" else 80),
    }


def _model_of(request: Mapping[str, object]) -> str:
    model = request.get("model")
    return model if isinstance(model, str) else ""


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)

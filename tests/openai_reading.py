"""What openai's own Python client makes of the bytes of a stream: the measure for what a reader puts together."""

from typing import Any

import httpx2
from openai import OpenAI
from openai.lib.streaming._deltas import accumulate_delta


def read_by_openai(body: bytes) -> dict[int, dict[str, Any]]:
    """The message of each choice, with its `finish_reason`, put together as openai's client does."""
    answer = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: answer))
    messages: dict[int, dict[Any, Any]] = {}
    with OpenAI(base_url="http://127.0.0.1:1/v1", api_key="none", max_retries=0, http_client=http) as client:
        for chunk in client.chat.completions.create(model="m", messages=[], stream=True):
            for choice in chunk.choices or ():
                message = messages.setdefault(choice.index, {})
                delta: Any = choice.delta  # null for some servers, whatever its type says
                if delta is not None:
                    accumulate_delta(message, delta.to_dict())
                if choice.finish_reason:
                    message["finish_reason"] = choice.finish_reason
    return messages

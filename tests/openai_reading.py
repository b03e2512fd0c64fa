"""What openai's own Python client makes of the bytes of a stream, to compare readers with."""

from typing import Any

import httpx2
from openai import OpenAI

Object = dict[str, Any]


def read_by_openai(body: bytes) -> Object:
    """The completion that openai's client puts together."""
    answer = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: answer))
    with (
        OpenAI(base_url="http://127.0.0.1:1/v1", api_key="none", max_retries=0, http_client=http) as client,
        client.chat.completions.stream(model="m", messages=[]) as stream,
    ):
        stream.until_done()
        return stream.current_completion_snapshot.to_dict()


def content_of(completion: Object) -> list[Object]:
    """A completion without empty values: each choice's message, finish reason and logprobs, and the usage.

    The usage is the first choice's here.
    """
    choices: list[Object] = []
    for choice in completion["choices"]:
        message = choice["message"] | {name: choice.get(name) for name in ("finish_reason", "logprobs")}
        message["reasoning"] = message.get("reasoning") or message.pop("reasoning_content", None)
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in message.get("tool_calls") or []
        ]
        message.pop("role", None)
        message["usage"] = None if choices else completion.get("usage")
        choices.append(without_nothing(message))
    return choices


def without_nothing(value: Any) -> Any:  # noqa: ANN401 - JSON
    """JSON without its empty values."""
    if isinstance(value, list):
        return [without_nothing(one) for one in value]
    if isinstance(value, dict):
        return {name: without_nothing(one) for name, one in value.items() if one not in (None, "", [], {})}
    return value

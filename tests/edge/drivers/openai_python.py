"""Calls a server by the openai client for Python: the same orders and lines as the drivers for Node."""

import json
import sys
from collections.abc import Iterable
from typing import Any

import httpx
from openai import APIError, OpenAI

from worker.http import ResumingTransport

Object = dict[str, Any]


def show(line: Object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def add(choices: dict[int, Object], chunk: Object) -> None:
    """Add the delta of a chat.completion.chunk to the choices so far."""
    for piece in chunk["choices"]:
        blank: Object = {"content": "", "reasoning": "", "tool_calls": [], "finish_reason": None, "logprobs": None}
        whole = choices.setdefault(piece["index"], blank)
        delta = piece.get("delta") or {}
        whole["content"] += delta.get("content") or ""
        whole["reasoning"] += delta.get("reasoning") or delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or ():
            if call["index"] == len(whole["tool_calls"]):
                whole["tool_calls"].append({"type": call.get("type"), "name": "", "arguments": ""})
            one, function = whole["tool_calls"][call["index"]], call.get("function") or {}
            one["name"] += function.get("name") or ""
            one["arguments"] += function.get("arguments") or ""
        whole["finish_reason"] = piece.get("finish_reason") or whole["finish_reason"]
        if (piece.get("logprobs") or {}).get("content"):
            whole["logprobs"] = (whole["logprobs"] or []) + piece["logprobs"]["content"]


def streamed(chunks: Iterable[Any]) -> Object:
    choices: dict[int, Object] = {}
    shared: Object = {}
    for count, chunk in enumerate(chunks, 1):
        plain = chunk.to_dict()
        add(choices, plain)
        shared |= {name: plain[name] for name in ("usage", "model", "object") if plain.get(name)}
        show({"chunk": count})
    return {"choices": [choices[index] for index in sorted(choices)], **shared}


def whole(completion: Object) -> Object:
    choices = [
        {
            "content": choice["message"].get("content") or "",
            "reasoning": choice["message"].get("reasoning") or "",
            "tool_calls": [
                {"type": call["type"], **call["function"]} for call in choice["message"].get("tool_calls") or ()
            ],
            "finish_reason": choice["finish_reason"],
            "logprobs": (choice.get("logprobs") or {}).get("content"),
        }
        for choice in completion["choices"]
    ]
    return {"choices": choices, **{name: completion[name] for name in ("usage", "model", "object")}}


def seen(error: Exception) -> Object:
    """The error as a program sees it: the fields that a caller may branch on."""
    fields = {"kind": type(error).__name__, "status": getattr(error, "status_code", None), "message": str(error)}
    body = error.body if isinstance(error, APIError) and isinstance(error.body, dict) else {}
    fields |= {"message": body.get("message", fields["message"])}
    return {"error": fields | {name: getattr(error, name, None) for name in ("type", "code", "param")}}


def main() -> None:
    """Make each call of the order in turn."""
    order = json.load(sys.stdin)
    client = OpenAI(
        base_url=order["base_url"],
        api_key=order["api_key"],
        max_retries=order["retries"],
        default_headers=order["headers"],
        http_client=httpx.Client(transport=ResumingTransport()) if order.get("client_js") else None,  # type: ignore[arg-type]
    )
    own = {"model", "messages", "stream"}
    for call in order["calls"]:
        body = call.get("body", {})
        arguments = {name: body[name] for name in own & body.keys()}
        arguments["extra_body"] = {name: value for name, value in body.items() if name not in own}
        try:
            if call.get("kind") == "models":
                show({"models": [{"id": model.id, "object": model.object} for model in client.models.list()]})
            elif body.get("stream"):
                show(streamed(client.chat.completions.create(**arguments)))
            else:
                show(whole(client.chat.completions.create(**arguments).to_dict()))
        except Exception as error:  # noqa: BLE001 - whatever the caller would see
            show(seen(error))
    client.close()


if __name__ == "__main__":
    main()

"""The output of `result()` and `worker follow`, compared with that of a real vLLM; runs when VLLM_URL is set.

The direct answer is read with nothing of ours: httpx for the bytes, `json` for the chunks. The questions are those of
the recorded transcripts; another model answers them in its own words, and the comparison holds all the same, as long as
it is deterministic at temperature 0 and the server was started with a tool parser.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from worker import Answer, Client
from worker.engine.application import Worker
from worker.settings import load_settings

VLLM_URL = os.environ.get("VLLM_URL", "").rstrip("/").removesuffix("/v1")
pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(not VLLM_URL, reason="VLLM_URL names no real vLLM"),
]

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["city"],
        },
    },
}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tutorial": (
        "Who are you?",
        {
            "top_k": 50, "temperature": 0.7, "max_tokens": 10, "presence_penalty": 0.1, "frequency_penalty": 0.1,
            "seed": 1,
        },
    ),
    "chinese": ("你是谁?", {"temperature": 0, "max_tokens": 200}),
    "emoji": ("Send emoji", {"temperature": 0, "max_tokens": 200}),
    "code": ("Write code", {"temperature": 0, "max_tokens": 200}),
    "story": ("Tell me a story", {"temperature": 0, "max_tokens": 400}),
    "tool_call": ("Weather in Paris", {"temperature": 0, "max_tokens": 200, "tools": [TOOL]}),
    "two_choices": ("你是谁?", {"temperature": 0.3, "max_tokens": 40, "n": 2, "seed": 3}),
    "logprobs": ("Who are you?", {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}),
    "stop": ("Tell me a story", {"temperature": 0, "max_tokens": 400, "stop": ["one line at"]}),
    "token_ids": ("Send emoji", {"temperature": 0, "max_tokens": 100, "return_token_ids": True}),
    "usage": (
        "Who are you?",
        {"temperature": 0, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
}  # fmt: skip
Summary = dict[int, dict[str, Any]]


async def model() -> str:
    async with httpx.AsyncClient() as http:
        return str((await http.get(f"{VLLM_URL}/v1/models")).json()["data"][0]["id"])


async def request_of(name: str) -> dict[str, Any]:
    question, sampling = REQUESTS[name]
    return {"model": await model(), "messages": [{"role": "user", "content": question}], **sampling}


async def ask_directly(request: dict[str, Any]) -> tuple[Summary, dict[str, Any]]:
    """The choices and the usage of a stream, put together in the plainest way."""
    wanted = {"stream_options": {"include_usage": True}} | request | {"stream": True, "return_token_ids": True}
    choices: Summary = {}
    usage: dict[str, Any] = {}
    async with (
        httpx.AsyncClient(timeout=120) as http,
        http.stream("POST", f"{VLLM_URL}/v1/chat/completions", json=wanted) as response,
    ):
        body = await response.aread()
    for event in body.decode().split("\n\n"):
        if not event or event == "data: [DONE]":
            continue
        chunk = json.loads(event.removeprefix("data: "))
        usage = chunk.get("usage") or usage
        for piece in chunk["choices"]:
            whole = choices.setdefault(
                piece["index"],
                {"content": "", "tools": [], "finish": "", "stop": None, "tokens": [], "logprobs": []},
            )
            delta = piece["delta"]
            whole["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                if call["index"] == len(whole["tools"]):
                    whole["tools"].append([call["function"]["name"], ""])
                whole["tools"][call["index"]][1] += call["function"].get("arguments") or ""
            whole["finish"] = piece["finish_reason"] or whole["finish"]
            whole["stop"] = piece.get("stop_reason") or whole["stop"]
            whole["tokens"] += piece.get("token_ids") or []
            whole["logprobs"] += (piece.get("logprobs") or {}).get("content") or []
    return choices, usage


def summary(answer: Answer) -> Summary:
    """Our answer in the same shape."""
    return {
        choice.index: {
            "content": choice.content,
            "tools": [[call["function"]["name"], call["function"]["arguments"]] for call in choice.tool_calls],  # type: ignore[index,call-overload]  # JSON
            "finish": choice.finish_reason,
            "stop": choice.stop_reason,
            "tokens": choice.token_ids,
            "logprobs": choice.logprobs["content"] if isinstance(choice.logprobs, dict) else [],
        }
        for choice in answer.choices
    }


@pytest.fixture
async def relay(redis_url: str) -> AsyncIterator[tuple[Client, str]]:
    service = Worker(load_settings(redis_url=redis_url, vllm_urls=VLLM_URL))
    running = asyncio.create_task(service.run())
    async with Client(redis_url) as client:
        yield client, redis_url
    service.stop()
    await running


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_result_is_what_vllm_says(name: str, relay: tuple[Client, str]) -> None:
    client, url = relay
    request = await request_of(name)
    direct, usage = await ask_directly(request)
    request_id = await client.enqueue(request)
    answer = await client.result(request_id)

    ours = summary(answer)
    for index, choice in direct.items():
        # The values of a logprob differ in the last digits from batch to batch; the tokens do not.
        assert [_tokens(entry) for entry in ours[index].pop("logprobs")] == [_tokens(e) for e in choice.pop("logprobs")]
    assert ours == direct
    assert {k: answer.usage[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        k: usage[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    assert answer.outcome == "done"
    for as_json in (False, True):
        assert_follow_prints(url, request_id, direct, as_json=as_json)


def _tokens(entry: dict[str, Any]) -> tuple[str, list[str]]:
    return entry["token"], [top["token"] for top in entry["top_logprobs"]]


def assert_follow_prints(url: str, request_id: str, direct: Summary, *, as_json: bool) -> None:
    command = [
        sys.executable,
        "-m",
        "worker",
        "follow",
        request_id,
        "--redis-url",
        url,
        *(["--json"] if as_json else []),
    ]
    root = str(Path(__file__).parents[1])
    printed = subprocess.run(
        command, capture_output=True, check=True, env=os.environ | {"PYTHONPATH": root}
    ).stdout.decode()
    if as_json:
        lines = [json.loads(line) for line in printed.splitlines()]
        deltas = [line for line in lines if line["type"] == "delta"]
        for index, choice in direct.items():
            assert "".join(d.get("content", "") for d in deltas if d.get("index", 0) == index) == choice["content"]
        return
    first = direct[0]
    assert printed.startswith(first["content"])
    for name, arguments in first["tools"]:
        assert name in printed
        assert json.dumps(arguments) in printed
    for index, choice in direct.items():
        if index:
            assert f"[{index}] {choice['content']}" in printed


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model": "nope"}, "model_not_found", "nope"),
        ({"max_tokens": 1_000_000}, "invalid_request", "max_tokens"),
        ({"temperature": -3}, "invalid_request", "temperature"),
        ({"logprobs": True, "top_logprobs": 500}, "invalid_request", "logprobs"),
        ({"messages": [{"role": "user", "content": "word " * 100_000}]}, "context_length_exceeded", "context length"),
        ({"messages": "hello"}, None, "messages"),
    ],
)
async def test_what_vllm_refuses_ends_in_its_words(
    change: dict[str, Any], code: str | None, message: str, relay: tuple[Client, str]
) -> None:
    client, _ = relay
    request = await request_of("chinese") | change
    if code is None:
        with pytest.raises(ValueError, match=message):
            await client.enqueue(request)
        return
    answer = await client.result(await client.enqueue(request))
    assert answer.end is not None
    assert (getattr(answer.end, "code", ""), message in getattr(answer.end, "message", "")) == (code, True)

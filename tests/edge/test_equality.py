"""The same calls by the same clients, to the gateway and to the server behind it, give the same.

Ids and times differ, and so do `type`, `code` and `param` of an error: the gateway has words of its own there. With
VLLM_URL the server is a real vLLM.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from conftest import StartSimulator, StartWorker
from edge_fixtures import ClientName, Object, StartClient, StartReplica
from redis.asyncio import Redis
from replicas import Replica
from waits import eventually

from worker.broker.queue_depth import live_records
from worker.contract.keys import Keys
from worker.engine.application import Worker
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.settings import load_settings

VLLM_URL = os.environ.get("VLLM_URL", "").rstrip("/").removesuffix("/v1")
WEATHER = {
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
CHOICE = {"type": "function", "function": {"name": "get_weather"}}


def asks(question: str, **fields: Any) -> Object:  # noqa: ANN401 - JSON
    return {"messages": [{"role": "user", "content": question}], **fields}


BODIES: dict[str, Object] = {
    "text": asks("Who are you?", temperature=0, max_tokens=100),
    "emoji": asks("Send emoji", temperature=0, max_tokens=100),
    "code": asks("Write code", temperature=0, max_tokens=100),
    "length": asks("Tell me a story", temperature=0, max_tokens=10),
    "stop": asks("Tell me a story", temperature=0, max_tokens=100, stop=["one line at"]),
    "tools": asks("Weather in Paris", temperature=0, max_tokens=200, tools=[WEATHER]),
    "named tool": asks("Weather in Paris", temperature=0, max_tokens=200, tools=[WEATHER], tool_choice=CHOICE),
    "reasoning": asks("Think first", temperature=0, max_tokens=100),
}
"""What every client can ask for."""
FOR_OPENAI: dict[str, Object] = {
    "choices": asks("Who knows?", n=3, temperature=0.7, seed=3, max_tokens=30),
    "logprobs": asks("Who are you?", temperature=0, logprobs=True, top_logprobs=2, max_tokens=12),
}
"""AI SDK reads one choice, and its provider for compatible servers no logprobs."""
LONG = asks("Go on", simulate={"tokens": 3000})
REFUSED: dict[str, Object] = {
    "unknown model": asks("Who are you?", model="nope"),
    "temperature": asks("Who are you?", temperature=-3),
    "tokens": asks("Who are you?", max_tokens=1_000_000),
    "context": asks("word " * 5_000),
}
OPENAI: tuple[ClientName, ...] = ("openai_python", "openai_node")
CLIENTS = pytest.mark.parametrize("client", [*OPENAI, "ai_sdk"])
EITHER_WAY = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


def calls_of(bodies: Mapping[str, Object], *, stream: bool, model: str = "reciter") -> list[Object]:
    way = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return [{"body": {"model": model} | body | way} for body in bodies.values()]


async def compared(
    start_client: StartClient, client: ClientName, urls: tuple[str, str], bodies: Mapping[str, Object], *, stream: bool,
    model: str = "reciter",
) -> tuple[dict[str, Object], dict[str, Object]]:  # fmt: skip
    """What a client gets from the server and from the gateway, by the name of the call."""
    calls = calls_of(bodies, stream=stream, model=model)
    direct, relayed = [await (await start_client(client, url, *calls)).results() for url in urls]
    for result in (*direct, *relayed):  # without its empty details, which vLLM sends only with a whole answer
        result |= {"usage": {name: count for name, count in result.get("usage", {}).items() if count is not None}}
    return dict(zip(bodies, direct, strict=True)), dict(zip(bodies, relayed, strict=True))


def shown(error: Object) -> Object:
    """The part of an error that is the same."""
    return {name: error["error"][name] for name in ("kind", "status", "message")}


@pytest.fixture
async def worker(start_worker: StartWorker, simulator: Simulator, redis: Redis) -> Worker:
    """A worker whose model a gateway lists. It keeps its job though a busy machine does not run it for seconds."""
    worker = await start_worker(simulator, lease=60, first_token_timeout=60, gap_timeout=60)

    async def is_listed() -> bool:
        return any(record.models for record in await live_records(redis, Keys()))

    await eventually(is_listed)
    return worker


@CLIENTS
@EITHER_WAY
@pytest.mark.usefixtures("worker")
async def test_a_client_gets_the_same_from_the_gateway_as_from_the_server(
    client: ClientName, start_client: StartClient, simulator: Simulator, replica: Replica, *, stream: bool
) -> None:
    bodies = BODIES | {"long": LONG} | (FOR_OPENAI if client in OPENAI else {})
    direct, relayed = await compared(start_client, client, (simulator.url, replica.url), bodies, stream=stream)
    assert not [name for name, result in direct.items() if "error" in result]
    assert relayed == direct


@CLIENTS
@EITHER_WAY
@pytest.mark.usefixtures("worker")
async def test_a_refusal_of_the_server_comes_with_its_status_and_message(
    client: ClientName, start_client: StartClient, simulator: Simulator, start_replica: StartReplica, *, stream: bool
) -> None:
    replica = await start_replica(grace=30)
    direct, relayed = await compared(start_client, client, (simulator.url, replica.url), REFUSED, stream=stream)
    assert {name: error["error"]["status"] for name, error in direct.items()} == {
        "unknown model": 404, "temperature": 400, "tokens": 400, "context": 400,
    }  # fmt: skip
    assert {name: shown(error) for name, error in relayed.items()} == {
        name: shown(error) for name, error in direct.items()
    }


@CLIENTS
async def test_an_error_in_the_stream_is_an_error_of_the_client(
    client: ClientName, start_client: StartClient, start_simulator: StartSimulator, start_worker: StartWorker,
    replica: Replica,
) -> None:  # fmt: skip
    simulator = await start_simulator(Options(scenario=Scenario(fault="error_under_200", after=5)))
    await start_worker(simulator)
    bodies = {"broken": BODIES["text"] | {"n": 2, "temperature": 0.7}}  # a worker does not resume several choices
    direct, relayed = await compared(start_client, client, (simulator.url, replica.url), bodies, stream=True)
    assert "error" in direct["broken"]
    assert "error" in relayed["broken"]
    assert relayed["broken"]["error"]["message"]


@pytest.mark.parametrize("client", OPENAI)
@pytest.mark.usefixtures("worker")
async def test_the_list_of_models_is_that_of_the_servers(
    client: ClientName, start_client: StartClient, simulator: Simulator, replica: Replica
) -> None:
    direct, relayed = [
        await (await start_client(client, url, {"kind": "models"})).results() for url in (simulator.url, replica.url)
    ]
    assert direct == [{"models": [{"id": "reciter", "object": "model"}]}]
    assert relayed == direct


@pytest.fixture
async def real_worker(redis_url: str) -> AsyncIterator[None]:
    worker = Worker(load_settings(redis_url=redis_url, vllm_urls=VLLM_URL))
    running = asyncio.create_task(worker.run())
    yield
    worker.stop()
    await running


@pytest.mark.real_vllm
@pytest.mark.skipif(not VLLM_URL, reason="VLLM_URL names no real vLLM")
@CLIENTS
@EITHER_WAY
@pytest.mark.usefixtures("real_worker")
async def test_a_client_gets_the_same_from_the_gateway_as_from_a_real_vllm(
    client: ClientName, start_client: StartClient, replica: Replica, *, stream: bool
) -> None:
    async with httpx.AsyncClient() as http:
        model = (await http.get(f"{VLLM_URL}/v1/models")).json()["data"][0]["id"]
    bodies = BODIES | (FOR_OPENAI if client in OPENAI else {})
    direct, relayed = await compared(start_client, client, (VLLM_URL, replica.url), bodies, stream=stream, model=model)
    for result in (*direct.values(), *relayed.values()):
        for choice in result.get("choices", ()):  # values differ in the last digits from batch to batch
            choice["logprobs"] = [entry["token"] for entry in choice["logprobs"] or ()]
    assert relayed == direct

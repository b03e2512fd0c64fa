"""Clients over `resumingFetch` (Node) and `ResumingTransport` (Python), while their gateway is killed."""

import signal
from typing import Any

import httpx
import pytest
from conftest import StartSimulator, StartWorker
from edge_fixtures import ClientName, StartClient, StartReplica

from worker.engine.application import Worker
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator

pytestmark = pytest.mark.usefixtures("worker")

MESSAGES: Any = [{"role": "user", "content": "Tell me a long story"}]
CALL = {"body": {"model": "reciter", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}}


@pytest.fixture
async def simulator(start_simulator: StartSimulator) -> Simulator:
    """Slow enough that each kill is in the middle of the answer."""
    return await start_simulator(Options(scenario=Scenario(rate=12.0)))


@pytest.fixture
async def worker(start_worker: StartWorker, simulator: Simulator) -> Worker:
    """A worker that keeps its job though a busy machine does not run it for seconds."""
    return await start_worker(simulator, lease=60, first_token_timeout=60, gap_timeout=60)


@pytest.mark.parametrize("name", ["openai_node", "openai_python", "ai_sdk"])
@pytest.mark.parametrize("signals", [("KILL", "TERM", "KILL"), ("TERM", "KILL", "TERM")], ids="-".join)
async def test_an_answer_is_whole_though_its_gateway_is_killed_after_1_5_and_50_chunks(
    name: ClientName,
    signals: tuple[str, ...],
    start_client: StartClient,
    start_replica: StartReplica,
    simulator: Simulator,
) -> None:
    settings = {"drain_timeout": 0.2}  # an answer takes longer, so SIGTERM interrupts it
    replica = await start_replica(**settings)
    async with httpx.AsyncClient() as http:
        script = (await http.get(f"{replica.url}/client.js")).text
    client = await start_client(name, replica.url, CALL, client_js=script)
    for chunks, signum in zip((1, 5, 50), signals, strict=True):
        await client.chunk(chunks)
        await replica.end(signal.Signals[f"SIG{signum}"])
        replica = await start_replica(port=replica.port, **settings)
    (result,) = await client.results()
    if name == "ai_sdk":
        text, finish_reason, tokens = result["text"], result["finish_reason"], result["usage"]["outputTokens"]
    else:
        (choice,) = result["choices"]
        text, finish_reason = choice["content"], choice["finish_reason"]
        tokens = result["usage"]["completion_tokens"]
    assert (text, finish_reason) == (answer_to(MESSAGES), "stop")
    assert tokens > 200
    generated = [served for served in simulator.served if served.route.endswith("/completions")]
    assert len(generated) == 1, "the answer was generated once"

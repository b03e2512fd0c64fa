"""A gateway that is killed in the middle of an answer: a client gets an error or the whole text, and never less."""

import signal

import pytest
from conftest import StartSimulator, StartWorker
from edge_fixtures import ClientName, Object, StartClient, StartReplica

from worker import Client
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario

TOKENS = 300
QUESTION = [{"role": "user", "content": "Tell me everything"}]
WHOLE = answer_to(QUESTION, tokens=TOKENS)
CALL = {"body": {"model": "reciter", "messages": QUESTION, "stream": True}}
SLOW = Options(scenario=Scenario(tokens=TOKENS, rate=100.0))
"""An answer of three seconds."""
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
MOMENTS = pytest.mark.parametrize("chunk", [1, 5, 50])
CLIENTS = pytest.mark.parametrize("client", ["openai_python", "openai_node", "ai_sdk", "raw_fetch"])


def text_of(result: Object) -> str:
    return str(result["text"] if "text" in result else result["choices"][0]["content"])


@CLIENTS
@MOMENTS
@SIGNALS
async def test_a_client_of_a_killed_gateway_gets_an_error_or_the_whole_text(
    client: ClientName, number: signal.Signals, chunk: int, start_client: StartClient, start_replica: StartReplica,
    start_simulator: StartSimulator, start_worker: StartWorker,
) -> None:  # fmt: skip
    await start_worker(await start_simulator(SLOW))
    replica = await start_replica(drain_timeout=0.2)
    reader = await start_client(client, replica.url, CALL)
    await reader.chunk(chunk)
    status = await replica.end(number)
    (result,) = await reader.results()
    assert "error" in result or text_of(result) == WHOLE
    assert status == (0 if number == signal.SIGTERM else -number)


@CLIENTS
async def test_a_gateway_that_stops_lets_answers_finish_within_its_time(
    client: ClientName, start_client: StartClient, start_replica: StartReplica, start_simulator: StartSimulator,
    start_worker: StartWorker,
) -> None:  # fmt: skip
    await start_worker(await start_simulator(SLOW))
    replica = await start_replica(drain_timeout=40)
    reader = await start_client(client, replica.url, CALL)
    await reader.chunk(1)
    assert await replica.end(signal.SIGTERM) == 0
    (result,) = await reader.results()
    assert text_of(result) == WHOLE


@MOMENTS
@SIGNALS
async def test_an_event_source_gets_the_whole_text_through_a_restart(
    number: signal.Signals, chunk: int, start_client: StartClient, start_replica: StartReplica, client: Client,
    start_simulator: StartSimulator, start_worker: StartWorker,
) -> None:  # fmt: skip
    await start_worker(await start_simulator(SLOW))
    replica = await start_replica(drain_timeout=0.2)
    request_id = await client.enqueue({"messages": QUESTION})
    reader = await start_client("event_source", replica.url, {"path": f"/requests/{request_id}/events"})
    await reader.chunk(chunk)
    await replica.end(number)
    await start_replica(replica.port)
    (result,) = await reader.results()
    assert result["outcome"] == "done"
    assert result["text"] == WHOLE
    entries = [str(entry.id) async for entry in client.follow(request_id)]
    assert result["ids"] == entries

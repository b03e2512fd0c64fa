"""The clients of this part, at a server without a gateway: what the other tests compare with is right."""

import pytest
from edge_fixtures import ClientName, StartClient

from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator

QUESTION = [{"role": "user", "content": "Who are you?"}]
CALL = {"body": {"model": "reciter", "messages": QUESTION, "stream": True}}


@pytest.mark.parametrize("client", ["openai_python", "openai_node", "ai_sdk", "raw_fetch"])
async def test_a_client_reads_the_answer_of_a_server(
    client: ClientName, start_client: StartClient, simulator: Simulator
) -> None:
    (result,) = await (await start_client(client, simulator.url, CALL)).results()
    text = result["text"] if client == "ai_sdk" else result["choices"][0]["content"]
    assert text == answer_to(QUESTION)

"""The openai clients repeat a request that got no response. The repetition costs no second job."""

from functools import partial
from pathlib import Path

import pytest
from conftest import StartSimulator, StartWorker
from cutting_server import LONG, Cut, CuttingServer
from edge_fixtures import ClientName, RunningClient, StartClient, StartReplica
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator

QUESTION = [{"role": "user", "content": "Who are you?"}]
CLIENTS = pytest.mark.parametrize("client", ["openai_python", "openai_node"])
UNHURRIED = {"lease": 60, "first_token_timeout": 60, "gap_timeout": 60}
"""Settings of a worker that requests no answer twice though a busy machine does not run it for seconds."""


@CLIENTS
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_retry_attaches_to_the_first_job(
    client: ClientName, start_client: StartClient, start_replica: StartReplica, redis: Redis,
    start_simulator: StartSimulator, start_worker: StartWorker, *, stream: bool,
) -> None:  # fmt: skip
    simulator = await start_simulator(Options(scenario=Scenario(first_token=3.0)))
    await start_worker(simulator, **UNHURRIED)
    # No byte is sent before the first token, and the job waits for a retry that comes late.
    replica = await start_replica(grace=30, leave_after=600)
    call = {"body": {"model": "reciter", "messages": QUESTION, "stream": stream}}
    async with Proxy.before(replica.url) as proxy:
        reader = await start_client(client, proxy.url, call, retries=2)
        await _asked(simulator)
        await proxy.cut()
        text = await _text(reader)
        assert proxy.accepted >= 2
    assert text == answer_to(QUESTION)

    async def has_ended() -> bool:  # the client has its answer before the worker records the end
        return int(await redis.xlen("chat:lifecycle")) >= 2

    await eventually(has_ended)
    assert await redis.xlen("chat:lifecycle") == 2, "one job began and ended"
    assert len(simulator.served) == 1


CASES: list[tuple[Cut, bool, bool]] = [  # where the connection is cut; whether the answer is streamed, and it was used
    ("before the head", True, False),
    ("before the head", True, True),
    ("before the head", False, True),
    ("after the head", True, True),
    ("after a chunk", True, True),
    ("after the head", False, True),
]


@CLIENTS
async def test_a_connection_that_is_cut_anywhere_costs_no_second_job(
    client: ClientName, start_client: StartClient, start_replica: StartReplica, simulator: Simulator,
    start_worker: StartWorker, tmp_path: Path,
) -> None:  # fmt: skip
    """A connection that was used before has served a list of models. Node opens another one for its second call.

    The other end must not have all of an answer when its connection is cut: a retry would then be a new request. Before
    the head, the first token comes late, by a timer of the event loop that cuts. After the head of an answer that is
    not streamed, the other end takes little of it.
    """
    await start_worker(simulator, **UNHURRIED)
    replica = await start_replica(leave_after=600)
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1/models").write_text('{"object": "list", "data": []}')
    for number, (cut, stream, reused) in enumerate(CASES, 1):

        async def is_asked(count: int = number) -> bool:
            return len(simulator.served) >= count

        tokens = LONG if cut == "after the head" and not stream else None
        late = {"first_token": 0.5} if cut == "before the head" else {}
        body = {"model": "reciter", "messages": QUESTION, "stream": stream, "seed": number}
        call = {"body": body | {"simulate": late | {"tokens": tokens}}}
        async with CuttingServer(replica.port, tmp_path, partial(eventually, is_asked), keeps=reused) as server:
            server.cut_next(cut, 1)
            reader = await start_client(client, server.url, *2 * [{"kind": "models"}], call, retries=2)
            *_, result = await reader.results()
            first, *retries = server.posts
        assert first.is_reused is reused
        # Node's client has no retry once it has a head. Python's reads a whole answer before it returns.
        is_retried = cut == "before the head" or (client == "openai_python" and not stream)
        assert [post.retry for post in retries] == [1] * is_retried
        assert ("error" in result) is not is_retried
        if is_retried:
            assert result["choices"][0]["content"] == answer_to(QUESTION, tokens=tokens)
        await eventually(is_asked)
        assert len(simulator.served) == number


@CLIENTS
async def test_the_same_question_again_is_a_second_job(
    client: ClientName, start_client: StartClient, start_replica: StartReplica, simulator: Simulator,
    start_worker: StartWorker,
) -> None:  # fmt: skip
    await start_worker(simulator, **UNHURRIED)
    replica = await start_replica()
    call = {"body": {"model": "reciter", "messages": QUESTION, "stream": True}}
    results = await (await start_client(client, replica.url, call, call, retries=2)).results()
    assert [result["choices"][0]["content"] for result in results] == [answer_to(QUESTION)] * 2
    assert len(simulator.served) == 2


async def _asked(simulator: Simulator) -> None:
    async def asked() -> bool:
        return bool(simulator.served)

    await eventually(asked)


async def _text(reader: RunningClient) -> str:
    (result,) = await reader.results()
    assert "error" not in result, result
    return str(result["choices"][0]["content"])

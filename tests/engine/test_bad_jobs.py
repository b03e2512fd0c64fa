"""Jobs that fail at every server end by themselves, and take no server from the other jobs.

All by counts: the pauses of the circuit are so long here that nobody could wait for one.
"""

import asyncio
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
from conftest import StartSimulator, StartWorker
from waits import eventually

from worker import Answer, Client
from worker.contract.entries import Object
from worker.engine.pace import Pace
from worker.sandbox.simulator.server import Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.vllm.servers.circuit import FAILURES
from worker.vllm.servers.pace import ServerPace

_ERROR = {"message": "list index out of range", "type": "InternalServerError", "param": None, "code": 500}
_EVENTS = {
    "event 500": _ERROR,
    "event 422": {"message": "Input validation error", "http_status_code": 422},
}
"""Errors under status 200."""
WAYS = ("500", *_EVENTS, "cut")
_CHAT = "/v1/chat/completions"


@pytest.fixture
def server_pace() -> ServerPace:
    return ServerPace(first_pause=3600, longest_pause=3600)


@pytest.fixture
def pace() -> Pace:
    return Pace(longest_block=0.1, first_retry=0.01)


class Picky(Simulator):
    """A server that fails at every question that begins with "bad", in the way that the question names."""

    def __init__(self, way: str = "500") -> None:
        super().__init__()
        self.way = way
        self.requests: Counter[str] = Counter()
        """How often each question came."""
        self.fails_all = False

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        if request.path != _CHAT:
            await super()._handle(request, connection)
            return
        question = msgspec.json.decode(request.body)["messages"][0]["content"]
        self.requests[question] += 1
        if not self.fails_all and not question.startswith("bad"):
            await super()._handle(request, connection)
        elif self.way == "500":
            await connection.respond(500, "application/json", msgspec.json.encode({"error": _ERROR}))
        elif self.way in _EVENTS:
            body = b"data: " + msgspec.json.encode({"error": _EVENTS[self.way]}) + b"\n\ndata: [DONE]\n\n"
            await connection.respond(200, "text/event-stream", body)
        else:
            chunk = {"choices": [{"index": 0, "delta": {"content": "well"}, "finish_reason": None}]}
            body = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
            await connection.respond(200, "text/event-stream", body)


def chat_request(content: str, **more: Any) -> Object:  # noqa: ANN401
    return {"model": "reciter", "messages": [{"role": "user", "content": content}], **more}


PATIENT: dict[str, object] = {"lease": 20, "first_token_timeout": 60, "gap_timeout": 60}
"""On a busy machine no timeout of the worker may end an answer: these tests count the requests."""


async def ended(client: Client, *ids: str) -> list[Answer]:
    return list(await asyncio.gather(*map(client.result, ids)))


@pytest.mark.parametrize(
    ("bad", "servers", "way"),
    [(bad, servers, "500") for bad in (2, 3, 4, 6, 8, 20) for servers in (1, 2)]
    + [(8, servers, way) for servers in (1, 2) for way in WAYS[1:]],
)
async def test_a_good_job_behind_bad_ones_is_sent_to_vllm_at_once(
    client: Client, start_worker: StartWorker, bad: int, servers: int, way: str
) -> None:
    """No pause delays the good job, and vLLM gets its request once."""
    async with Picky(way) as one, Picky(way) as other:
        picky = [one, other][:servers]
        await start_worker(*picky, **PATIENT)
        ids = []
        for n in range(bad):  # one after another, so that each meets the circuit state that the former left
            ids.append(await client.enqueue(chat_request(f"bad {n}")))
            await eventually(partial(_asked, picky, f"bad {n}"))
        (good,) = await ended(client, await client.enqueue(chat_request("good")))
        assert good.outcome == "done"
        assert sum(server.requests["good"] for server in picky) == 1
        outcomes = [answer.outcome for answer in await ended(client, *ids)]
    assert outcomes == ["error"] * bad
    # Three tries, and one more at each server where the job was the trial request.
    assert all(sum(server.requests[f"bad {n}"] for server in picky) <= 3 + servers for n in range(bad))


async def _asked(servers: list[Picky], question: str) -> bool:
    return any(server.requests[question] for server in servers)


@pytest.mark.parametrize("way", WAYS)
async def test_bad_jobs_among_good_ones_do_not_harm_them(client: Client, start_worker: StartWorker, way: str) -> None:
    """Half of all jobs are bad."""
    async with Picky(way) as picky:
        await start_worker(picky, slots=16, **PATIENT)
        ids = [await client.enqueue(chat_request(f"{'good' if n % 2 else 'bad'} {n}")) for n in range(40)]
        outcomes = [answer.outcome for answer in await ended(client, *ids)]
        assert outcomes == ["error", "done"] * 20
        assert all(picky.requests[f"good {n}"] == 1 for n in range(1, 40, 2))


async def test_bad_jobs_that_fill_every_slot_end_by_themselves(client: Client, start_worker: StartWorker) -> None:
    """No other job is left for a trial, so the worker tries the server with a request of its own."""
    async with Picky() as picky:
        await start_worker(picky, slots=FAILURES + 2, **PATIENT)
        ids = [await client.enqueue(chat_request(f"bad {n}")) for n in range(4 * FAILURES)]
        (good,) = await ended(client, await client.enqueue(chat_request("good")))
        assert good.outcome == "done"
        assert {answer.outcome for answer in await ended(client, *ids)} == {"error"}
        assert picky.requests["Hi"], "the worker sent a request of its own"


async def test_a_server_that_fails_at_everything_ends_no_job_that_another_server_can_do(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    """Its health endpoint reports no trouble. Once its circuit is open, it gets one trial per pause."""
    async with Picky() as broken:
        broken.fails_all = True
        good = await start_simulator()
        await start_worker(broken, good, slots=1)
        for n in range(4 * FAILURES):
            (answer,) = await ended(client, await client.enqueue(chat_request(f"question {n}")))
            assert answer.outcome == "done"
        assert (
            broken.requests.total() == FAILURES + 1
        )  # the failures that open the circuit, and the first trial, which follows at once
        assert len(good.served) == 4 * FAILURES


async def test_a_server_that_fails_at_everything_does_not_turn_the_queue_into_errors(
    client: Client, start_worker: StartWorker, server_pace: ServerPace, pace: Pace
) -> None:
    """Each job is sent at most once more and then waits, even if it has a single try."""
    async with Picky() as broken:
        # The jobs wait in the worker until the test has seen that.
        worker = await start_worker(broken, tries=1, slots=4, pace=replace(pace, longest_wait_here=3600), **PATIENT)
        await ended(client, await client.enqueue(chat_request("before")))
        broken.fails_all = True
        ids = [await client.enqueue(chat_request(f"question {n}")) for n in range(4 * FAILURES)]

        async def waits() -> bool:
            waiting = worker.metrics.registry.get_sample_value("vllm_relay_jobs_waiting_for_model")
            return waiting == 4 and broken.requests["Hi"] > 0

        await eventually(waits)
        lost = broken.requests.total() - 1 - broken.requests["Hi"] - 4
        assert lost <= FAILURES + 4
        broken.fails_all = False
        server_pace.longest_pause = 0.0
        outcomes = [answer.outcome for answer in await ended(client, *ids)]
    assert outcomes.count("error") <= lost

"""Servers that are shutting down: they end their open streams and refuse new requests, while `/health` is good."""

import asyncio

from pools import Recorder, fails, quick, request_answer, until, watching

from worker.sandbox.simulator.options import Options, Scenario
from worker.telemetry.events import Event, VllmAway, VllmBack
from worker.vllm.servers.circuit import DRAINING, Caller, CircuitState
from worker.vllm.servers.reports import CircuitReports
from worker.vllm.servers.server import Server

SHUT_DOWN = "cannot schedule new futures after shutdown"


async def test_a_draining_server_is_away_until_it_answers_a_request_of_the_worker() -> None:
    async with Recorder() as server, watching(server.url, pace=quick(first_drain_pause=0.05)) as pool:
        (pooled,) = pool.servers
        server.refuses_with = SHUT_DOWN
        caller = Caller()
        assert await fails(pool, caller=caller) == {"upstream_error"}
        assert (pooled.is_away, pooled.circuit.reason, pool.room("")) == (True, "draining", 0)
        assert not caller.failed_at, "it is no failure of the job"
        await until(lambda: server.asked.count("/v1/chat/completions") > 2)
        assert pooled.is_away
        server.refuses_with = ""
        await until(lambda: pooled.circuit.state is CircuitState.CLOSED)


def test_a_drain_is_reported_once_a_minute_since_a_load_balancer_hides_one_server_of_many() -> None:
    events: list[Event] = []
    server, other = Server("http://a:1"), Server("http://b:1")

    class Recording:
        def emit(self, event: Event) -> None:
            events.append(event)

    reports = CircuitReports(Recording())
    for _ in range(3):
        reports.on_change(server, CircuitState.OPEN, DRAINING)
        reports.on_change(server, CircuitState.CLOSED, "")
    reports.on_change(other, CircuitState.OPEN, DRAINING)
    assert events == [VllmAway(server.url, DRAINING), VllmBack(server.url), VllmAway(other.url, DRAINING)]


async def test_the_open_streams_of_a_draining_server_end_whole_and_then_it_is_away_as_any_other() -> None:
    options = Options(scenario=Scenario(rate=20, tokens=40))
    async with Recorder(options) as server, watching(server.url, pace=quick(first_drain_pause=0.05)) as pool:
        (pooled,) = pool.servers
        answer = asyncio.create_task(request_answer(pool))
        await until(lambda: server.served and not pooled.unanswered)
        draining = asyncio.create_task(server.drain())
        await fails(pool)
        assert pooled.circuit.is_draining
        assert await answer
        await draining
        await until(lambda: pooled.circuit.reason == "upstream_unreachable")
        assert pooled.is_away

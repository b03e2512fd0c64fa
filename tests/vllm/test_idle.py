"""A pool without requests: what probes of its servers show, and what they cost."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from pools import SHORT, Recorder, quick, request_answer, serving, until, watching

from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.server import Options
from worker.vllm.servers.circuit import CircuitState
from worker.vllm.servers.pace import ServerPace

LATE = 0.6
"""A limit of probes that a server on a busy machine keeps."""


def often(**pace: Any) -> ServerPace:  # noqa: ANN401
    """A pace with many probes of idle servers."""
    return quick(**{"idle_every": SHORT, "idle_list_every": SHORT} | pace)


async def test_an_idle_server_that_ends_is_away_and_up_again_once_it_is_back() -> None:
    async with AsyncExitStack() as stack:
        port = free_port()
        first = await stack.enter_async_context(Recorder(port=port))
        async with watching(first.url, pace=often()) as pool:
            (pooled,) = pool.servers
            await stack.aclose()
            await until(lambda: pooled.is_away)
            assert pooled.circuit.reason == "upstream_unreachable"
            async with Recorder(port=port) as second:
                await until(lambda: pooled.is_up)
                asked = len(second.asked)
                await until(lambda: len(second.asked) > asked + 2)
                assert not pooled.is_silent
            await until(lambda: pooled.is_away)


async def test_an_idle_server_whose_engine_has_died_is_away() -> None:
    async with serving("reciter", pace=often()) as ((server,), pool):
        server.statuses["/health"] = 503
        await until(lambda: pool.servers[0].is_away)
        assert pool.servers[0].circuit.reason == "health_503"


async def test_an_idle_server_that_answers_late_gets_requests_all_the_same() -> None:
    pace = often()
    async with serving("reciter", pace=pace) as ((server,), pool):
        (pooled,) = pool.servers
        server.slow = {"/health", "/v1/models"}
        pace.probe_limit = LATE
        asked = len(server.asked)
        await until(lambda: len(server.asked) > asked + 2)
        assert (pooled.circuit.state, pooled.awaits_response) == (CircuitState.CLOSED, True)
        assert await request_answer(pool)
        assert not pooled.awaits_response


async def test_an_idle_server_whose_list_is_late_is_asked_for_its_health() -> None:
    """A router that queries its servers."""
    pace = often()
    async with serving("reciter", pace=pace) as ((server,), pool):
        server.slow = {"/v1/models"}
        pace.probe_limit = LATE
        asked = len(server.asked)
        await until(lambda: "/health" in server.asked[asked:] and not pool.servers[0].awaits_response)
        assert pool.servers[0].circuit.state is CircuitState.CLOSED


async def test_a_server_with_requests_is_not_probed() -> None:
    async with serving("reciter", "reciter", pace=often()) as ((busy, idle), pool):
        asking = asyncio.create_task(request_answer(pool, pool.servers[0], simulate={"fault": "hang"}))
        await until(lambda: busy.served)
        await until(lambda: not pool.servers[0].awaits_response)
        asked, others = len(busy.asked), len(idle.asked)
        await until(lambda: len(idle.asked) > others + 5)
        assert len(busy.asked) == asked
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def test_a_key_that_an_idle_server_refuses_from_now_on_is_noticed() -> None:
    async with serving("reciter", pace=often(), api_key="k") as ((server,), pool):
        (pooled,) = pool.servers
        server.change(api_key="another")
        await until(lambda: pooled.refuses_key)
        server.change(api_key="k")
        await until(lambda: not pooled.is_away)
        assert not server.served


async def test_a_key_that_an_idle_server_has_always_refused_is_noticed() -> None:
    """Its list may be guarded alone, so a request decides."""
    async with Recorder(Options(api_key="k")) as server, watching(server.url, api_key="other", pace=often()) as pool:
        await until(lambda: pool.servers[0].refuses_key)


async def test_a_server_that_guards_its_list_alone_is_tried_once() -> None:
    async with Recorder() as server:
        server.statuses["/v1/models"] = 401
        async with watching(server.url, pace=often()) as pool:
            await until(lambda: server.served)
            asked = len(server.asked)
            await until(lambda: len(server.asked) > asked + 4)
            assert (pool.servers[0].is_up, len(server.served)) == (True, 1)


async def test_a_model_that_an_idle_server_lists_no_longer_is_noticed() -> None:
    async with serving("old", pace=often()) as ((server,), pool):
        server.options = Options(model="new")
        await until(lambda: pool.servers[0].models == {"new"})


async def test_a_slow_list_of_an_idle_server_is_fetched_less_often() -> None:
    async with serving("reciter", pace=often(probe_limit=5)) as ((server,), _):
        server.slow = {"/v1/models"}
        asked = server.asked.count("/v1/models")
        await until(lambda: server.asked.count("/v1/models") > asked)
        await asyncio.sleep(50 * SHORT)  # the duration of the list, and no wait for a condition
        server.released.set()
        healths, lists = server.asked.count("/health"), server.asked.count("/v1/models")
        await until(lambda: server.asked.count("/health") > healths + 3)
        assert server.asked.count("/v1/models") == lists

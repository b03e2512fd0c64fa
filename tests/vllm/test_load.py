"""The load of servers: what is read from their metrics, and what the limit learns from it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pools import Recorder, quick, request_answer, serving, until, watching

from worker.sandbox.simulator.options import Options, Scenario
from worker.vllm.servers.load import Load, load_in
from worker.vllm.servers.pool import ServerPool

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="reciter"} 4.0
vllm:num_requests_running{engine="1",model_name="reciter"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="reciter"} 10.0
vllm:num_requests_waiting{engine="1",model_name="a } b"} 1e1
vllm:num_requests_waiting_by_reason{engine="0",model_name="reciter",reason="capacity"} 10.0
"""


@pytest.mark.parametrize(
    ("page", "load"),
    [
        (PAGE, Load(7, 20)),
        (PAGE.replace("\n", "\r\n"), Load(7, 20)),
        ("vllm:num_requests_running 2\nvllm:num_requests_waiting 0\n", Load(2, 0)),
        ("vllm:num_requests_running 2 1700000000000\nvllm:num_requests_waiting 0 1700000000000\n", Load(2, 0)),
        ("", None),
        ("vllm:num_requests_running 2\n", None),
        ("vllm:num_requests_running 2\nvllm:num_requests_waiting NaN\n", None),
        ("vllm:num_requests_running -2\nvllm:num_requests_waiting 1\n", None),
        ("vllm:num_requests_running two\nvllm:num_requests_waiting 1\n", None),
        ("<html>vllm:num_requests_running 2</html>", None),
    ],
)
def test_the_load_is_summed_over_engines_and_models(page: str, load: Load | None) -> None:
    assert load_in(page.encode()) == load


@asynccontextmanager
async def answering(pool: ServerPool, count: int) -> AsyncIterator[None]:
    """Requests in flight at the first server of a pool, as jobs send them."""

    async def answer() -> None:
        with pool.servers[0].reserve():
            await request_answer(pool, pool.servers[0])

    tasks = [asyncio.create_task(answer()) for _ in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def slow(**options: Any) -> Options:  # noqa: ANN401 - the simulator's options
    return Options(scenario=Scenario(rate=20, tokens=4000), **options)


async def test_requests_that_wait_in_a_server_shrink_its_limit() -> None:
    async with (
        Recorder(slow(max_num_seqs=2)) as server,
        watching(server.url, pace=quick(load_every=0.05)) as pool,
        answering(pool, 12),
    ):
        limit = pool.servers[0].limit
        await until(lambda: "/metrics" in server.asked and limit.value < 4)
        assert pool.servers[0].room == 0


async def test_a_server_without_requests_is_not_queried() -> None:
    async with serving("reciter", pace=quick(load_every=0.01, list_every=0.01)) as ((server,), pool):
        lists = len(server.asked) + 10
        await until(lambda: len(server.asked) >= lists)
        assert "/metrics" not in server.asked
        assert await request_answer(pool)


@pytest.mark.parametrize("options", [{"lacks": frozenset({"/metrics"})}, {"api_key": "secret"}])
async def test_a_server_that_does_not_publish_its_load_is_queried_once_a_minute(options: dict[str, Any]) -> None:
    async with (
        Recorder(slow(**options)) as server,
        watching(server.url, api_key="secret", pace=quick(load_every=0.02)) as pool,
    ):
        if "lacks" not in options:
            server.statuses["/metrics"] = 403
        async with answering(pool, 2):
            await until(lambda: "/metrics" in server.asked)
            await asyncio.sleep(0.3)
        assert server.asked.count("/metrics") == 1


async def test_the_load_is_requested_with_the_key_of_the_server() -> None:
    async with (
        Recorder(slow(api_key="secret")) as server,
        watching(server.url, api_key="secret", pace=quick(load_every=0.02)) as pool,
        answering(pool, 1),
    ):
        await until(lambda: "/metrics" in server.asked)
        assert server.authorization[server.asked.index("/metrics")] == "Bearer secret"

"""Room at the servers of a pool: demand, and the jobs that wait for a place."""

import asyncio
from contextlib import ExitStack

import pytest
from pools import Recorder, quick, request_answer, serving, until, watching

from worker.sandbox.simulator.options import Options, Scenario
from worker.vllm.errors import NoConnection, classify
from worker.vllm.servers.circuit import Caller
from worker.vllm.servers.pool import ServerPool
from worker.vllm.servers.room import PlaceQueue
from worker.vllm.servers.server import Server
from worker.vllm.stream.watchdog import StreamTimeouts


def known(pool: ServerPool, *models: str) -> None:
    """Record that each server answered its probe, and lists the model."""
    for server, model in zip(pool.servers, models, strict=True):
        server.circuit.on_probe("")
        if model:
            server.record_models([model])


@pytest.fixture
def pool() -> ServerPool:
    return ServerPool(["http://a:1", "http://b:1"], limits=StreamTimeouts(1, 1, 1))


def at(server: Server, count: int) -> ExitStack:
    """Reserve a server for this many requests."""
    with ExitStack() as requests:
        for _ in range(count):
            requests.enter_context(server.reserve())
        return requests.pop_all()


def test_room_is_that_of_the_servers_of_a_model_less_the_demand(pool: ServerPool) -> None:
    assert (pool.room("small"), pool.total_room(), pool.is_available) == (0, 0, False), "nothing is known yet"
    known(pool, "small", "large")
    each = pool.servers[0].room
    assert each > 1
    assert (pool.room("small"), pool.room("large"), pool.total_room()) == (each, each, 2 * each)
    demand = pool.expect("small")
    assert (pool.room("small"), pool.room("large"), pool.total_room()) == (each - 1, each, 2 * each - 1)
    with at(pool.servers[0], 1):
        demand.end()
        demand.end()
        assert (pool.room("small"), pool.total_room()) == (each - 1, 2 * each - 1)
    assert pool.total_room() == 2 * each
    with at(pool.servers[0], each + 1):
        assert (pool.room("small"), pool.room("large"), pool.total_room()) == (0, each, each)
        assert pool.is_available


def test_demand_for_any_model_of_a_server_counts_against_its_room(pool: ServerPool) -> None:
    known(pool, "", "large")
    each = pool.servers[0].room
    demand = pool.expect("other")
    assert (pool.room("small"), pool.room("large")) == (each - 1, 2 * each - 1)
    demand.end()


def test_one_job_at_a_time_finds_out_whether_a_server_has_a_model_that_none_lists(pool: ServerPool) -> None:
    known(pool, "small", "large")
    assert pool.room("adapter") == 1
    demand = pool.expect("adapter")
    assert (pool.room("adapter"), pool.room("another")) == (0, 1)
    demand.end()
    assert pool.room("adapter") == 1
    for server in pool.servers:
        failed = NoConnection("upstream_unreachable", "refused", retryable=True)
        server.record_failure(server.circuit.begin(Caller()), failed)
    assert pool.room("adapter") == 0


def test_the_generation_grows_with_servers_and_lists_and_not_with_room(pool: ServerPool) -> None:
    known(pool, "small", "large")
    grown = [pool.generation]
    pool.servers[0].record_models(["small"])
    with at(pool.servers[0], 1):
        grown.append(pool.generation)
    pool.servers[0].record_models(["small", "adapter"])
    grown.append(pool.generation)
    failed = NoConnection("upstream_unreachable", "refused", retryable=True)
    pool.servers[0].record_failure(pool.servers[0].circuit.begin(Caller()), failed)
    grown.append(pool.generation)
    assert grown[0] == grown[1] < grown[2] < grown[3]
    assert pool.models() == {"small", "adapter", "large"}


async def test_a_place_wakes_one_of_thousands_of_jobs_and_the_first_come_is_the_first() -> None:
    places, server = PlaceQueue(), Server("http://a:1", most=1)
    server.circuit.on_probe("")
    woken: list[int] = []

    async def wait(number: int) -> None:
        await places.wait("m", Caller(), 60)
        woken.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(3000)]
    await until(lambda: len(places) == 3000)
    for _ in range(3):
        places.wake(server, lambda model: model == "m")
        await asyncio.sleep(0)
        await until(lambda: woken)
    await until(lambda: len(woken) >= 3)
    assert woken == [0, 1, 2]
    with at(server, 1):
        places.wake(server, lambda _: True)
    places.wake(server, lambda model: model == "other")
    assert len(places) == 2997
    places.wake_all()
    await asyncio.gather(*tasks)
    assert (woken, len(places)) == (list(range(3000)), 0)


async def test_a_place_wakes_no_job_that_the_server_refuses() -> None:
    places, server = PlaceQueue(), Server("http://a:1", most=1)
    server.circuit.on_probe("")
    refused = Caller(refused_at={server.circuit: classify(404, "no")})
    tasks = [asyncio.create_task(places.wait("m", caller, 60)) for caller in (refused, Caller())]
    await until(lambda: len(places) == 2)
    places.wake(server, lambda _: True)
    await tasks[1]
    assert not tasks[0].done()
    places.wake_all()
    await tasks[0]


async def test_a_job_waits_for_a_place_only_as_long_as_it_may() -> None:
    async with serving("reciter") as (_, pool):
        with at(pool.servers[0], 100):
            await pool.wait_available("reciter", within=0.05)
            assert not pool.accepts("reciter")
            waiting = asyncio.create_task(pool.wait_available("reciter", within=60))
            await asyncio.sleep(0)
        await waiting
        assert pool.accepts("reciter")


async def test_a_change_of_room_ends_the_wait_for_one() -> None:
    async with Recorder(Options()) as server, watching(server.url, pace=quick(probe_every=60)) as pool:
        with at(pool.servers[0], 1):
            waiting = asyncio.create_task(pool.wait_changed(60))
            await asyncio.sleep(0)
        await waiting
        await pool.wait_changed(0.01)
        pool.servers[0].record_failure(pool.servers[0].circuit.begin(Caller()), classify(429, "", retry_after=0.05))
        assert pool.room("") == 0
        await pool.wait_changed(60)
        await until(lambda: pool.room("") > 0)


async def test_a_fallback_is_taken_after_a_refusal_and_only_if_it_has_room() -> None:
    async with serving("large", "small") as (_, pool):
        large, small = pool.servers
        caller = Caller()
        with at(large, 100):
            assert not pool.should_fall_back("large", ["small"], caller), "it was not refused"
            large.record_failure(large.circuit.begin(caller), classify(503, "busy"))
            assert pool.should_fall_back("large", ["small"], caller)
            with at(small, 100):
                assert not pool.should_fall_back("large", ["small"], caller)
        assert pool.should_fall_back("large", ["small"], caller) is not large.has_room_for(caller)


async def test_a_limit_that_grows_wakes_who_waits_for_room() -> None:
    """The end of an answer may be minutes away."""
    slow = Options(scenario=Scenario(rate=5, tokens=400))
    async with Recorder(slow) as server, watching(server.url, pace=quick(load_every=60)) as pool:
        (pooled,) = pool.servers

        async def answer() -> None:
            while not pool.accepts(""):
                await pool.wait_available("", within=60)
            with pool.choose("").reserve():
                await request_answer(pool, pooled)

        tasks = [asyncio.create_task(answer()) for _ in range(20)]
        await until(lambda: pooled.in_flight == 20)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

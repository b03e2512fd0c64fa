"""Every fault of a vLLM that the simulated one can have: the first try meets it, and the answer is whole in the end."""

import pytest
from checks import chat_request, expected, has_begun, log_of, promise_kept
from conftest import StartSimulator, StartWorker
from proxy import Proxy
from redis.asyncio import Redis
from steered_clock import SteeredClock
from waits import eventually

from worker import Client
from worker.engine.pace import Pace
from worker.sandbox.simulator.server import Options, Scenario

QUICK = {"gap_timeout": 0.3, "first_token_timeout": 0.3, "tries": 10}
"""Silence is noticed soon; that a busy machine is taken for a silent one costs a try more, and no answer."""


@pytest.fixture
def pace() -> Pace:
    return Pace(longest_block=0.1, first_retry=0.02)


@pytest.mark.parametrize("fault", ["refuse", "429", "503", "500", "hang", "html"])
async def test_a_fault_before_the_first_token_is_invisible(
    fault: str, client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    simulator = await start_simulator(Options(keep_alive=0.1))
    await start_worker(simulator, **QUICK)
    request_id = await client.enqueue(chat_request("Who are you?", simulate={"fault": fault, "times": 1}))
    ended = await promise_kept(redis, request_id, expected("Who are you?"))
    assert simulator.served[0].fault == fault
    assert "restarted" not in {line.type for line in ended.log}


@pytest.mark.parametrize("after", [0, 5], ids=["before any text", "mid-stream"])
@pytest.mark.parametrize("fault", ["stall", "freeze", "cut", "reset", "malformed", "error_under_200", "abort"])
async def test_a_broken_stream_is_resumed_or_restarted(
    fault: str, after: int, client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    simulator = await start_simulator(Options(keep_alive=0.1))
    await start_worker(simulator, **QUICK)
    order = {"fault": fault, "times": 1, "after": after}
    request_id = await client.enqueue(chat_request("Who are you?", simulate=order))
    await promise_kept(redis, request_id, expected("Who are you?"))
    assert simulator.served[0].fault == fault
    assert len(simulator.served) > 1


@pytest.mark.parametrize("order", [{"fault": "no_done"}, {"first_token": 0.3}], ids=["no [DONE]", "slow first token"])
async def test_a_response_that_is_not_a_fault_is_not_retried(
    order: dict[str, object],
    client: Client,
    redis: Redis,
    start_worker: StartWorker,
    start_simulator: StartSimulator,
) -> None:
    simulator = await start_simulator(Options(keep_alive=0.1))
    await start_worker(simulator)
    request_id = await client.enqueue(chat_request("Who are you?", simulate=order))
    assert (await promise_kept(redis, request_id, expected("Who are you?"))).attempts == 1
    assert len(simulator.served) == 1


async def test_the_next_try_waits_as_long_as_the_server_asks(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    simulator = await start_simulator()
    await start_worker(simulator)
    order = {"fault": "429", "times": 1, "retry_after": 0.4}
    request_id = await client.enqueue(chat_request("Who are you?", simulate=order))
    await promise_kept(redis, request_id, expected("Who are you?"))
    first, second = simulator.served
    assert second.started - first.started >= 0.4, "twenty times the pause without Retry-After"


async def test_a_server_that_asks_for_time_holds_up_no_job_that_another_can_serve(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    busy = await start_simulator(Options(scenario=Scenario(fault="503", retry_after=600)))
    well = await start_simulator()
    await start_worker(busy, well, pace=Pace(first_retry=0.02, longest_retry=3600))
    request_id = await client.enqueue(chat_request("Who are you?"))
    await promise_kept(redis, request_id, expected("Who are you?"))
    assert (len(busy.served), len(well.served)) == (1, 1)


async def test_a_connection_to_vllm_that_is_cut_mid_stream(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=8)
    simulator = await start_simulator(clock=clock)
    async with Proxy.before(simulator.url) as proxy:
        await start_worker(proxy, gap_timeout=60)
        request_id = await client.enqueue(chat_request())
        for attempt in (1, 2):
            await has_begun(redis, request_id, attempt=attempt)
            await proxy.cut()
        clock.release()
        await promise_kept(redis, request_id)
        assert simulator.served[0].closed_early


async def test_a_connection_to_vllm_that_falls_silent_mid_stream(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=8)
    simulator = await start_simulator(clock=clock)
    async with Proxy.before(simulator.url) as proxy:
        await start_worker(proxy, gap_timeout=2.5, tries=10)
        request_id = await client.enqueue(chat_request())
        await has_begun(redis, request_id)
        proxy.half_open()

        async def noticed() -> bool:
            return any(line.type == "claimed" for line in await log_of(redis, request_id))

        await eventually(noticed)
        clock.release()
        await proxy.heal()
        await promise_kept(redis, request_id)


async def test_a_vllm_that_dies_mid_stream_is_replaced_by_the_other(
    client: Client, redis: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    clock = SteeredClock(halt_after=8)
    one, two = [await start_simulator(clock=clock) for _ in range(2)]
    async with Proxy.before(one.url) as first, Proxy.before(two.url) as second:
        await start_worker(first, second, gap_timeout=60)
        request_id = await client.enqueue(chat_request())
        await has_begun(redis, request_id)
        dead, alive = (first, two) if one.served else (second, one)
        dead.refuse()
        await dead.cut()
        clock.release()
        await promise_kept(redis, request_id)
        assert [served.finished for served in alive.served] == [True]

"""The simulated vLLM under load and in its shutdown, with the responses of a real vLLM 0.32.0."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
from conftest import StartSimulator
from steered_clock import SteeredClock
from waits import eventually

from worker.sandbox.simulator.server import Options, Scenario, Simulator

PATH = "/v1/chat/completions"
REQUEST = {"model": "reciter", "stream": True, "messages": [{"role": "user", "content": "Who are you?"}]}
ENDLESS = Scenario(fault="stall", after=1)
FULL = {
    "message": "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance.",
    "type": "Service Unavailable",
    "param": None,
    "code": 503,
}


@asynccontextmanager
async def asked(simulator: Simulator, count: int) -> AsyncIterator[list[asyncio.Task[httpx.Response]]]:
    """Send as many requests at once; those that are not answered are cancelled in the end."""
    async with httpx.AsyncClient(base_url=simulator.url, timeout=20) as client:
        tasks = [asyncio.create_task(client.post(PATH, json=REQUEST)) for _ in range(count)]
        yield tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gauges(simulator: Simulator) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=simulator.url) as client:
        text = (await client.get("/metrics")).text
    samples = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, _, value in samples}


async def test_requests_beyond_the_limit_wait_in_silence_after_the_head(start_simulator: StartSimulator) -> None:
    simulator = await start_simulator(Options(max_num_seqs=2, scenario=ENDLESS))

    async with asked(simulator, 5):
        await eventually(lambda: is_loaded(simulator, running=2, waiting=3))

        assert await gauges(simulator) == {"vllm:num_requests_running": 2, "vllm:num_requests_waiting": 3}
        assert [served.status for served in simulator.served] == [200] * 5
        assert [served.chunks for served in simulator.served] == [1, 1, 0, 0, 0]


async def is_loaded(simulator: Simulator, *, running: int, waiting: int) -> bool:
    scheduler = simulator.scheduler
    return (scheduler.running, scheduler.waiting) == (running, waiting) and all(
        served.chunks for served in list(simulator.served)[:running]
    )


async def test_waiting_requests_are_answered_in_order_and_those_whose_client_left_are_not(
    start_simulator: StartSimulator,
) -> None:
    simulator = await start_simulator(Options(max_num_seqs=1, scenario=ENDLESS))

    async with asked(simulator, 1) as first:
        await eventually(lambda: is_loaded(simulator, running=1, waiting=0))
        async with asked(simulator, 1) as second, asked(simulator, 1):
            await eventually(lambda: is_loaded(simulator, running=1, waiting=2))
            second[0].cancel()
            await eventually(lambda: is_loaded(simulator, running=1, waiting=1))
            first[0].cancel()
            await eventually(lambda: left(simulator, 1))

            assert [served.scheduled is not None for served in simulator.served].count(True) == 2
            assert simulator.scheduler.running == 1


async def left(simulator: Simulator, admitted: int) -> bool:
    return simulator.scheduler.admitted == admitted


async def test_a_server_grows_while_requests_wait(start_simulator: StartSimulator) -> None:
    simulator = await start_simulator(Options(max_num_seqs=1, scenario=ENDLESS))

    async with asked(simulator, 3):
        await eventually(lambda: is_loaded(simulator, running=1, waiting=2))
        simulator.change(max_num_seqs=3)
        await eventually(lambda: is_loaded(simulator, running=3, waiting=0))


@pytest.mark.parametrize(
    ("options", "status", "after"),
    [
        pytest.param(Options(), 503, None, id="noticed in time"),
        pytest.param(Options(full_status=200), 200, None, id="noticed late"),
        pytest.param(Options(full_status=429), 429, None, id="a rate limit"),
        pytest.param(Options(full_status=429, full_retry_after=2), 429, "2", id="a rate limit with Retry-After"),
    ],
)
async def test_a_full_server_refuses(
    start_simulator: StartSimulator, options: Options, status: int, after: str | None
) -> None:
    simulator = await start_simulator(
        msgspec.structs.replace(options, max_num_seqs=1, max_num_queued_reqs=2, scenario=ENDLESS)
    )

    async with asked(simulator, 2), httpx.AsyncClient(base_url=simulator.url) as client:
        await eventually(lambda: left(simulator, 2))
        response = await client.post(PATH, json=REQUEST)

        assert response.status_code == status
        assert response.headers.get("retry-after") == after
        if status == 503:
            assert response.json() == {"error": FULL}
        if status == 200:
            event, done = response.text.strip().split("\n\n")
            assert msgspec.json.decode(event.removeprefix("data: ")) == {"error": FULL}
            assert done == "data: [DONE]"
        assert simulator.scheduler.admitted == 2


async def test_a_draining_server_ends_its_streams_and_refuses_others_before_it_goes(
    start_simulator: StartSimulator,
) -> None:
    clock = SteeredClock()
    simulator = await start_simulator(Options(scenario=Scenario(rate=1)), clock=clock)

    async with asked(simulator, 2) as tasks, httpx.AsyncClient(base_url=simulator.url) as client:
        await eventually(lambda: left(simulator, 2))
        draining = asyncio.create_task(simulator.drain())
        await asyncio.sleep(0)

        refused = await client.post(PATH, json=REQUEST)
        assert refused.status_code == 500
        assert refused.json() == {
            "error": {
                "message": "cannot schedule new futures after shutdown",
                "type": "InternalServerError",
                "param": None,
                "code": 500,
            }
        }
        assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 500
        assert (await client.get("/health")).status_code == 200

        clock.hurry()
        await draining
        for body in await asyncio.gather(*tasks):
            assert body.text.endswith("data: [DONE]\n\n")
    async with httpx.AsyncClient(base_url=simulator.url) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")


async def test_the_time_of_a_server_is_measured(start_simulator: StartSimulator) -> None:
    simulator = await start_simulator(Options(max_num_seqs=2, scenario=Scenario(first_token=0.05)))

    async with asked(simulator, 1) as tasks:
        await asyncio.gather(*tasks)

    scheduler = simulator.scheduler
    assert 0.05 <= scheduler.busy_seconds <= scheduler.capacity_seconds

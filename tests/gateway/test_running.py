"""The list of what runs now: one's own requests, and those of all for an operator."""

import httpx
import pytest
from conftest import StartSimulator
from gateway_fixtures import KEY_A, KEY_ALL, KEYS, StartGateway
from raw_posts import RawPost
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.sandbox.simulator.server import Options, Scenario, Simulator

REQUEST = {"model": "reciter", "messages": [{"role": "user", "content": "Tell me a long story"}]}


@pytest.fixture
async def simulator(start_simulator: StartSimulator) -> Simulator:
    """So slow that a request runs until the test cancels it."""
    return await start_simulator(Options(scenario=Scenario(rate=2.0)))


@pytest.mark.usefixtures("worker")
async def test_an_operator_sees_what_runs_for_all_services_and_others_see_their_own(
    start_gateway: StartGateway, http: httpx.AsyncClient, client: Client
) -> None:
    gateway = await start_gateway(keys=KEYS)

    async def running(key: str) -> set[str]:
        response = await http.get(f"{gateway.url}/requests", headers={"Authorization": f"Bearer {key}"})
        return {found["id"] for found in response.json()["requests"] if found["state"] == "running"}

    headers = {"Authorization": f"Bearer {KEY_A}"}
    of_a = (await http.post(f"{gateway.url}/requests", json=REQUEST, headers=headers)).json()["id"]
    of_a_service = await client.enqueue(REQUEST)

    async def all_are_listed() -> bool:
        return await running(KEY_ALL) == {of_a, of_a_service}

    await eventually(all_are_listed)
    assert await running(KEY_A) == {of_a}
    for request_id in (of_a, of_a_service):
        await client.cancel(request_id)
    assert await running(KEY_ALL) == set()


async def test_a_request_that_is_not_added_is_not_counted(
    start_gateway: StartGateway, http: httpx.AsyncClient, redis: Redis
) -> None:
    """Without limits, a request is counted once it is added."""
    gateway = await start_gateway()
    await redis.set("chat:jobs", "of another program", ex=60)
    response = await http.post(f"{gateway.url}/v1/chat/completions", json=REQUEST)
    assert response.status_code == 500
    assert [key async for key in redis.scan_iter("chat:gateway:running:*")] == []
    await redis.delete("chat:jobs")
    added = await RawPost.send(gateway.port, {**REQUEST, "stream": True})

    async def is_counted() -> bool:
        return [await redis.zcard(key) async for key in redis.scan_iter("chat:gateway:running:*")] == [1]

    await eventually(is_counted)
    added.close()

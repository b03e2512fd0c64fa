"""A gateway whose user of Redis has the documented rights alone."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from acl import acl
from conftest import StartWorker
from gateway_fixtures import KEY_A, StartGateway
from redis.asyncio import Redis
from serving import EventReader
from waits import eventually

from worker.gateway.keys import hash_of
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator
from worker.telemetry.logging import configure_logging

MESSAGES = [{"role": "user", "content": "Who are you?"}]
KEYS = (
    f'[[keys]]\nname = "a"\nhash = "{hash_of(KEY_A)}"\nin_flight = 3\nqueued = 3\nrequests_per_minute = 100\n'
)  # fmt: skip


@pytest.fixture
async def user_url(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The URL of the user that deploy/README.md defines for gateways."""
    await redis.execute_command("ACL SETUSER", *acl("gateway"))  # type: ignore[no-untyped-call]  # so in redis-py 8.1
    await redis.acl_log_reset()
    yield redis_url.replace("//", "//gateway:PASSWORD@")
    await redis.acl_deluser("gateway")


async def test_a_missing_right_is_a_500_without_its_reason_which_is_in_the_log(
    redis: Redis,
    user_url: str,
    http: httpx.AsyncClient,
    start_gateway: StartGateway,
    capfd: pytest.CaptureFixture[str],
) -> None:
    await redis.execute_command("ACL SETUSER", "gateway", "-evalsha")  # type: ignore[no-untyped-call]
    served = await start_gateway(redis_url=user_url)
    configure_logging("json", "warning")
    response = await http.post(f"{served.url}/requests", json={"messages": MESSAGES})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "eval" not in response.text
    logged = capfd.readouterr().err
    assert "request_failed" in logged
    assert "eval" in logged


async def test_with_the_documented_rights_nothing_is_refused(
    redis: Redis,
    user_url: str,
    http: httpx.AsyncClient,
    start_gateway: StartGateway,
    start_worker: StartWorker,
    simulator: Simulator,
) -> None:
    served = await start_gateway(redis_url=user_url, keys=KEYS, queue_limit=100)
    headers = {"Authorization": f"Bearer {KEY_A}"}

    async def post() -> httpx.Response:
        return await http.post(f"{served.url}/requests", json={"messages": MESSAGES}, headers=headers)

    ids = [(await post()).json()["id"] for _ in range(3)]
    assert (await post()).status_code == 429, "at the limit the state of others is read"
    waits = ids[0]
    assert (await http.get(f"{served.url}/requests/{waits}", headers=headers)).json()["state"] == "queued"
    assert (await http.get(f"{served.url}/requests", headers=headers)).status_code == 200
    await start_worker(simulator)
    for request_id in ids:
        events = await EventReader.open(served.port, f"/requests/{request_id}/events", **headers)
        async with asyncio.timeout(60):
            assert (await events.entries())[-1]["type"] == "done"
    answer = {"model": "reciter", "messages": MESSAGES}

    async def is_admitted() -> bool:
        url = f"{served.url}/v1/chat/completions"
        return (await http.post(url, json=answer, headers=headers)).status_code == 200

    await eventually(is_admitted)  # a full tenant is refused for a moment without another look
    for more in ({}, {"stream": True}):
        for retry in ("0", "1"):
            response = await http.post(
                f"{served.url}/v1/chat/completions",
                json=answer | more,
                headers=headers | {"x-stainless-retry-count": retry},
            )
            assert response.status_code == 200, response.text
    assert answer_to(MESSAGES) in "".join((await http.get(f"{served.url}/requests/{waits}", headers=headers)).text)
    assert (await http.get(f"{served.url}/v1/models", headers=headers)).status_code == 200
    assert (await http.delete(f"{served.url}/requests/{waits}", headers=headers)).status_code < 300
    refused = {str(entry["object"]) for entry in await redis.acl_log()}
    assert {each for each in refused if not each.startswith("client")} == set()  # how redis-py introduces itself

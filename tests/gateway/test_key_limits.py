"""The limits of keys: counted in Redis by all replicas together."""

import asyncio

import httpx
import pytest
from conftest import StartSimulator, StartWorker
from gateway_fixtures import KEY_A, KEY_B, Served, StartGateway
from proxy import Proxy
from redis.asyncio import Redis
from rooms import plain_room
from waits import eventually

from worker import Client, State
from worker.contract.keys import Keys
from worker.gateway.ids import new_id, owner_hash
from worker.gateway.keys import hash_of
from worker.gateway.limits import LOOKS_EVERY
from worker.sandbox.simulator.server import Options, Scenario

MESSAGES = [{"role": "user", "content": "Who are you?"}]
OWNER = "key:a"


def keys(**limits: int) -> str:
    own = "".join(f"{name} = {value}\n" for name, value in limits.items())
    return f'[[keys]]\nname = "a"\nhash = "{hash_of(KEY_A)}"\n{own}[[keys]]\nname = "b"\nhash = "{hash_of(KEY_B)}"\n'


async def begin(http: httpx.AsyncClient, served: Served, request_id: str, key: str = KEY_A) -> httpx.Response:
    return await http.post(f"{served.url}/start/{request_id}", headers={"Authorization": f"Bearer {key}"})


async def test_requests_in_flight_are_limited_over_all_replicas(
    start_gateway: StartGateway, http: httpx.AsyncClient
) -> None:
    one, two = [await start_gateway(rooms=(plain_room,), keys=keys(in_flight=10)) for _ in range(2)]
    ids = [new_id(OWNER) for _ in range(40)]
    responses = await asyncio.gather(*(begin(http, (one, two)[n % 2], ids[n]) for n in range(40)))
    assert sorted(response.status_code for response in responses) == [202] * 10 + [429] * 30
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (await begin(http, one, new_id("key:b"), KEY_B)).status_code == 202, "another key has its own"
    counted = next(
        request_id for request_id, response in zip(ids, responses, strict=True) if response.status_code == 202
    )
    assert (await begin(http, two, counted)).status_code == 202, "the same request counts once"
    await one.gateway.services.limits.ended(OWNER, counted)
    assert (await begin(http, two, new_id(OWNER))).status_code == 202


async def test_a_request_that_ended_while_nobody_followed_does_not_count(
    start_gateway: StartGateway, http: httpx.AsyncClient, client: Client
) -> None:
    served = await start_gateway(rooms=(plain_room,), keys=keys(in_flight=1))
    first = new_id(OWNER)
    assert (await begin(http, served, first)).status_code == 202
    await client.enqueue({"messages": MESSAGES}, id=first)
    assert (await begin(http, served, new_id(OWNER))).status_code == 429
    await client.cancel(first)

    async def another_may_begin() -> bool:
        return (await begin(http, served, new_id(OWNER))).status_code == 202

    await eventually(another_may_begin)
    assert first not in await served.gateway.services.limits.running(OWNER)


async def test_requests_whose_ends_no_gateway_saw_are_forgotten(
    gateway: Served, http: httpx.AsyncClient, client: Client
) -> None:
    """Their ids would take memory of Redis for a day."""
    for _ in range(LOOKS_EVERY - 1):
        await client.cancel((await http.post(f"{gateway.url}/requests", json={"messages": MESSAGES})).json()["id"])
    latest = (await http.post(f"{gateway.url}/requests", json={"messages": MESSAGES})).json()["id"]
    assert await gateway.gateway.services.limits.running("") == [latest]


@pytest.mark.parametrize("own", [{}, {"Idempotency-Key": "k"}], ids=["no key", "key"])
async def test_a_request_that_is_refused_does_not_count(
    start_gateway: StartGateway, http: httpx.AsyncClient, own: dict[str, str]
) -> None:
    served = await start_gateway(keys=keys(in_flight=1))
    headers = {"Authorization": f"Bearer {KEY_A}"}
    refused = await http.post(f"{served.url}/requests", json={"messages": []}, headers=headers | own)
    assert refused.status_code == 400
    added = await http.post(f"{served.url}/requests", json={"messages": MESSAGES}, headers=headers)
    assert added.status_code == 202


async def test_waiting_requests_are_limited_and_a_started_one_does_not_count(
    start_gateway: StartGateway, http: httpx.AsyncClient, start_simulator: StartSimulator, start_worker: StartWorker,
    client: Client,
) -> None:  # fmt: skip
    served = await start_gateway(keys=keys(queued=2))
    headers, body = {"Authorization": f"Bearer {KEY_A}"}, {"messages": MESSAGES}

    async def add() -> httpx.Response:
        return await http.post(f"{served.url}/requests", json=body, headers=headers)

    added = [await add() for _ in range(3)]
    assert [response.status_code for response in added] == [202, 202, 429]
    worker = await start_worker(await start_simulator(Options(scenario=Scenario(rate=1, tokens=500))), drain_timeout=0)
    ids = [response.json()["id"] for response in added[:2]]

    async def are_running() -> bool:
        return [(await client.status(request_id)).state for request_id in ids] == [State.RUNNING] * 2

    await eventually(are_running)

    async def another_is_added() -> bool:  # a full tenant is refused for a moment without another look
        if (response := await add()).status_code == 202:
            ids.append(response.json()["id"])
        return len(ids) == 3

    await eventually(another_is_added)
    for request_id in ids:
        await client.cancel(request_id)
    worker.stop()


async def test_requests_a_minute_are_limited_and_reads_count(
    start_gateway: StartGateway, http: httpx.AsyncClient
) -> None:
    served = await start_gateway(rooms=(plain_room,), keys=keys(requests_per_minute=3))
    served.gateway.services.limits._now = lambda: 1_000_000_075.0
    request_id, headers = new_id(OWNER), {"Authorization": f"Bearer {KEY_A}"}
    assert (await begin(http, served, request_id)).status_code == 202
    assert (await http.get(f"{served.url}/read/{request_id}", headers=headers)).status_code == 200
    assert (await begin(http, served, new_id(OWNER))).status_code == 202
    refused = await http.get(f"{served.url}/read/{request_id}", headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    in_band = await http.get(f"{served.url}/read/{request_id}", headers=headers | {"Accept": "text/event-stream"})
    assert in_band.status_code == 200
    assert in_band.text.startswith("retry: 5000\nevent: busy\ndata: {")
    served.gateway.services.limits._now = lambda: 1_000_000_081.0
    assert (await http.get(f"{served.url}/read/{request_id}", headers=headers)).status_code == 200


async def test_the_body_of_a_key_is_limited(start_gateway: StartGateway, http: httpx.AsyncClient) -> None:
    served = await start_gateway(rooms=(plain_room,), keys=keys(max_body_bytes=100))
    body = {"x": "y" * 200}
    for key, status in ((KEY_A, 413), (KEY_B, 200)):
        response = await http.post(f"{served.url}/echo", headers={"Authorization": f"Bearer {key}"}, json=body)
        assert response.status_code == status


async def test_all_counts_expire_and_are_apart_in_keys_that_show_no_name(
    start_gateway: StartGateway, http: httpx.AsyncClient, redis: Redis
) -> None:
    served = await start_gateway(
        rooms=(plain_room,), keys=keys(in_flight=5, queued=5, requests_per_minute=5)
    )  # fmt: skip
    await begin(http, served, new_id(OWNER))
    found = [name.decode() async for name in redis.scan_iter("chat:gateway:*")]
    names = [name for name in found if name != Keys().gateway_processes]
    assert len(names) == 3
    assert Keys().running(owner_hash(OWNER)) in names
    assert all([await redis.ttl(name) > 0 for name in names])


@pytest.mark.parametrize("outage", ["refuses connections", "hangs"])
async def test_a_redis_that_is_away_is_a_503_and_never_a_crash(
    start_gateway: StartGateway, http: httpx.AsyncClient, redis_proxy: Proxy, outage: str
) -> None:
    served = await start_gateway(
        rooms=(plain_room,), keys=keys(in_flight=5), patience=1, redis_url=redis_proxy.redis_url
    )  # fmt: skip

    async def one_may_begin() -> bool:
        return (await begin(http, served, new_id(OWNER))).status_code == 202

    await eventually(one_may_begin)
    if outage == "hangs":
        redis_proxy.half_open()
    else:
        redis_proxy.refuse()
        await redis_proxy.cut()
    response = await begin(http, served, new_id(OWNER))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert int(response.headers["retry-after"]) > 0
    assert (await http.get(f"{served.url}/healthz")).status_code == 200

    async def is_ready() -> bool:
        return (await http.get(f"{served.url}/readyz")).status_code == 200

    async def is_not_ready() -> bool:
        return not await is_ready()

    await eventually(is_not_ready)
    await redis_proxy.heal()
    await eventually(is_ready)
    await eventually(one_may_begin)

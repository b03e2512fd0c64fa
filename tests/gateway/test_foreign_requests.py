"""The requests of others, on every route: the same answer as for requests that do not exist."""

import base64
import re

import httpx
import pytest
from conftest import StartSimulator, StartWorker
from gateway_fixtures import KEY_A, KEY_ALL, KEY_B, KEYS, SECRET, Served, StartGateway
from redis.asyncio import Redis
from waits import eventually
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from worker.gateway.ids import new_id
from worker.gateway.tokens import ReadTokens
from worker.sandbox.simulator.server import Options

BODY = {"messages": [{"role": "user", "content": "Who are you?"}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def served(start_gateway: StartGateway) -> Served:
    return await start_gateway(keys=KEYS, heartbeat=0.2)


@pytest.fixture
async def request_of_a(served: Served, http: httpx.AsyncClient) -> str:
    response = await http.post(f"{served.url}/requests", json=BODY, headers=bearer(KEY_A))
    assert response.status_code == 202
    return str(response.json()["id"])


ROUTES = [
    ("GET", "/requests/{id}"),
    ("HEAD", "/requests/{id}"),
    ("GET", "/requests/{id}?wait=0"),
    ("GET", "/requests/{id}/events"),
    ("HEAD", "/requests/{id}/events"),
    ("GET", "/requests/{id}/events?after=1-0"),
    ("DELETE", "/requests/{id}"),
    ("GET", "/events?ids={id}"),
]


async def _answers(
    http: httpx.AsyncClient, served: Served, request_id: str, **options: object
) -> list[tuple[int, str]]:
    """The status and text of each route for an id, without the id itself."""
    found = []
    for method, path in ROUTES:
        response = await http.request(method, served.url + path.format(id=request_id), **options)  # type: ignore[arg-type]
        found.append((response.status_code, response.text.replace(request_id, "")))
    return found


async def test_the_requests_of_others_look_like_requests_that_do_not_exist(
    served: Served, http: httpx.AsyncClient, request_of_a: str, redis: Redis
) -> None:
    foreign = await _answers(http, served, request_of_a, headers=bearer(KEY_B))
    assert {status for status, _ in foreign} == {404}
    for unknown in (new_id("key:a"), new_id("tenant:b-tenant"), "invented", "0" * 48):
        assert await _answers(http, served, unknown, headers=bearer(KEY_B)) == foreign
    listed = await http.get(f"{served.url}/requests", headers=bearer(KEY_B))
    assert request_of_a not in listed.text
    state = await http.get(f"{served.url}/requests/{request_of_a}", headers=bearer(KEY_A))
    assert state.json()["state"] == "queued", "nobody has cancelled it"
    assert await redis.xlen("chat:jobs") == 1


async def test_a_token_of_another_request_and_none_at_all_open_no_route(
    served: Served, http: httpx.AsyncClient, request_of_a: str
) -> None:
    own = await http.post(f"{served.url}/requests", json=BODY, headers=bearer(KEY_B))
    for headers in ({}, bearer(own.json()["token"]), bearer("vr_wrong")):
        assert {status for status, _ in await _answers(http, served, request_of_a, headers=headers)} == {401}


async def _close_code(served: Served, request_id: str, secret: str) -> int:
    text = base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")
    url = f"{served.url.replace('http', 'ws')}/requests/{request_id}/ws"
    offered = [Subprotocol("vllm-relay.v1"), Subprotocol(f"bearer.{text}")]
    async with connect(url, subprotocols=offered) as socket:
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd
    return closed.value.rcvd.code


async def test_a_websocket_of_another_request_is_closed_with_a_code(served: Served, request_of_a: str) -> None:
    assert await _close_code(served, request_of_a, KEY_B) == 4404
    assert await _close_code(served, new_id("tenant:b-tenant"), KEY_B) == 4404
    forged = ReadTokens("x" * 32).token_for(request_of_a)
    expired = ReadTokens(SECRET, clock=lambda: 0.0).token_for(request_of_a)
    for token in (forged, expired):
        assert await _close_code(served, request_of_a, str(token)) == 4401


async def test_the_same_idempotency_key_of_two_tenants_is_two_requests(served: Served, http: httpx.AsyncClient) -> None:
    ids = set()
    for key in (KEY_A, KEY_B, KEY_A):
        headers = bearer(key) | {"Idempotency-Key": "order-17"}
        response = await http.post(f"{served.url}/requests", json=BODY, headers=headers)
        assert response.status_code in {200, 202}
        ids.add(response.json()["id"])
    assert len(ids) == 2


async def test_an_operator_sees_and_cancels_the_requests_of_all(
    served: Served, http: httpx.AsyncClient, request_of_a: str
) -> None:
    state = await http.get(f"{served.url}/requests/{request_of_a}", headers=bearer(KEY_ALL))
    assert state.json()["state"] == "queued"
    assert (await http.delete(f"{served.url}/requests/{request_of_a}", headers=bearer(KEY_ALL))).status_code < 300


@pytest.fixture
async def limited(start_gateway: StartGateway) -> Served:
    text = re.sub(r'(name = "a"\n)', r'\1queues = ["batch"]\n', KEYS)
    return await start_gateway(keys=text, queue="default")


async def test_a_key_uses_its_queues_alone(limited: Served, http: httpx.AsyncClient, redis: Redis) -> None:
    for body, status in ((BODY, 403), (BODY | {"relay": {"queue": "batch"}}, 202)):
        response = await http.post(f"{limited.url}/requests", json=body, headers=bearer(KEY_A))
        assert response.status_code == status, response.text
    chat = await http.post(f"{limited.url}/v1/chat/completions", json=BODY | {"model": "m"}, headers=bearer(KEY_A))
    assert (chat.status_code, chat.json()["error"]["code"]) == (403, "queue_not_allowed")
    assert not await redis.exists("chat:jobs")
    await redis.delete("chat:jobs:batch")


async def test_a_key_sees_the_models_of_its_queues_alone(
    limited: Served, http: httpx.AsyncClient, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    for queue, model in (("batch", "small"), ("default", "large")):
        await start_worker(await start_simulator(Options(model=model)), queues=queue)

    async def models(key: str) -> list[str]:
        response = await http.get(f"{limited.url}/v1/models", headers=bearer(key))
        return [model["id"] for model in response.json()["data"]]

    async def are_all_listed() -> bool:
        return await models(KEY_ALL) == ["large", "small"]

    await eventually(are_all_listed)
    assert await models(KEY_A) == ["small"]
    for model, status in (("small", 200), ("large", 404)):
        response = await http.get(f"{limited.url}/v1/models/{model}", headers=bearer(KEY_A))
        assert response.status_code == status


@pytest.mark.parametrize(
    "after",
    ["abc", "1-", "-", "1-1-1", "99999999999999999999-1", "1-1\x00", "\u0661-\u0661", " 1-1", "1-1\n", "+1-1", "1e3-1"],
)
async def test_a_malformed_cursor_is_a_400(
    served: Served, http: httpx.AsyncClient, request_of_a: str, after: str
) -> None:
    response = await http.get(
        f"{served.url}/requests/{request_of_a}/events", params={"after": after}, headers=bearer(KEY_A)
    )
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

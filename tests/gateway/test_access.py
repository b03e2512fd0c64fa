"""Who may: API keys, read tokens, ids of others, origins, and what starts without authentication."""

import asyncio
import base64
from pathlib import Path

import httpx
import pytest
from gateway_fixtures import KEY_A, KEY_ALL, KEY_B, KEYS, SECRET, Served, StartGateway
from rooms import plain_room
from serving import Events
from waits import eventually
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from worker.gateway.ids import belongs, id_of_key, new_id
from worker.gateway.keys import KeyRing, hash_of, new_key, parse_keys
from worker.gateway.settings import ConfigError, load_gateway_settings
from worker.gateway.tokens import ReadTokens
from worker.telemetry.gateway_events import ApiKeysUnreadable

A, B = "key:a", "tenant:b-tenant"


@pytest.fixture
async def served(start_gateway: StartGateway) -> Served:
    return await start_gateway(rooms=(plain_room,), keys=KEYS, cors_origins="https://app.example.com")


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def token_for(request_id: str, secret: str = SECRET, now: float | None = None) -> str:
    tokens = ReadTokens(secret) if now is None else ReadTokens(secret, clock=lambda: now)
    found = tokens.token_for(request_id)
    assert found
    return found


# Ids


def test_an_id_shows_whom_it_belongs_to() -> None:
    request_id = new_id(A)
    assert belongs(request_id, A)
    assert not belongs(request_id, B)
    assert not belongs(request_id, "")
    assert id_of_key(A, "order-17") == id_of_key(A, "order-17")
    assert id_of_key(A, "order-17") != id_of_key(B, "order-17")
    assert belongs(id_of_key(A, "order-17"), A)


@pytest.mark.parametrize(
    "text", ["", "x", "0" * 48, "A" * 48, id_of_key(A, "k").upper(), id_of_key(A, "k") + "\n", "\u0661" * 48]
)
def test_other_texts_belong_to_nobody(text: str) -> None:
    assert not belongs(text, A)


def test_owners_and_keys_that_join_to_the_same_text_differ() -> None:
    assert id_of_key("ab", "c") != id_of_key("a", "bc")


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {KEY_A}"},
        {"Authorization": KEY_A},
        bearer("vr_wrong"),
        bearer(KEY_A.upper()),
        bearer(KEY_A + "x"),
        bearer("x" * 10_000),
        bearer(hash_of(KEY_A)),
        bearer("\xff"),
        {"X-Api-Key": KEY_A},
        {"Cookie": KEY_A},
    ],
)
async def test_without_a_valid_key_every_route_is_a_401(
    served: Served, http: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for method, path in [("POST", "/echo"), ("POST", "/start/x"), ("GET", f"/read/{new_id(A)}"), ("DELETE", "/read/x")]:
        response = await http.request(method, served.url + path, headers=raw, content=b"{}")
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


async def test_a_key_is_accepted_and_says_whom_requests_belong_to(served: Served, http: httpx.AsyncClient) -> None:
    for key, owner in ((KEY_A, A), (KEY_B, B)):
        response = await http.post(f"{served.url}/echo", headers=bearer(key), json={"x": 1})
        assert response.json() == {"owner": owner, "fields": ["x"]}
    lower = await http.post(f"{served.url}/echo", headers={"Authorization": f"bearer {KEY_A}"}, json={})
    assert lower.status_code == 200


async def test_ids_of_others_and_ids_that_do_not_exist_get_the_same_answer(
    served: Served, http: httpx.AsyncClient
) -> None:
    answers = set()
    for request_id in (new_id(B), new_id("key:nobody"), "invented", "0" * 48):
        for method in ("GET", "DELETE"):
            response = await http.request(method, f"{served.url}/read/{request_id}", headers=bearer(KEY_A))
            answers.add((response.status_code, response.text))
    assert len(answers) == 1
    assert answers.pop()[0] == 404


async def test_an_operator_sees_the_requests_of_all(served: Served, http: httpx.AsyncClient) -> None:
    for request_id in (new_id(A), new_id(B), "made-by-worker-enqueue"):
        response = await http.get(f"{served.url}/read/{request_id}", headers=bearer(KEY_ALL))
        assert response.status_code == 200


async def test_a_key_in_the_url_is_no_key(served: Served, http: httpx.AsyncClient) -> None:
    response = await http.get(f"{served.url}/read/{new_id(A)}", params={"token": KEY_A})
    assert response.status_code == 401


async def test_a_changed_file_of_keys_takes_effect(
    start_gateway: StartGateway, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    served = await start_gateway(rooms=(plain_room,), keys_file=str(file))

    async def status(key: str) -> int:
        return (await http.post(f"{served.url}/echo", headers=bearer(key), json={})).status_code

    assert await status(KEY_A) == 200
    newer = new_key()
    _replace(file, f'[[keys]]\nname = "new"\nhash = "{hash_of(newer)}"\n')

    async def newer_is_valid() -> bool:
        return await status(newer) == 200

    await eventually(newer_is_valid)
    assert await status(KEY_A) == 401


def test_a_file_of_keys_that_becomes_bad_is_reported_and_the_former_keys_stay(tmp_path: Path) -> None:
    file, now = tmp_path / "keys.toml", 0.0
    file.write_text(KEYS)
    events = Events()
    ring = KeyRing(file=file, telemetry=events, clock=lambda: now)
    _replace(file, "[[keys]]\nname = 'broken")
    now = 60.0
    assert ring.find(KEY_A) is not None
    assert [type(event) for event in events.seen] == [ApiKeysUnreadable]


def _replace(file: Path, text: str) -> None:
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[keys", "cannot be read"),
        ("[[keys]]\nname = 'a'", "hash"),
        ("[[keys]]\nname = 'a'\nhash = 'plain-key'", "hash"),
        (f"[[keys]]\nname = 'a'\nhash = '{'0' * 64}'\ninflight = 3", "inflight"),
        (f"[[keys]]\nname = 'a'\nhash = '{'0' * 64}'\nin_flight = 0", "in_flight"),
        (f"[[keys]]\nname = 'a'\nhash = '{'0' * 64}'\nqueues = ['a b']", "a b"),
        (f"[[keys]]\nname = 'a'\nhash = '{'0' * 64}'\n" * 2, "two keys"),
        ("[[key]]\nname = 'a'", "key"),
    ],
)
def test_a_bad_file_of_keys_is_refused_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_keys(text, "keys.toml")


# Read tokens


@pytest.mark.parametrize("place", ["header", "url"])
async def test_a_read_token_reads_its_request_any_number_of_times(
    served: Served, http: httpx.AsyncClient, place: str
) -> None:
    request_id = new_id(A)
    token = token_for(request_id)
    for _ in range(3):
        given = {"headers": bearer(token)} if place == "header" else {"params": {"token": token}}
        response = await http.get(f"{served.url}/read/{request_id}", **given)  # type: ignore[arg-type]
        assert response.status_code == 200


async def test_a_read_token_does_nothing_else(served: Served, http: httpx.AsyncClient) -> None:
    request_id = new_id(A)
    token = token_for(request_id)
    for method, path in (("DELETE", f"/read/{request_id}"), ("POST", "/echo"), ("POST", f"/start/{request_id}")):
        response = await http.request(method, served.url + path, headers=bearer(token), content=b"{}")
        assert response.status_code == 401
        response = await http.request(method, served.url + path, params={"token": token}, content=b"{}")
        assert response.status_code == 401


async def test_forged_expired_and_foreign_tokens_are_refused(served: Served, http: httpx.AsyncClient) -> None:
    request_id = new_id(A)
    good = token_for(request_id)
    prefix, expires, signature = good.split("_", 2)
    later = f"{int(expires, 16) + 1000:x}"
    bad = [
        token_for(new_id(A)),
        token_for(request_id, secret="another secret of 32 characters!!"),
        token_for(request_id, now=0.0),
        f"{prefix}_{later}_{signature}",
        f"{prefix}_{expires}_{signature[:-1]}",
        f"{prefix}_{expires}_{signature}=",
        f"{prefix}_{expires}_{signature}\n",
        f"{prefix}_{expires}_",
        f"{prefix}_{'f' * 5000}_{signature}",
        "rt_",
    ]
    for token in bad:
        response = await http.get(f"{served.url}/read/{request_id}", params={"token": token})
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), token
    response = await http.get(f"{served.url}/read/{request_id}", params={"token": [*bad, good]})
    assert response.status_code == 200


def test_a_token_of_either_secret_is_valid_so_that_secrets_can_be_rotated() -> None:
    old, new = "o" * 32, "n" * 32
    request_id = new_id(A)
    before, during, after = ReadTokens(old), ReadTokens(new, old), ReadTokens(new)
    assert during.is_valid(str(before.token_for(request_id)), request_id)
    assert ReadTokens(old, new).is_valid(str(during.token_for(request_id)), request_id)
    assert after.is_valid(str(during.token_for(request_id)), request_id)
    assert not after.is_valid(str(before.token_for(request_id)), request_id)


# WebSocket


def _subprotocol(text: str) -> str:
    return "bearer." + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


async def _open(served: Served, request_id: str, *offered: str, **headers: str) -> ClientConnection:
    url = f"{served.url.replace('http', 'ws')}/socket/{request_id}"
    return await connect(
        url, subprotocols=[Subprotocol(name) for name in offered], additional_headers=headers, compression="deflate"
    )


async def test_a_websocket_is_opened_by_a_token_in_the_subprotocol_which_is_not_echoed(served: Served) -> None:
    request_id = new_id(A)
    for text in (token_for(request_id), KEY_A):
        async with await _open(served, request_id, "vllm-relay.v1", _subprotocol(text)) as socket:
            assert socket.subprotocol == "vllm-relay.v1"
            assert not socket.protocol.extensions, "compression is off"
            await socket.send("hello")
            assert await socket.recv() == "hello"


@pytest.mark.parametrize(
    ("text", "code"), [("rt_6b0c81b4_" + "A" * 43, 4401), ("vr_wrong", 4401), ("", 4401), (KEY_B, 4404)]
)
async def test_a_refused_websocket_is_accepted_and_then_closed_with_a_code_that_browsers_see(
    served: Served, text: str, code: int
) -> None:
    async with await _open(served, new_id(A), "vllm-relay.v1", _subprotocol(text)) as socket:
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd
    assert closed.value.rcvd.code == code


@pytest.mark.parametrize("offered", ["bearer.%%%", "bearer.", "bearer.w_-", "bearer." + "A" * 5000])
async def test_a_subprotocol_that_is_no_token_is_a_401(served: Served, offered: str) -> None:
    raw = (
        f"GET /socket/{new_id(A)} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(b'0' * 16).decode()}\r\n"
        f"Sec-WebSocket-Protocol: vllm-relay.v1, {offered}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(raw.encode())
    async with asyncio.timeout(300):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 400 ")), head
        if head.startswith(b"HTTP/1.1 101 "):
            frame = await reader.readexactly(4)
            assert int.from_bytes(frame[2:4], "big") == 4401
    writer.close()


async def test_a_page_of_another_origin_cannot_open_a_websocket(served: Served) -> None:
    request_id = new_id(A)
    offered = ("vllm-relay.v1", _subprotocol(KEY_A))
    async with await _open(served, request_id, *offered, Origin="https://evil.example.com") as socket:
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 4403
    for origin in ("https://app.example.com", served.url):
        async with await _open(served, request_id, *offered, Origin=origin) as socket:
            await socket.send("hello")
            assert await socket.recv() == "hello"


async def test_a_large_message_closes_a_websocket(served: Served) -> None:
    async with await _open(served, new_id(A), "vllm-relay.v1", _subprotocol(KEY_ALL)) as socket:
        await socket.send("x" * 200_000)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1009


# Origins

OPENAI_ASKS = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version"
)


async def test_a_preflight_of_openai_in_the_browser_is_answered_before_authentication(
    served: Served, http: httpx.AsyncClient
) -> None:
    response = await http.options(
        f"{served.url}/echo",
        headers={
            "Origin": "https://app.example.com",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": OPENAI_ASKS,
        },
    )
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example.com"
    assert response.headers["access-control-max-age"] == "600"
    assert response.headers["access-control-allow-headers"] == OPENAI_ASKS
    assert {"POST", "DELETE", "GET"} <= set(response.headers["access-control-allow-methods"].split(", "))


async def test_pages_see_the_headers_that_clients_use_also_of_refusals(served: Served, http: httpx.AsyncClient) -> None:
    response = await http.post(f"{served.url}/echo", headers={"Origin": "https://app.example.com"}, content=b"{}")
    assert response.status_code == 401
    exposed = {name.lower() for name in response.headers["access-control-expose-headers"].split(", ")}
    assert exposed == {
        "location", "x-request-id", "retry-after", "retry-after-ms", "x-should-retry", "x-workflow-run-id",
    }  # fmt: skip
    assert response.headers["access-control-allow-origin"] == "https://app.example.com"
    assert response.headers["referrer-policy"] == "no-referrer"


async def test_a_page_of_another_origin_gets_no_right(served: Served, http: httpx.AsyncClient) -> None:
    headers = {"Origin": "https://evil.example.com", "Access-Control-Request-Method": "POST"}
    preflight = await http.options(f"{served.url}/echo", headers=headers)
    assert preflight.status_code == 400
    assert "access-control-allow-origin" not in preflight.headers


async def test_without_authentication_no_other_page_and_no_other_name_reaches_the_gateway(
    start_gateway: StartGateway, http: httpx.AsyncClient
) -> None:
    """A page could send a simple POST without a preflight, or let its own name lead to 127.0.0.1."""
    served = await start_gateway(rooms=(plain_room,))
    page = await http.post(f"{served.url}/echo", headers={"Origin": "https://evil.example.com"}, content=b"{}")
    assert (page.status_code, page.json()["error"]["code"]) == (403, "origin_not_allowed")
    name = await http.post(f"{served.url}/echo", headers={"Host": f"evil.example.com:{served.port}"}, content=b"{}")
    assert (name.status_code, name.json()["error"]["code"]) == (403, "host_not_allowed")
    own = await http.post(f"{served.url}/echo", headers={"Origin": served.url}, content=b"{}")
    assert own.status_code == 200


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "GATEWAY_KEYS_FILE is empty"),
        ({"no_auth": True, "listen": "0.0.0.0:8080"}, "loopback address"),
        ({"no_auth": True, "listen": "[::]:8080"}, "loopback address"),
        ({"no_auth": True, "listen": "gateway.example.com:8080"}, "127.0.0.1:8080"),
        ({"no_auth": True, "keys": KEYS}, "exclude each other"),
        ({"keys": KEYS}, "GATEWAY_TOKEN_SECRET is empty"),
        ({"keys": KEYS, "token_secret": "short"}, "GATEWAY_TOKEN_SECRET is too short"),
        ({"keys_file": "nowhere.toml", "token_secret": SECRET}, "cannot be read"),
        ({"no_auth": True, "cors_origins": "app.example.com"}, "not an origin"),
        ({"no_auth": True, "listen": "8080"}, "host and a port"),
        ({"no_auth": True, "queue": "a b"}, "A-Za-z0-9_-"),
    ],
)
def test_settings_that_are_unsafe_or_of_no_use_are_refused_with_the_fix(
    settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_gateway_settings(**settings)
    assert "short" not in str(refused.value) or "too short" in str(refused.value)


@pytest.mark.parametrize("listen", ["127.0.0.1:8080", "127.5.5.5:1", "[::1]:8080", "localhost:8080"])
def test_a_gateway_without_authentication_starts_on_loopback(listen: str) -> None:
    assert load_gateway_settings(no_auth=True, listen=listen).listen == listen

"""What is malformed, slow, too large or too much, on real sockets: each is refused, and the process goes on."""

import asyncio
import json
import re
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from gateway_fixtures import Served, StartGateway
from rooms import plain_room
from waits import eventually

from worker.gateway.connections import Bounds
from worker.gateway.listener import HttpListener, bind
from worker.gateway.outlets import Receive, Scope, Send

ENOUGH = 60.0
"""Seconds for what takes a fraction of one."""


@pytest.fixture
async def served(start_gateway: StartGateway) -> Served:
    return await start_gateway(rooms=(plain_room,), header_timeout=ENOUGH, body_timeout=ENOUGH, max_body_bytes=2048)


@pytest.fixture
async def hasty(start_gateway: StartGateway) -> Served:
    """A gateway that soon ends a connection whose head or body does not arrive."""
    return await start_gateway(rooms=(plain_room,), header_timeout=0.5, body_timeout=0.5)


async def exchange(port: int, raw: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes and read up to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    if half_close:
        writer.write_eof()
    try:
        async with asyncio.timeout(ENOUGH):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def parts(response: bytes) -> tuple[int, dict[str, str | None]]:
    """The status and the error of a response."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


POST = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
EMPTY = b"\r\n0\r\n\r\n"
"""The end of a head, and a body without a chunk."""

MALFORMED = {
    "both lengths": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n" + EMPTY,
    "both lengths, the other way": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n" + EMPTY,
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 4\r\n\r\n{}ab",
    "two equal lengths": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a length with a sign": POST + b"Content-Length: +2\r\n\r\n{}",
    "a list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "another encoding": POST + b"Transfer-Encoding: identity\r\n\r\n{}",
    "an encoding after chunked": POST + b"Transfer-Encoding: chunked, gzip\r\n" + EMPTY,
    "an encoding twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n" + EMPTY,
    "a space before the colon": POST + b"Transfer-Encoding : chunked\r\n" + EMPTY,
    "bare line feeds": b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
    "a bare carriage return": b"GET /healthz HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n",
    "a folded header": GET + b"X: y\r\n z\r\n\r\n",
    "a null in a value": GET + b"X: \x00\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: other\r\n\r\n",
    "chunked in HTTP/1.0": b"POST /echo HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n" + EMPTY,
    "a bad chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a chunk with a bare line feed": POST + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n",
    "another version": b"GET /healthz HTTP/3.7\r\nHost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + b"\x07" * 100,
    "an unknown method": b"GRAB /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "letters beyond ASCII in the path": "GET /é HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    "no path": b"GET HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
async def test_a_request_with_two_meanings_or_none_is_refused(served: Served, raw: bytes) -> None:
    status, error = parts(await exchange(served.port, raw))
    assert (status, error["type"]) == (400, "invalid_request_error")


async def test_what_follows_a_malformed_request_is_no_request(served: Served) -> None:
    second = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    response = await exchange(served.port, MALFORMED["both lengths"] + second)
    assert response.count(b"HTTP/1.1 ") == 1


async def test_fields_after_the_body_are_no_headers(served: Served) -> None:
    raw = (
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\n{}\r\n0\r\nAuthorization: Bearer x\r\nHost: other\r\n\r\n"
    )
    assert (await exchange(served.port, raw)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: loc", b"\r\n\r\n"])
async def test_a_head_that_does_not_arrive_ends_the_connection_without_an_answer(hasty: Served, sent: bytes) -> None:
    assert await exchange(hasty.port, sent) == b""


async def test_half_a_head_after_a_whole_request_ends_the_connection(hasty: Served) -> None:
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    response = await exchange(hasty.port, whole + b"GET / HT")
    assert response.count(b"HTTP/1.1 ") == 1
    assert response.endswith(b"ok\n")


async def test_drops_of_a_head_do_not_extend_its_time(hasty: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", hasty.port)

    async def drip() -> None:
        while True:
            writer.write(b"X-More: 1\r\n")
            await asyncio.sleep(0.05)

    writer.write(b"GET /healthz HTTP/1.1\r\n")
    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(ENOUGH):
            assert await reader.read() == b""
    except ConnectionError:
        pass
    finally:
        dripping.cancel()
        writer.close()


async def test_a_body_that_does_not_arrive_ends_the_connection(hasty: Served) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    assert await exchange(hasty.port, head + b"{") == b""


async def test_a_head_that_is_too_large_is_refused(served: Served) -> None:
    status, error = parts(await exchange(served.port, b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 300_000))
    assert (status, error["code"]) == (431, "headers_too_large")


async def test_a_head_that_is_too_large_is_refused_also_if_it_arrives_at_once(served: Served) -> None:
    status, error = parts(await exchange(served.port, GET + b"X: " + b"y" * 70_000 + b"\r\n\r\n"))
    assert (status, error["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("method", [b"POST", b"GET"])
async def test_a_handshake_of_a_websocket_with_a_body_is_refused(served: Served, method: bytes) -> None:
    head = method + b" /requests/abc/ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    status, error = parts(await exchange(served.port, head + b"Content-Length: 3\r\n\r\nabc"))
    assert (status, error["code"]) == (400, "malformed_http")


async def test_200_silent_connections_end_by_themselves_and_stop_nobody(
    start_gateway: StartGateway, http: httpx.AsyncClient
) -> None:
    served = await start_gateway(rooms=(plain_room,), header_timeout=3)
    silent = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(200)]
    assert (await http.get(f"{served.url}/healthz")).status_code == 200
    async with asyncio.timeout(ENOUGH):
        for reader, _ in silent:
            assert await reader.read() == b""
    for _, writer in silent:
        writer.close()


@pytest.mark.parametrize("framing", ["length", "chunks", "length, and closes"])
async def test_a_body_that_is_too_large_is_refused_and_not_echoed(served: Served, framing: str) -> None:
    body = json.dumps({"secret-prompt": "x" * 3_000_000}).encode()
    head = "POST /echo HTTP/1.1\r\nHost: localhost\r\n"
    if framing == "chunks":
        raw = f"{head}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    else:
        raw = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    if "closes" in framing:
        raw = raw.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    else:
        raw += b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    response = await exchange(served.port, raw)
    first = response.partition(b"HTTP/1.1 404")[0]
    status, error = parts(first)
    assert (status, error["code"]) == (413, "request_too_large")
    assert b"secret" not in response
    assert (b"HTTP/1.1 404" in response) == ("closes" not in framing), "the connection can be used again"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"secret": nul}', "invalid_json"),
        (b"[1]", "invalid_request"),
        (b'"secret"', "invalid_request"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"secret": "\xff"}', "invalid_json"),
        (b"[" * 2000, "invalid_json"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused_and_not_quoted(
    served: Served, http: httpx.AsyncClient, body: bytes, code: str
) -> None:
    response = await http.post(f"{served.url}/echo", content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    assert "secret" not in response.text


async def test_the_connection_is_kept_after_a_refusal(served: Served) -> None:
    refused = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n{"
    good = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    response = await exchange(served.port, refused + good)
    assert re.findall(rb"HTTP/1.1 (\d+)", response) == [b"400", b"200"]


async def test_head_gets_the_head_of_a_stream_and_the_connection_goes_on(served: Served) -> None:
    head = b"HEAD /endless HTTP/1.1\r\nHost: localhost\r\n\r\n"
    good = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    response = await exchange(served.port, head + head + good)
    assert response.count(b"HTTP/1.1 200 ") == 3
    assert response.count(b"text/event-stream") == 2
    assert b"begun" not in response


async def test_a_client_that_has_closed_its_half_gets_the_response(served: Served, http: httpx.AsyncClient) -> None:
    slow = asyncio.create_task(exchange(served.port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n", half_close=True))
    for _ in range(10):  # requests on other connections, so that the gateway has read the end of the first
        assert (await http.get(f"{served.url}/healthz", headers={"Connection": "close"})).status_code == 200
    assert not slow.done()
    await http.get(f"{served.url}/release")
    assert (await slow).startswith(b"HTTP/1.1 200 ")


async def test_a_post_whose_client_has_closed_its_half_gets_a_clear_refusal(served: Served) -> None:
    head = b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    assert parts(await exchange(served.port, head, half_close=True))[0] in (400, 405)
    half = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
    assert await exchange(served.port, half, half_close=True) == b""


async def test_a_stream_ends_when_its_client_leaves(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(ENOUGH):
        await reader.readuntil(b": begun\n\n")
    writer.close()

    async def is_gone() -> bool:
        return served.gateway.connections == 0

    await eventually(is_gone)


async def test_more_connections_than_may_be_are_refused_in_a_way_that_clients_understand(
    start_gateway: StartGateway, http: httpx.AsyncClient
) -> None:
    served = await start_gateway(rooms=(plain_room,), max_connections=3, header_timeout=30)
    silent = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(3)]

    async def all_are_open() -> bool:
        return served.gateway.connections == 3

    await eventually(all_are_open)
    refused = await http.get(f"{served.url}/healthz")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert int(refused.headers["retry-after"]) > 0
    in_band = await http.get(f"{served.url}/endless", headers={"Accept": "text/event-stream"})
    assert in_band.status_code == 200, "an EventSource would close for ever"
    assert in_band.text.startswith("retry: ")
    assert "\nevent: busy\ndata: {" in in_band.text
    for _, writer in silent:
        writer.close()


async def test_the_kernel_ends_a_connection_whose_client_acknowledges_nothing(start_gateway: StartGateway) -> None:
    """A connection inherits the options of the listening socket."""
    served = await start_gateway(rooms=(plain_room,), write_timeout=7)
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)

    async def is_open() -> bool:
        return served.gateway.connections == 1

    await eventually(is_open)
    (connection,) = served.gateway._listener._state.connections
    sock = connection.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    writer.close()


async def test_an_error_of_ours_is_a_500_without_its_text(served: Served, http: httpx.AsyncClient) -> None:
    response = await http.get(f"{served.url}/fail")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in response.text


@pytest.mark.parametrize("path", ["/nowhere", "/start", "/echo/", "//", "/%00", "/%ff", "*"])
async def test_an_unknown_path_is_a_404_in_the_shape_of_openai(served: Served, path: str) -> None:
    raw = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    status, error = parts(await exchange(served.port, raw))
    assert status in (400, 404)
    assert set(error) == {"message", "type", "param", "code"}


async def test_a_wrong_method_is_a_405(served: Served, http: httpx.AsyncClient) -> None:
    response = await http.get(f"{served.url}/echo")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in response.headers["allow"]


async def test_a_reset_in_the_middle_of_everything_leaves_the_process_alive(
    served: Served, http: httpx.AsyncClient
) -> None:
    for raw in [b"", b"GET", *MALFORMED.values(), b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n"]:
        sock = socket.create_connection(("127.0.0.1", served.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(raw)
        sock.close()
    assert (await http.get(f"{served.url}/healthz")).status_code == 200


@asynccontextmanager
async def busy_machine(turn: float) -> AsyncIterator[None]:
    """Each turn of the event loop takes so many seconds."""

    async def take_time() -> None:
        while True:
            time.sleep(turn)  # noqa: ASYNC251 - it stands for other processes
            await asyncio.sleep(0)

    taking = asyncio.create_task(take_time())
    yield
    taking.cancel()


async def test_a_response_that_has_few_steps_left_ends_however_long_each_takes() -> None:
    """By the clock, the limit passes before the last of these steps."""
    begun = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        begun.set()
        for _ in range(7):
            await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    listener = HttpListener(app, bind("127.0.0.1", 0, 30), Bounds(), 30)
    await listener.start()
    asking = asyncio.create_task(exchange(listener.port, GET + b"\r\n"))
    await begun.wait()
    listener.close()
    async with busy_machine(turn=0.1):
        assert await listener.finish(0.0, last_steps=0.5) == 0
    assert (await asking).endswith(b"ok")

"""Large answers that are sent as a whole: they stop nobody else, and clients that never read cost little memory."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import psutil
import pytest
from gateway_fixtures import StartGatewayProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.contract.entries import Delta, Done, Opened, Started, to_fields, to_json
from worker.contract.ids import SEAL, EntryId
from worker.contract.keys import Keys
from worker.gateway.held_answers import HeldAnswers
from worker.gateway.ids import id_of_key
from worker.gateway.large_json import json_pieces
from worker.gateway.problems import Problem

PIECE = 20_000
READERS = 20
BODY = {"messages": [{"role": "user", "content": "Tell all"}]}
MOST = 200 * 1024 * 1024
"""Bytes beyond those of one reader. Without a bound, 20 readers of 10 MB take more than twice as much."""


async def write_answer(redis: Redis, client: Client, size: int) -> str:
    """The log of an answer with so many bytes of text, in pieces of 20 KB; returns the id. The key is "large"."""
    request_id = await client.enqueue(BODY, id=id_of_key("", "large"))
    key = Keys().tokens(request_id)
    started = Started(id=EntryId(1, 0), queue="default", job="1-1", worker="w", owner="o", time=1)
    opened = Opened(id=EntryId(1, 1), response_id="r", model="m", created=1, role="assistant", prompt_tokens=3)
    done = Done(id=SEAL, attempt=1, finish_reason="stop", model="m")
    for entry in (started, opened):
        await redis.xadd(key, to_fields(entry), id=str(entry.id))  # type: ignore[arg-type]  # dict is invariant
    for first in range(0, size // PIECE, 100):
        pipe = redis.pipeline(transaction=False)
        for n in range(first, min(first + 100, size // PIECE)):
            pipe.xadd(key, {"type": "delta", "content": "x" * PIECE}, id=f"1-{n + 2}")
        await pipe.execute()
    await redis.xadd(key, to_fields(done), id=str(done.id))  # type: ignore[arg-type]
    return request_id


def never_reading(port: int, request: bytes) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(request)
    return sock


def request_of(kind: str, request_id: str) -> bytes:
    """The bytes of a request for a whole answer."""
    if kind == "state":
        return f"GET /requests/{request_id} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    body = json.dumps(BODY)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\nIdempotency-Key: large\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def read_apart(port: int, request: bytes) -> "subprocess.Popen[bytes]":
    """A process that reads a response and prints its size, so that parsing it does not disturb the test."""
    program = (
        "import socket, sys\n"
        f"sock = socket.create_connection(('127.0.0.1', {port}))\n"
        f"sock.sendall({request!r})\n"
        "size, end = 0, b''\n"
        "while not end.endswith(b'0\\r\\n\\r\\n'):\n"
        "    data = sock.recv(1 << 20)\n"
        "    if not data: sys.exit('cut')\n"
        "    size, end = size + len(data), (end + data)[-5:]\n"
        "print(size)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)


async def read_whole(http: httpx.AsyncClient, url: str, kind: str, request_id: str) -> str:
    if kind == "state":
        return str((await http.get(f"{url}/requests/{request_id}")).json()["text"])
    response = await http.post(f"{url}/v1/chat/completions", json=BODY, headers={"Idempotency-Key": "large"})
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("kind", ["state", "completion"])
async def test_clients_that_never_read_a_whole_answer_cost_little_memory_and_go(
    kind: str, start_gateway_process: StartGatewayProcess, redis: Redis, client: Client, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway_process(write_timeout=1, access_log=False)
    process = psutil.Process(gateway.process.pid)
    request_id = await write_answer(redis, client, 10_000_000)

    async def is_read() -> bool:
        with suppress(httpx.ReadError):  # a busy machine keeps this process from reading for longer than a second
            return await read_whole(http, gateway.url, kind, request_id) == "x" * 10_000_000
        return False

    await eventually(is_read)
    before = process.memory_info().rss
    sockets = [never_reading(gateway.port, request_of(kind, request_id)) for _ in range(READERS)]
    most = 0

    async def are_gone() -> bool:
        nonlocal most
        most = max(most, process.memory_info().rss - before)
        assert (await http.get(f"{gateway.url}/healthz")).status_code == 200
        ours = {sock.getsockname()[1] for sock in sockets}
        served = {getattr(found.raddr, "port", 0) for found in process.net_connections("tcp")}
        return not ours & served

    await eventually(are_gone)
    assert most < MOST, f"{most / 1e6:.1f} MB for {READERS} clients"
    for sock in sockets:
        sock.close()


async def test_a_whole_answer_of_40_mb_stops_nobody_else(
    start_gateway_process: StartGatewayProcess, redis: Redis, client: Client, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway_process(access_log=False)
    request_id = await write_answer(redis, client, 40_000_000)
    slowest = 0.0
    for kind in ("state", "completion"):
        reader = await asyncio.to_thread(read_apart, gateway.port, request_of(kind, request_id))
        async with asyncio.timeout(300):
            while reader.poll() is None:
                began = time.monotonic()
                assert (await http.get(f"{gateway.url}/healthz")).status_code == 200
                slowest = max(slowest, time.monotonic() - began)
                await asyncio.sleep(0.005)
        output = reader.communicate()[0]
        assert int(output) > 40_000_000
    assert slowest < 3


async def test_a_large_answer_waits_while_others_hold_what_they_may_except_the_oldest() -> None:
    answers = HeldAnswers(most=1_000_000)
    entry = Delta(id=EntryId(1, 2), content="x" * 600_000)
    with answers.hold() as oldest, answers.hold() as younger:
        await oldest.add(entry)
        waits = asyncio.create_task(younger.add(entry))
        await asyncio.sleep(0)
        await oldest.add(entry)
        assert not waits.done()
        with answers.hold(patience=0.01) as impatient:
            with pytest.raises(Problem) as refused:
                await impatient.add(entry)
            assert refused.value.status == 503
        assert not waits.done()
        waits.cancel()
    with answers.hold() as second:
        with answers.hold() as third:
            await third.add(entry)
            waits = asyncio.create_task(second.add(entry))
            await asyncio.sleep(0)
            assert not waits.done()
        await waits


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers(-(2**53), 2**53) | st.text() | st.just('ä\\\n"😀' * 30_000),
        lambda inner: st.lists(inner, max_size=200) | st.dictionaries(st.text(), inner),
        max_leaves=30,
    )
)
def test_json_in_pieces_is_the_json_of_the_value(value: object) -> None:
    assert b"".join(json_pieces(value)).decode() == to_json(value)

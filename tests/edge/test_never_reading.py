"""Clients that never read beside a large answer: they cost little memory, and they go."""

import asyncio
import re
import socket

import httpx
import psutil
from gateway_fixtures import StartGatewayProcess
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.contract.entries import Opened, Started, to_fields
from worker.contract.ids import EntryId
from worker.contract.keys import Keys
from worker.sandbox.embedded_redis import free_port

COUNT = 200
PIECE = 500
PIECES = 100_000
MOST = 20_000_000
"""Bytes. 12 MB were seen; what the allocator keeps differs from run to run."""


async def write_large_answer(redis: Redis, client: Client) -> str:
    """The log of an answer of 50 MB that has not ended; returns its id."""
    request_id = await client.enqueue({"messages": [{"role": "user", "content": "Tell all"}]})
    key = Keys().tokens(request_id)
    started = Started(id=EntryId(1, 0), queue="default", job="1-1", worker="w", owner="o", time=1)
    opened = Opened(id=EntryId(1, 1), response_id="r", model="m", created=1, role="assistant", prompt_tokens=3)
    pipe = redis.pipeline(transaction=False)
    for entry in (started, opened):
        pipe.xadd(key, to_fields(entry), id=str(entry.id))  # type: ignore[arg-type]  # dict is invariant
    for n in range(PIECES):
        pipe.xadd(key, {"type": "delta", "content": "x" * PIECE}, id=f"1-{n + 2}")
    await pipe.execute()
    return request_id


def never_reading(port: int, request_id: str) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(f"GET /requests/{request_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return sock


async def read_some(http: httpx.AsyncClient, url: str) -> None:
    """Read 2 MB of the answer, and leave."""
    size = 0
    async with http.stream("GET", url) as response:
        async for piece in response.aiter_raw():
            size += len(piece)
            if size > 2_000_000:
                return


async def ended_streams(http: httpx.AsyncClient, metrics: str) -> float:
    """How many event streams have ended."""
    text = (await http.get(f"http://{metrics}/metrics")).text
    found = re.findall(r'^vllm_relay_gateway_streams_ended_total\{.*protocol="native".*\} (\S+)', text, re.MULTILINE)
    return sum(map(float, found))


async def test_200_clients_that_never_read_cost_little_memory_and_go(
    start_gateway_process: StartGatewayProcess, redis: Redis, client: Client, http: httpx.AsyncClient
) -> None:
    metrics = f"127.0.0.1:{free_port()}"
    gateway = await start_gateway_process(metrics=metrics, access_log=False)
    process = psutil.Process(gateway.process.pid)
    request_id = await write_large_answer(redis, client)
    async with asyncio.timeout(300):  # what the pages of many readers need at once, is there before
        await asyncio.gather(*(read_some(http, f"{gateway.url}/requests/{request_id}/events") for _ in range(8)))
    before = process.memory_info().rss
    sockets = [never_reading(gateway.port, request_id) for _ in range(COUNT)]
    most = 0

    async def are_gone() -> bool:
        nonlocal most
        most = max(most, process.memory_info().rss - before)
        assert (await http.get(f"{gateway.url}/healthz")).status_code == 200
        return await ended_streams(http, metrics) >= COUNT

    await eventually(are_gone)
    assert most < MOST, f"{most / 1e6:.1f} MB for {COUNT} clients"
    for sock in sockets:
        sock.close()

"""Several requests that a client sends at once on a connection, before it has the response to the first."""

import asyncio
from contextlib import suppress

import pytest
from gateway_fixtures import Served, StartGateway
from redis.asyncio import Redis
from test_connections import exchange, parts
from waits import eventually
from written_log import START, WrittenLog, delta

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
EVENTS = b"GET /requests/r/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


async def test_requests_that_wait_are_answered_in_turn(gateway: Served) -> None:
    response = await exchange(gateway.port, GET * 9 + LAST)
    assert response.count(b"HTTP/1.1 200 ") == 10


async def test_too_many_that_wait_are_refused(gateway: Served) -> None:
    status, error = parts(await exchange(gateway.port, GET * 40))
    assert (status, error["code"]) == (400, "too_many_pipelined")


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> Served:
    """While requests wait on a connection, only a write shows that the client has left."""
    return await start_gateway(heartbeat=0.5)


@pytest.fixture
async def log(redis: Redis) -> WrittenLog:
    log = WrittenLog(redis)
    await log.write(START, delta(1, 1))
    return log


async def open_stream(gateway: Served, behind: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a stream, and send more behind it once its first event has arrived."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(EVENTS)
    async with asyncio.timeout(300):
        await reader.readuntil(b"1-1")
    writer.write(behind)
    return reader, writer


async def has_left(gateway: Served) -> None:
    async def is_closed() -> bool:
        return len(gateway.gateway.services.streams) == 0

    await eventually(is_closed)


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("behind", [b"", GET, GET * 3], ids=["nothing", "one", "three"])
async def test_a_stream_ends_with_its_connection_whatever_waits_behind_it(gateway: Served, behind: bytes) -> None:
    _, writer = await open_stream(gateway, behind)
    writer.close()
    await has_left(gateway)


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("behind", [GET + b"\x00" * 100, GET * 40], ids=["malformed", "too many"])
async def test_no_refusal_is_written_into_a_stream(gateway: Served, behind: bytes) -> None:
    reader, writer = await open_stream(gateway, behind)
    rest = b""
    with suppress(ConnectionResetError):
        async with asyncio.timeout(300):
            rest = await reader.read()
    writer.close()
    assert b"HTTP/1.1" not in rest
    await has_left(gateway)

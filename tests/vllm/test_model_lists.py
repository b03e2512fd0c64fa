"""Lists of models, and the limits of a connection to a server."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from raw_server import sending
from streaming import (
    HEAD,
    error_of,
    reaching,
    request_answer,
    serving,
)

from worker.sandbox.simulator.server import Options
from worker.vllm.errors import NoConnection, UpstreamError
from worker.vllm.servers.pace import ServerPace
from worker.vllm.servers.pool import ServerPool
from worker.vllm.stream.watchdog import StreamTimeouts

DEEP = b'{"x":' + b"[" * 100_000


async def test_the_models_of_a_server_are_listed() -> None:
    async with serving(Options(model="tiny", api_key="k"), api_key="k") as (_, pool):
        assert await pool.list_models(pool.servers[0]) == ["tiny"]


async def models_error(pool: ServerPool) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        await pool.list_models(pool.servers[0])
    return caught.value


async def test_a_server_with_a_key_lists_no_models_without_it() -> None:
    async with serving(Options(api_key="k")) as (_, pool):
        assert (await models_error(pool)).code == "unauthorized"


@pytest.mark.parametrize("body", [b"<html></html>", b"[]", b'{"data":null}', b'{"data":[{}]}', b"\xff", b"", DEEP])
async def test_a_body_that_is_not_a_list_of_models_is_an_error(body: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with sending(answer) as url, reaching(url) as pool:
        error = await models_error(pool)
    assert (error.code, error.retryable) == ("not_a_stream", False)


async def test_the_models_of_a_missing_or_silent_server_are_an_error() -> None:
    pace = ServerPace(probe_limit=0.1)
    async with sending(then_close=False) as url, reaching(url, pace=pace) as pool:
        error = await models_error(pool)
    assert (error.code, error.message) == ("upstream_unreachable", f"{url}/v1/models did not answer within 0.1 s")
    async with reaching(url) as pool:
        error = await models_error(pool)
    assert (error.code, error.retryable) == ("upstream_unreachable", True)


@contextmanager
def connections_waiting(server: socket.socket) -> Iterator[None]:
    """Fill the server's queue with connections that it does not accept, so that further connections wait outside."""
    with ExitStack() as waiting:
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A server with the shortest possible queue of connections."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        server.setblocking(False)
        yield server


def url_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


async def test_connecting_has_a_limit_of_its_own(listening: socket.socket) -> None:
    limits = StreamTimeouts(connect=0.1, first_token=600, gap=600)
    with connections_waiting(listening):
        async with reaching(url_of(listening), limits=limits) as pool:
            error = await error_of(pool)
            assert pool.servers[0].is_away
    assert (error.code, error.retryable) == ("upstream_unreachable", True)
    assert isinstance(error, NoConnection)


async def test_a_connection_that_is_not_made_in_time_does_not_cut_open_streams(listening: socket.socket) -> None:
    """Such a server is busy, not gone."""
    loop = asyncio.get_running_loop()
    limits, pace = StreamTimeouts(connect=0.1, first_token=600, gap=600), ServerPace(frozen_after=0)
    async with reaching(url_of(listening), limits=limits, pace=pace) as pool:
        asking = asyncio.create_task(request_answer(pool))
        connection, _ = await loop.sock_accept(listening)
        with connection, connections_waiting(listening):
            await loop.sock_sendall(connection, HEAD + b"\r\n")
            with pytest.raises(NoConnection):
                await request_answer(pool)
            event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
            await loop.sock_sendall(connection, event)
            connection.shutdown(socket.SHUT_WR)
            assert (await asking)[0].text == "a"

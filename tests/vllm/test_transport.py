"""The HTTP client: connections that the server has closed, and responses that are not quite HTTP/1.1."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
from raw_server import sending

from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import NoConnection, UpstreamError
from worker.vllm.http.target import Target
from worker.vllm.http.transport import Transport
from worker.vllm.servers.circuit import CircuitState
from worker.vllm.servers.pool import ServerPool
from worker.vllm.stream.watchdog import StreamTimeouts

PATIENT = StreamTimeouts(connect=5, first_token=10, gap=10)
EVENT = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(EVENT) + EVENT


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[tuple[str, list[int]]]:
    """A server whose connections give these responses to one request after the other, and close after the last.

    Shows how many requests each of its connections had.
    """
    requests: list[int] = []
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        number = len(requests)
        requests.append(0)
        with suppress(asyncio.IncompleteReadError):
            for answer in answers:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r")[0]))
                requests[number] += 1
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests
    finally:
        server.close()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)


@asynccontextmanager
async def reaching(url: str) -> AsyncIterator[ServerPool]:
    pool = ServerPool([url], limits=PATIENT)
    try:
        yield pool
    finally:
        await pool.aclose()


async def request_answer(pool: ServerPool) -> str:
    parser, texts = ChunkParser(), list[str]()

    def on_events(events: list[bytes]) -> bool:
        texts.extend(entry.get("content", "") for data in events for entry in parser.parse(data))
        return parser.done

    async with pool.stream(pool.servers[0], {"messages": []}) as stream:
        while await stream.read_into(on_events) and not parser.done:
            pass
        await stream.read_rest()
        parser.check_complete(stream.skipped)
    return "".join(texts)


async def test_idle_connections_that_the_server_has_closed_do_not_cost_a_try() -> None:
    async with answering(WHOLE, b"") as (url, requests), reaching(url) as pool:
        for _ in range(2):
            assert await asyncio.gather(*(request_answer(pool) for _ in range(12))) == ["a"] * 12
        assert sorted(requests) == [1] * 12 + [2] * 12
        assert pool.servers[0].circuit.state is CircuitState.CLOSED


IDLE_TOO_LONG = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


async def test_idle_connections_that_the_server_closes_with_a_408_do_not_cost_a_try() -> None:
    async with answering(WHOLE, IDLE_TOO_LONG) as (url, requests), reaching(url) as pool:
        for _ in range(2):
            assert await asyncio.gather(*(request_answer(pool) for _ in range(12))) == ["a"] * 12
        assert sorted(requests) == [1] * 12 + [2] * 12


async def test_a_408_on_a_fresh_connection_is_a_failed_try() -> None:
    async with answering(IDLE_TOO_LONG) as (url, requests), reaching(url) as pool:
        with pytest.raises(UpstreamError) as caught:
            await request_answer(pool)
        assert (caught.value.status, requests) == (408, [1])


async def test_a_408_is_the_answer_when_no_other_connection_can_be_made() -> None:
    async with answering(WHOLE, IDLE_TOO_LONG) as (url, _), reaching(url) as pool:
        assert await request_answer(pool) == "a"
        with pytest.MonkeyPatch.context() as gone:
            gone.setattr(asyncio.get_running_loop(), "create_connection", refuse)
            with pytest.raises(UpstreamError) as caught:
                await request_answer(pool)
    assert caught.value.status == 408


async def test_a_fresh_connection_that_closes_without_an_answer_is_a_failed_try() -> None:
    async with answering(b"") as (url, requests), reaching(url) as pool:
        with pytest.raises(UpstreamError, match="the server closed the connection"):
            await request_answer(pool)
        assert requests == [1]


async def test_a_request_whose_answer_had_begun_is_not_sent_again_silently() -> None:
    async with answering(WHOLE, b"HTTP/1.1 20") as (url, requests), reaching(url) as pool:
        assert await request_answer(pool) == "a"
        with pytest.raises(UpstreamError, match="the server closed the connection"):
            await request_answer(pool)
        assert requests == [2]


async def test_a_request_that_takes_its_server_down_counts_as_a_failure() -> None:
    """As a failure to connect, the request would be sent again without end."""
    async with answering(WHOLE, b"") as (url, requests), reaching(url) as pool:
        assert await request_answer(pool) == "a"
        with pytest.MonkeyPatch.context() as gone:
            gone.setattr(asyncio.get_running_loop(), "create_connection", refuse)
            with pytest.raises(UpstreamError) as caught:
                await request_answer(pool)
        assert requests == [2]
    assert (caught.value.code, isinstance(caught.value, NoConnection)) == ("upstream_unreachable", False)


async def refuse(*_: object, **__: object) -> None:
    raise ConnectionRefusedError


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 7\r\n\r\n", b"%x\r\n%b\r\n0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\ntransfer-encoding: chunked\r\n\r\n", b"%x\r\n%b\r\n0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"%x   \r\n%b\r\n0 \r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"000%x\r\n%b\r\n000\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"%x\n%b\n0\n\n"),
        (b"HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\n", b"%x\n%b\n0\n\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"   %x\r\n%b\r\n   0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nContent-Length: %d\r\n\r\n" % (len(EVENT), len(EVENT)), b""),
        (b"HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\n", b"%x\r\n%b\r\n0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\ncontent-type: text/event-stream\n\n", b""),
        (b"HTTP/1.0 200 OK\r\n\r\n", b""),
    ],
)
async def test_responses_that_are_not_quite_http_are_read(head: bytes, body: bytes) -> None:
    async with sending(head, body % (len(EVENT), EVENT) if body else EVENT) as url, reaching(url) as pool:
        assert await request_answer(pool) == "a"


@pytest.mark.parametrize("lines", [b"%x\n%b\n%x\n%b\n0\n\n", b" %x\r\n%b\r\n %x\r\n%b\r\n 0\r\n\r\n"])
async def test_a_repaired_response_comes_piece_by_piece(lines: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    body = lines % (len(EVENT) // 2, EVENT[: len(EVENT) // 2], (len(EVENT) + 1) // 2, EVENT[len(EVENT) // 2 :])
    async with sending(head, *(bytes([byte]) for byte in body), then_close=False) as url, reaching(url) as pool:
        assert await request_answer(pool) == "a"


async def test_a_connection_with_a_repaired_response_is_not_used_again() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\ncontent-length: %d\r\n\r\n" % (len(EVENT), len(EVENT)) + EVENT
    async with answering(answer, answer) as (url, requests), reaching(url) as pool:
        assert [await request_answer(pool), await request_answer(pool)] == ["a", "a"]
        assert requests == [1, 1]


async def test_a_connection_with_two_lengths_in_its_response_is_not_used_again() -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 7\r\n\r\n"
    answer = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVENT), EVENT)
    async with answering(answer, answer) as (url, requests), reaching(url) as pool:
        assert [await request_answer(pool), await request_answer(pool)] == ["a", "a"]
        assert requests == [1, 1]


async def test_a_head_that_is_too_large_is_an_error() -> None:
    head = b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: %b\r\n" % (n, b"y" * 1000) for n in range(70)) + b"\r\n"
    async with sending(head) as url, reaching(url) as pool:
        with pytest.raises(UpstreamError, match="the head of the response is larger than 65536 bytes"):
            await request_answer(pool)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://user:hidden@other:8443/v1/chat/completions?key=hidden", "https://other:8443/v1/chat/completions"),
        ("/v2/chat/completions", "/v2/chat/completions"),
    ],
)
async def test_the_error_of_a_redirect_has_its_location(status: int, location: str, shown: str) -> None:
    answer = f"HTTP/1.1 {status} X\r\nlocation: {location}\r\ncontent-length: 4\r\n\r\nmove".encode()
    async with sending(answer) as url, reaching(url) as pool:
        with pytest.raises(UpstreamError, match=f"the server redirects to {shown}, which is not followed") as caught:
            await request_answer(pool)
    assert (caught.value.status, caught.value.retryable) == (status, False)
    assert "hidden" not in caught.value.message


async def test_the_error_of_a_server_that_speaks_tls_has_the_fix() -> None:
    async with sending(b"\x15\x03\x01\x00\x02\x02\x46") as url, Transport() as transport:
        with pytest.raises(httpx.RemoteProtocolError, match="speaks TLS: its URL begins with https://"):
            await transport.post(Target.of(httpx.AsyncClient(), url, {}), b"{}", 5)

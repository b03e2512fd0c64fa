"""Requests to simulated servers, for tests of streams."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from raw_server import sending

from worker.contract import entries
from worker.contract.answer import Answer
from worker.contract.entries import Object
from worker.sandbox.simulator.server import Options, Simulator
from worker.sandbox.simulator.wire import HttpConnection
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.http.credentials import ApiKeys
from worker.vllm.http.target import Target
from worker.vllm.http.transport import Transport
from worker.vllm.servers.pace import ServerPace
from worker.vllm.servers.pool import ServerPool
from worker.vllm.stream.chat_stream import ChatStream, open_response
from worker.vllm.stream.sse import MAX_EVENT_BYTES
from worker.vllm.stream.watchdog import StreamTimeouts, StreamWatchdog

PATIENT = StreamTimeouts(connect=5, first_token=10, gap=10)
WHO: list[Any] = [{"role": "user", "content": "Who are you?"}]
REQUEST: Object = {"model": "reciter", "messages": WHO}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"


def asking(**simulate: object) -> Object:
    request: dict[str, Any] = {**REQUEST, "simulate": simulate}
    return request


class Counting(Simulator):
    """Counts the connections that are made to it."""

    accepted = 0

    def _accept(self) -> HttpConnection:
        self.accepted += 1
        return super()._accept()


@asynccontextmanager
async def serving(
    options: Options | None = None,
    limits: StreamTimeouts = PATIENT,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[tuple[Counting, ServerPool]]:
    async with Counting(options) as simulator, reaching(simulator.url, limits=limits, **settings) as pool:
        yield simulator, pool


@asynccontextmanager
async def reaching(
    *urls: str, limits: StreamTimeouts = PATIENT, api_key: str = "", pace: ServerPace | None = None
) -> AsyncIterator[ServerPool]:
    pool = ServerPool(urls, keys=ApiKeys(api_key), limits=limits, pace=pace)
    try:
        yield pool
    finally:
        await pool.aclose()


def to(url: str) -> Target:
    return Target.of(httpx.AsyncClient(), url, {})


async def opened(
    transport: Transport, url: str, *, max_event_bytes: int = MAX_EVENT_BYTES, since: float | None = None
) -> ChatStream:
    watchdog = StreamWatchdog(PATIENT, since=since)
    response = await open_response(transport, to(url), REQUEST, PATIENT, watchdog)
    return ChatStream(response, watchdog, max_event_bytes=max_event_bytes)


def enough(_events: list[bytes]) -> bool:
    """Stop after the next events."""
    return True


async def request_answer(pool: ServerPool, request: Object | None = None) -> tuple[Answer, ChunkParser]:
    """The whole answer, read as the worker reads it."""
    parser, answer = ChunkParser(), Answer()
    async with pool.stream(pool.servers[0], request or REQUEST) as stream:
        stream.has_output = lambda: parser.has_output

        def on_events(events: list[bytes]) -> bool:
            for fields in (fields for data in events for fields in parser.parse(data)):
                answer.add(entries.parse("1-1", fields))
            return parser.done

        while await stream.read_into(on_events) and not parser.done:
            pass
        await stream.read_rest()
    parser.check_complete()
    return answer, parser


async def error_of(pool: ServerPool, request: Object | None = None) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        await request_answer(pool, request)
    assert len(pool.servers[0].requests) == 0
    return caught.value


async def error_of_server(*pieces: bytes, limits: StreamTimeouts = PATIENT, **settings: Any) -> UpstreamError:  # noqa: ANN401
    async with sending(*pieces, **settings) as url, reaching(url, limits=limits) as pool:
        return await error_of(pool)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110, a record has no event to wait for
            await asyncio.sleep(0.001)


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)

"""What a job may not do: ask for more than the settings allow, or choose where its request goes and how."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from conftest import StartWorker, stream
from redis.asyncio import Redis
from waits import eventually

from worker import Client, Failed
from worker.engine.application import Worker
from worker.sandbox.simulator.server import Simulator
from worker.settings import load_settings

ASK: dict[str, object] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}


async def test_a_job_above_a_limit_ends_with_a_message_and_is_not_sent(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, max_choices=2, max_tokens=100)
    for more, problem in (({"n": 3}, "WORKER_MAX_CHOICES"), ({"max_tokens": 101}, "WORKER_MAX_TOKENS")):
        end = (await client.result(await client.enqueue(ASK | more))).end
        assert isinstance(end, Failed)
        assert end.code == "invalid_job"
        assert problem in end.message

    async def buried() -> bool:
        return len(await stream(redis, "chat:dead")) == 2

    await eventually(buried)
    assert not simulator.served


async def test_a_job_that_does_not_validate_leaves_little_in_redis(
    client: Client, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator)
    large = {
        "tenant": "t" * 500_000,
        "unknown": "u" * 500_000,
        "request": json.dumps(ASK | {"n": 0, "x": "x" * 500_000}),
    }
    await redis.xadd("chat:jobs", large | {"id": "bad"})  # type: ignore[arg-type]  # invariant

    async def settled() -> bool:
        return (
            (await client.status("bad")).outcome == "error"
            and len(await stream(redis, "chat:lifecycle")) == 2
            and bool(await redis.xlen("chat:dead"))
        )

    await eventually(settled)
    kept = [*await stream(redis, "chat:dead"), *await stream(redis, "chat:lifecycle")]
    assert sum(len(value) for _, fields in kept for value in fields.values()) < 40_000


async def test_an_answer_is_as_long_as_the_limit_where_the_job_sets_none(
    client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    await start_worker(simulator, max_tokens=3)
    request_id = await client.enqueue(ASK)
    assert (await client.result(request_id)).usage["completion_tokens"] == 3
    assert await client.enqueue(ASK, id=request_id) == request_id, "it is still the same request"


class Wire:
    """A proxy in front of a simulated vLLM that records what the worker sends."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self.sent = b""
        self.url = ""

    async def run(self, ready: "asyncio.Future[None]") -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1")
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set_result(None)
        async with server:
            await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        await asyncio.gather(self._copy(reader, back, keep=True), self._copy(there, writer, keep=False))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, keep: bool) -> None:
        while data := await reader.read(65536):
            self.sent += data if keep else b""
            writer.write(data)
        writer.close()


@pytest.fixture
async def wire(simulator: Simulator) -> AsyncIterator[Wire]:
    wire = Wire(simulator.url)
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(wire.run(ready))
    await ready
    yield wire
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_job_chooses_neither_a_url_nor_a_header(
    client: Client, redis: Redis, redis_url: str, wire: Wire
) -> None:
    wanted = {
        "url": "http://127.0.0.1:9/v1", "base_url": "http://127.0.0.1:9/v1", "vllm_urls": "http://127.0.0.1:9",
        "endpoint": "/metrics", "path": "/metrics", "api_key": "stolen", "authorization": "Bearer stolen",
        "headers": {"authorization": "Bearer stolen"}, "extra_headers": {"x-data-parallel-rank": "1"},
    }  # fmt: skip
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in wanted.items()}
    request = json.dumps(ASK | wanted | {"model": "reciter"})
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nx-evil: 1"
    texts |= {"id": "sly", "request": request, "tenant": "a\r\nx-evil: 1", "traceparent": trace}
    await redis.xadd("chat:jobs", texts)  # type: ignore[arg-type]  # invariant
    worker = Worker(load_settings(redis_url=redis_url, vllm_urls=wire.url, vllm_api_key="own"))
    working = asyncio.create_task(worker.run())

    async def ended() -> bool:
        return (await client.status("sly")).outcome == "done"

    await eventually(ended)
    worker.stop()
    await working
    heads = re.findall(rb"((?:GET|POST) \S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", wire.sent, re.DOTALL)
    asked = {what for what, _ in heads} - {b"GET /metrics"}  # which the worker reads if the job takes long
    assert asked == {b"GET /health", b"GET /v1/models", b"POST /v1/chat/completions"}
    for _, head in heads:
        lines = [line.lower() for line in head.split(b"\r\n")]
        assert b"authorization: bearer own" in lines
        names = {line.partition(b":")[0] for line in lines}
        assert names <= {
            b"host", b"accept", b"accept-encoding", b"connection", b"user-agent", b"authorization", b"content-length",
            b"content-type",
        }  # fmt: skip


async def test_the_trace_of_a_job_continues_at_vllm(
    client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await start_worker(simulator)
    await client.result(await client.enqueue(ASK, traceparent=trace))
    await client.result(await client.enqueue(ASK))
    assert [served.traceparent for served in simulator.served] == [trace, ""]

"""Pools of simulated servers, and requests to them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from waits import eventually

from worker.contract.entries import Object
from worker.sandbox.simulator.requests import Fault
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.telemetry.logging import LogReceiver
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.http.credentials import ApiKeys
from worker.vllm.servers.circuit import Caller
from worker.vllm.servers.pace import ServerPace
from worker.vllm.servers.pool import ServerPool
from worker.vllm.servers.server import Server
from worker.vllm.stream.watchdog import StreamTimeouts

PATIENT = StreamTimeouts(connect=5, first_token=10, gap=10)
IMPATIENT = StreamTimeouts(connect=5, first_token=0.1, gap=0.1)
SHORT = 0.02


class Recorder(Simulator):
    """A simulator that records the requested paths, answers some with a status alone, and some only once released."""

    def __init__(self, options: Options | None = None, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(options, **settings)
        self.asked: list[str] = []
        self.authorization: list[str] = []
        self.statuses: dict[str, int] = {}
        self.slow: set[str] = set()
        self.refuses_with = ""
        """The message of a 500 to every request for an answer; empty while requests are answered."""
        self.released = asyncio.Event()

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        self.asked.append(request.path)
        self.authorization.append(request.headers.get("authorization", ""))
        if request.path in self.slow:
            await self.released.wait()
        if self.refuses_with and request.path == "/v1/chat/completions":
            body = json.dumps({"error": {"message": self.refuses_with, "code": 500}})
            await connection.respond(500, "application/json", body.encode())
        elif status := self.statuses.get(request.path):
            await connection.respond(status, "text/plain", b"no")
        else:
            await super()._handle(request, connection)

    def orders(self, fault: Fault | None = None, *, after: int = 0) -> None:
        """Set the fault of every request from now on."""
        self.options = Options(model=self.options.model, scenario=Scenario(fault=fault, after=after))


BRIEF = {"probe_limit": SHORT, "longest_probe_limit": 4 * SHORT}
"""Probes are late at once, and have no more time than a little."""


def quick(**pace: float) -> ServerPace:
    """A pace with short pauses, without probes of idle servers."""
    fast = {
        "probe_every": SHORT,
        "list_again_after": SHORT,
        "first_pause": SHORT,
        "longest_pause": SHORT,
        "idle_every": 3600,
    }
    return ServerPace(**fast | pace)


@asynccontextmanager
async def watching(
    *urls: str, limits: StreamTimeouts = PATIENT, api_key: str = "", pace: ServerPace | None = None
) -> AsyncIterator[ServerPool]:
    """The servers, monitored, once each has been probed."""
    pool = ServerPool(urls, keys=ApiKeys(api_key), limits=limits, telemetry=LogReceiver(), pace=pace or quick())
    task = asyncio.create_task(pool.monitor())
    try:
        await until(lambda: all(pooled.is_known for pooled in pool.servers))
        yield pool
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pool.aclose()


@asynccontextmanager
async def serving(*models: str, **settings: Any) -> AsyncIterator[tuple[list[Recorder], ServerPool]]:  # noqa: ANN401
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Recorder(Options(model=model))) for model in models]
        yield servers, await stack.enter_async_context(watching(*(server.url for server in servers), **settings))


async def until(condition: Callable[[], object]) -> None:
    async def holds() -> object:
        return condition()

    await eventually(holds)


async def chosen(pool: ServerPool, model: str = "") -> Server:
    """Wait for a server and choose it, as a job does."""
    while not pool.accepts(model):
        await pool.wait_available(model)
    return pool.choose(model)


async def request_answer(
    pool: ServerPool, pooled: Server | None = None, *, model: str = "", caller: Caller | None = None,
    **fields: Any,  # noqa: ANN401
) -> str:  # fmt: skip
    """The text of a whole answer."""
    parser, texts = ChunkParser(), list[str]()
    request: Object = {"messages": [{"role": "user", "content": "Who are you?"}], **({"model": model} if model else {})}
    pooled = pooled or await chosen(pool, model)
    async with pool.stream(pooled, request | fields, caller=caller) as stream:

        def on_events(events: list[bytes]) -> bool:
            texts.extend(entry.get("content", "") for data in events for entry in parser.parse(data))
            return parser.done

        while await stream.read_into(on_events) and not parser.done:
            pass
        await stream.read_rest()
        parser.check_complete()
    return "".join(texts)


async def fails(pool: ServerPool, times: int = 1, **fields: Any) -> set[str]:  # noqa: ANN401
    """The error codes of requests that are sent in any state of the circuit."""
    codes = set()
    for _ in range(times):
        with pytest.raises(UpstreamError) as caught:
            await request_answer(pool, pool.servers[0], **fields)
        codes.add(caught.value.code)
    return codes

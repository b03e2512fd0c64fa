"""A Redis that is killed under a gateway with open streams, and comes back with its file."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from asyncio_reports import UNHANDLED
from conftest import StartSimulator, StartWorker
from durable_redis import Durable
from gateway_fixtures import KEY_A, KEYS, GatewayProcess, StartGatewayProcess
from serving import EventReader, entries_of
from steered_clock import SteeredClock
from waits import eventually
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from worker.contract.entries import Object
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario

TOKENS = 200
MESSAGES = [{"role": "user", "content": "Tell me everything"}]
TEXT = answer_to(MESSAGES, tokens=TOKENS)
BODY: dict[str, Any] = {"model": "reciter", "messages": MESSAGES}
AUTH = {"Authorization": f"Bearer {KEY_A}"}


@pytest.fixture
async def durable(redis_binary: Path, tmp_path: Path) -> AsyncIterator[Durable]:
    durable = Durable(redis_binary, tmp_path)
    durable.start()
    await durable.ready()
    yield durable
    await durable.client.aclose()
    durable.kill()


class Native:
    """Follows a request by one of the native routes. It comes back after an interruption as its client would."""

    def __init__(self, gateway: GatewayProcess, request_id: str) -> None:
        self.entries: list[Object] = []
        self.cursor = ""
        self.interruptions: list[str] = []
        self._gateway = gateway
        self._id = request_id

    async def follow(self) -> None:
        while not self.is_over:
            await self.read_once()

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete."""
        return bool(self.entries) and self.entries[-1]["type"] == "done"

    @property
    def text(self) -> str:
        return "".join(str(entry.get("content", "")) for entry in self.entries if entry["type"] == "delta")

    async def read_once(self) -> None:
        raise NotImplementedError


class Events(Native):
    """Server-sent events, read as an EventSource does."""

    ends = True
    """Whether the stream ends with its requests."""

    @property
    def path(self) -> str:
        return f"/requests/{self._id}/events"

    def take(self, data: str) -> None:
        self.entries += entries_of(data)

    async def read_once(self) -> None:
        headers = {"Authorization": f"Bearer {KEY_A}", "Accept": "text/event-stream"}
        reader = await EventReader.open(self._gateway.port, self.path, **headers, Last_Event_ID=self.cursor)
        assert reader.status == 200
        async for event_id, name, data in reader.events():
            self.cursor = event_id or self.cursor
            if name:
                self.interruptions.append(name)
            else:
                self.take(data)
            if self.is_over and not self.ends:
                reader.close()
                return
        assert reader.is_whole


class ManyEvents(Events):
    """The event stream of many requests."""

    @property
    def path(self) -> str:
        return f"/events?ids={self._id}"

    def take(self, data: str) -> None:
        for part in entries_of(data):
            if part["request"] == self._id:
                self.entries += cast("list[Object]", part["entries"])


class OwnEvents(ManyEvents):
    """The event stream of all requests of the caller. It goes on for requests to come."""

    ends = False

    @property
    def path(self) -> str:
        return "/events"


class Messages(Native):
    """A WebSocket."""

    async def read_once(self) -> None:
        url = f"ws://127.0.0.1:{self._gateway.port}/requests/{self._id}/ws?after={self.cursor}"
        async with connect(url, proxy=None, additional_headers=AUTH, open_timeout=60) as socket:
            try:
                while True:
                    self.entries += entries_of(await socket.recv())
                    self.cursor = str(self.entries[-1]["id"])
            except ConnectionClosed:
                if socket.close_code != 1000:
                    self.interruptions.append(str(socket.close_code))


class Chat:
    """A streamed chat completion: its text, and the code of the error that ended it."""

    def __init__(self) -> None:
        self.text = ""
        self.error = ""
        self.is_whole = False
        self.request_id = ""

    async def follow(self, gateway: GatewayProcess) -> None:
        body = BODY | {"stream": True}
        async with (
            httpx.AsyncClient(timeout=120) as http,
            http.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, headers=AUTH) as response,
        ):
            self.request_id = response.headers["x-request-id"]
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    self.is_whole = True
                elif data.startswith("{"):
                    self._take(json.loads(data))

    def _take(self, event: Any) -> None:  # noqa: ANN401 - JSON
        if "error" in event:
            self.error = event["error"]["code"]
        else:
            self.text += event["choices"][0]["delta"].get("content") or ""


class Streams:
    """One open stream of each kind."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.gateway = gateway
        self.chat = Chat()
        self.natives: list[Native] = []

    async def open(self, group: asyncio.TaskGroup) -> None:
        """Open them, and wait until each has text."""
        group.create_task(self.chat.follow(self.gateway))
        async with httpx.AsyncClient() as http:
            post = await http.post(f"{self.gateway.url}/requests", json=BODY, headers=AUTH)
        request_id = post.json()["id"]
        self.natives = [kind(self.gateway, request_id) for kind in (Events, ManyEvents, OwnEvents, Messages)]
        for native in self.natives:
            group.create_task(native.follow())

        async def have_text() -> bool:
            return bool(self.chat.text) and all(native.text for native in self.natives)

        await eventually(have_text)


@asynccontextmanager
async def streaming(gateway: GatewayProcess) -> AsyncIterator[Streams]:
    """Open streams, which have ended when the block ends."""
    async with asyncio.timeout(500), asyncio.TaskGroup() as group:
        streams = Streams(gateway)
        await streams.open(group)
        yield streams


@pytest.fixture
def clock() -> SteeredClock:
    """The time of the vLLM server: an answer takes a minute and a half, if it is not hurried."""
    return SteeredClock()


@pytest.fixture
async def _worker(
    start_worker: StartWorker, start_simulator: StartSimulator, durable: Durable, clock: SteeredClock
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(tokens=TOKENS, rate=2.0)), clock=clock)
    await start_worker(simulator, redis_url=durable.url, lease=60, gap_timeout=60)


def complaints(gateway: GatewayProcess) -> list[str]:
    """The lines of the log above the level of information."""
    lines = [json.loads(line) for line in gateway.log_text().splitlines()]
    return [line["event"] for line in lines if line["level"] not in ("info", "debug")]


def check_log(gateway: GatewayProcess) -> None:
    """The outage is one line, whatever the number of requests that fail, and no task dies."""
    log = gateway.log_text()
    assert not [words for words in (*UNHANDLED, "Traceback") if words in log]
    assert complaints(gateway) in ([], ["redis_unavailable"])  # a short outage may pass between two pings


async def check_all_works(gateway: GatewayProcess) -> None:
    await eventually(lambda: gateway.answers("/readyz"))
    async with httpx.AsyncClient(timeout=120) as http:
        answer = await http.post(f"{gateway.url}/v1/chat/completions", json=BODY, headers=AUTH)
    assert answer.json()["choices"][0]["message"]["content"] == TEXT


@pytest.mark.usefixtures("_worker")
async def test_streams_outlive_a_redis_that_comes_back_in_time(
    durable: Durable, clock: SteeredClock, start_gateway_process: StartGatewayProcess
) -> None:
    gateway = await start_gateway_process(redis_url=durable.url, keys=KEYS)
    async with streaming(gateway) as streams:
        durable.kill()
        assert not any(native.is_over for native in streams.natives)
        durable.start()
        clock.hurry()
    assert [native.text for native in streams.natives] == [TEXT] * 4
    assert not [native.interruptions for native in streams.natives if native.interruptions]
    assert (streams.chat.text, streams.chat.error, streams.chat.is_whole) == (TEXT, "", True)
    await check_all_works(gateway)
    check_log(gateway)


REQUESTS: list[tuple[str, str]] = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/completions?stream"),
    ("GET", "/v1/models"),
    ("POST", "/requests"),
    ("GET", "/requests"),
    ("GET", "/requests/{id}"),
    ("GET", "/requests/{id}?wait=1"),
    ("GET", "/requests/{id}/events"),
    ("DELETE", "/requests/{id}"),
    ("GET", "/events"),
    ("GET", "/events?ids={id}"),
]


async def check_refused(gateway: GatewayProcess, request_id: str) -> None:
    """New requests are refused in the shape of OpenAI's errors, with the time after which to try again."""

    def send(http: httpx.AsyncClient, method: str, path: str) -> Awaitable[httpx.Response]:
        body = BODY | {"stream": path.endswith("stream")} if method == "POST" else None
        return http.request(method, gateway.url + path.replace("{id}", request_id), json=body, headers=AUTH)

    async with httpx.AsyncClient(timeout=60) as http:
        responses = await asyncio.gather(*(send(http, *request) for request in REQUESTS))
    for request, response in zip(REQUESTS, responses, strict=True):
        assert (request, response.status_code) == (request, 503)
        assert int(response.headers["retry-after"]) > 0
        error = response.json()["error"]
        assert (set(error), error["code"]) == ({"message", "type", "param", "code"}, "unavailable")


@pytest.mark.usefixtures("_worker")
async def test_streams_end_with_an_error_that_clients_see_if_redis_stays_away(
    durable: Durable, clock: SteeredClock, start_gateway_process: StartGatewayProcess
) -> None:
    gateway = await start_gateway_process(redis_url=durable.url, keys=KEYS, patience=3, header_timeout=60)
    async with streaming(gateway) as streams:
        durable.kill()

        async def are_interrupted() -> bool:
            return bool(streams.chat.error) and all(native.interruptions for native in streams.natives)

        await eventually(are_interrupted)
        await check_refused(gateway, streams.chat.request_id)
        durable.start()
        clock.hurry()
    assert [native.text for native in streams.natives] == [TEXT] * 4
    assert [set(native.interruptions) for native in streams.natives] == [{"busy"}] * 3 + [{"1013"}]
    assert TEXT.startswith(streams.chat.text)
    assert (streams.chat.error, streams.chat.is_whole) == ("unavailable", True)
    await check_all_works(gateway)
    check_log(gateway)
    assert complaints(gateway)

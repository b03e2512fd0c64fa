"""Readers of a job that ends before it has text: each gets the end, by every route, and from real workers."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import httpx
import pytest
from conftest import StartProcess, StartWorker
from gateway_fixtures import Served, StartGateway
from raw_posts import RawPost
from redis.asyncio import Redis
from rooms import whole_room
from serving import EventReader, entries_of
from waits import eventually
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from written_log import let_deadline_pass

from worker import Client, State
from worker.contract.entries import JSON, Object
from worker.gateway.answers import AnswerPace
from worker.gateway.application import ROOMS
from worker.sandbox.simulator.server import Simulator

BODY: Object = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}
POISONED_WORKER = Path(__file__).parents[1] / "chaos" / "poisoned_worker.py"

STATUSES = {"buried": 500, "job_too_large": 413, "deadline": 504, "cancelled": 499}


async def read_events(gateway: Served, request_id: str) -> Object:
    """The last entry of the event stream, which ends cleanly."""
    reader = await EventReader.open(gateway.port, f"/requests/{request_id}/events")
    entries = await reader.entries()
    assert reader.is_whole
    return entries[-1]


async def read_many(gateway: Served, request_id: str) -> Object:
    """The last entry of the event stream of many requests, which ends cleanly with the last of them."""
    reader = await EventReader.open(gateway.port, f"/events?ids={request_id}")
    parts = await reader.entries()
    assert reader.is_whole
    return cast("list[Object]", parts[-1]["entries"])[-1]


async def read_messages(gateway: Served, request_id: str) -> Object:
    """The last entry of the WebSocket, which is closed with the code of the end."""
    entries: list[Object] = []
    async with connect(f"ws://127.0.0.1:{gateway.port}/requests/{request_id}/ws", proxy=None) as socket:
        with contextlib.suppress(ConnectionClosed):
            while True:
                entries += entries_of(await socket.recv())
        assert socket.close_code == 1000
    return entries[-1]


class Readers:
    """Reads a streamed chat completion by every route, and beside it one that is not streamed."""

    def __init__(self, gateway: Served, client: Client) -> None:
        self.ids: list[str] = []
        self._gateway = gateway
        self._client = client
        self._reading: list[asyncio.Task[Object]] = []
        self._chat: RawPost | None = None
        self._whole: asyncio.Task[httpx.Response] | None = None

    async def start(self, redis: Redis, **fields: JSON) -> None:
        """Begin both, and wait until every reader follows its request."""
        self._chat = await RawPost.send(self._gateway.port, BODY | fields | {"stream": True})
        assert await self._chat.read_head() == 200
        streamed = self._chat.request_id
        self._reading = [
            asyncio.create_task(read(self._gateway, streamed)) for read in (read_events, read_many, read_messages)
        ]
        self._whole = asyncio.create_task(self._post_whole(fields))

        async def are_open() -> bool:
            logs = cast("list[bytes]", await redis.keys("chat:tokens:*"))
            self.ids = [log.decode().partition("{")[2].rstrip("}") for log in logs]
            return len(self.ids) == 2 and len(self._gateway.gateway.services.streams) == 4

        await eventually(are_open)

    async def have(self, code: str) -> None:
        """Wait until every reader has the end with this code."""
        assert self._chat is not None
        assert self._whole is not None
        entries = await asyncio.gather(*self._reading)
        assert [entry.get("code", entry["type"]) for entry in entries] == [code] * 3
        *texts, error, done = await self._chat.read_events()
        assert (texts, done) == ([], "[DONE]")
        assert json.loads(error)["error"]["code"] == code
        response = await self._whole
        assert response.status_code == STATUSES[code]
        assert response.json()["error"]["code"] == code
        for request_id in self.ids:
            assert (await self._client.status(request_id)).state is State.ENDED

    async def _post_whole(self, fields: Object) -> httpx.Response:
        async with httpx.AsyncClient(timeout=120) as http:
            return await http.post(f"{self._gateway.url}/v1/chat/completions", json=BODY | fields)

    def close(self) -> None:
        tasks = [*self._reading, *([self._whole] if self._whole else [])]
        for task in tasks:
            task.cancel()
        if self._chat is not None:
            self._chat.close()


@pytest.fixture
async def readers(start_gateway: StartGateway, client: Client) -> AsyncIterator[Readers]:
    """Streams get their head at once, so that they are open before the job ends. The whole answer waits for its end."""
    gateway = await start_gateway(grace=0, rooms=(whole_room(AnswerPace(grace=600)), *ROOMS))
    readers = Readers(gateway, client)
    yield readers
    readers.close()


async def test_a_job_that_the_workers_refuse_as_too_large(
    readers: Readers, redis: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    await readers.start(redis, user="x" * 2000)
    await start_worker(simulator, max_request_bytes=1024)
    await readers.have("job_too_large")


async def test_a_job_that_kills_its_worker_is_buried(
    readers: Readers, redis: Redis, start_worker: StartWorker, start_process: StartProcess, simulator: Simulator
) -> None:
    await readers.start(redis, user="poison")
    dying = start_process(simulator, program=[str(POISONED_WORKER)], lease=1)
    assert await asyncio.to_thread(dying.wait) == 1
    await start_worker(simulator, max_deliveries=1)
    await readers.have("buried")


async def test_a_job_that_nobody_takes_before_its_deadline(
    readers: Readers, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline passes once every reader is open."""
    await readers.start(redis, relay={"timeout": 600})
    for request_id in readers.ids:
        await let_deadline_pass(redis, request_id)
    monkeypatch.setattr(time, "time", lambda: time.monotonic() + 1e11)  # the readers have the former deadline
    await readers.have("deadline")


@pytest.mark.parametrize("way", ["delete", "client"])
async def test_a_job_that_waits_and_that_another_client_cancels(
    readers: Readers, redis: Redis, client: Client, gateway: Served, http: httpx.AsyncClient, way: str
) -> None:
    """By another replica, or by the Python API."""
    await readers.start(redis)
    for request_id in readers.ids:
        if way == "delete":
            assert (await http.delete(f"{gateway.url}/requests/{request_id}")).json()["outcome"] == "cancelled"
        else:
            await client.cancel(request_id)
    await readers.have("cancelled")


@pytest.mark.usefixtures("worker")
async def test_a_log_that_has_expired(gateway: Served, http: httpx.AsyncClient, client: Client) -> None:
    """Every route reports it, and a repetition with the same key begins no second job."""
    headers = {"Idempotency-Key": "k", "Relay-Retention": "1"}
    post = await http.post(f"{gateway.url}/v1/chat/completions", json=BODY, headers=headers)
    assert post.status_code == 200
    request_id = post.headers["x-request-id"]

    async def has_expired() -> bool:
        return (await client.status(request_id)).state is State.EXPIRED

    await eventually(has_expired)
    for path in (f"/requests/{request_id}/events", f"/events?ids={request_id}"):
        reader = await EventReader.open(gateway.port, path, Accept="text/event-stream")
        ((_, name, data),) = [event async for event in reader.events()]
        assert (name, json.loads(data)["error"]["code"]) == ("gone", "gone")
    async with connect(f"ws://127.0.0.1:{gateway.port}/requests/{request_id}/ws", proxy=None) as socket:
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 4410
    for stream in (False, True):
        again = await http.post(
            f"{gateway.url}/v1/chat/completions", json=BODY | ({"stream": True} if stream else {}), headers=headers
        )
        expected = (422, "idempotency_conflict") if stream else (410, "gone")  # another body, and the same one
        assert (again.status_code, again.json()["error"]["code"]) == expected

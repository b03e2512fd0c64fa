"""A gateway is replaced while readers follow: they notice nothing."""

import asyncio
import json
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

import httpx
from conftest import StartSimulator, StartWorker
from deploy_followers import deploy_under_followers
from edge_fixtures import StartReplica
from serving import entries_of
from steered_clock import SteeredClock
from waits import eventually
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError

from worker import Client
from worker.sandbox.simulator.server import Options, Scenario


class OtherFollower:
    """Follows in another way than server-sent events of one request, and comes back as the protocol tells it.

    Every other end is an exception. `received` are the ids of entries, or the events of a chat completion.
    """

    def __init__(self, port: Callable[[], int], http: httpx.AsyncClient) -> None:
        self.received: list[str] = []
        self.connections = 0
        self.request_id = ""
        """That of the chat completion."""
        self._port, self._http = port, http

    def _address(self) -> str:
        self.connections += 1
        return f"127.0.0.1:{self._port()}"

    async def websocket(self, request_id: str) -> None:
        while True:
            after = self.received[-1] if self.received else ""
            with suppress(ConnectionClosedError):
                url = f"ws://{self._address()}/requests/{request_id}/ws?after={after}"
                async with connect(url, proxy=None, open_timeout=120) as websocket:
                    async for message in websocket:
                        self.received += [str(entry["id"]) for entry in entries_of(message)]
            if websocket.close_code == 1000:
                return
            assert websocket.close_code == 1012

    async def many(self, ids: Sequence[str]) -> None:
        last = ""
        while True:
            params = {"ids": ",".join(ids), "after": last}
            async with self._http.stream("GET", f"http://{self._address()}/events", params=params) as response:
                if response.status_code == 204:
                    return
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    name, _, value = line.partition(": ")
                    assert name != "event", value
                    if name == "id":
                        last = value
                    elif name == "data":
                        for part in json.loads(value):
                            self.received += [f"{part['request']} {entry['id']}" for entry in part["entries"]]

    async def chat(self, key: str) -> None:
        body = {"model": "reciter", "messages": [{"role": "user", "content": "Tell me"}], "stream": True}
        while not self.received or self.received[-1] != "[DONE]":
            headers = {"Idempotency-Key": key} | ({"Relay-After": str(len(self.received))} if self.received else {})
            url = f"http://{self._address()}/v1/chat/completions"
            async with self._http.stream("POST", url, json=body, headers=headers) as response:
                assert response.status_code == 200
                self.request_id = response.headers["x-request-id"]
                async for line in response.aiter_lines():
                    if line.startswith('data: {"error"'):
                        assert json.loads(line.removeprefix("data: "))["error"]["code"] == "interrupted"
                        break
                    if line.startswith("data: "):
                        self.received.append(line.removeprefix("data: "))


async def test_followers_notice_nothing_of_a_deploy(
    start_replica: StartReplica, start_simulator: StartSimulator, start_worker: StartWorker, client: Client
) -> None:
    """Sixty: five by WebSocket, five of several requests each, five of a chat completion, and 45 of one request.

    No answer ends before the first gateway has: its followers would not connect again.
    """
    clock = SteeredClock(halt_after=150)
    simulator = await start_simulator(Options(scenario=Scenario(tokens=200, rate=20.0)), clock=clock)
    await start_worker(simulator, lease=60, first_token_timeout=60, gap_timeout=300)
    first, second = await start_replica(drain_delay=0.5, drain_timeout=0.5), await start_replica()
    requests = [await client.enqueue({"messages": [{"role": "user", "content": f"Tell me {n}"}]}) for n in range(6)]
    port = first.port
    async with httpx.AsyncClient(timeout=120) as http, asyncio.TaskGroup() as following:
        sockets, many, chats = ([OtherFollower(lambda: port, http) for _ in range(5)] for _ in range(3))
        for number in range(5):
            following.create_task(sockets[number].websocket(requests[number]))
            following.create_task(many[number].many(requests[: number + 2]))
            following.create_task(chats[number].chat("a key"))

        async def end_the_first() -> int:
            async def all_have_entries() -> bool:
                return all(len(follower.received) > 3 for follower in (*sockets, *many, *chats))

            await eventually(all_have_entries)
            nonlocal port
            port = second.port
            status = await first.end(signal.SIGTERM)
            clock.release()
            return status

        deploy = await deploy_under_followers(requests, 45, (first.port, second.port), end_the_first, client)
    assert not deploy.errors, deploy.errors[:5]
    assert deploy.moved
    assert deploy.status == 0
    for number in range(5):
        assert sockets[number].received == deploy.logs[requests[number]]
        for request_id in requests[: number + 2]:
            ids = [text.split()[1] for text in many[number].received if text.split()[0] == request_id]
            assert ids == deploy.logs[request_id]
        assert sockets[number].connections == chats[number].connections == many[number].connections - 1 == 2
        *chunks, end = chats[number].received
        text = "".join(json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert (text, end) == ((await client.result(chats[number].request_id)).text, "[DONE]")

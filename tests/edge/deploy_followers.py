"""Many followers over raw sockets while a gateway is replaced: no error, and every entry once, in order.

    .venv/bin/python tests/edge/deploy_followers.py --followers 2000

A follower does what an EventSource does: after a clean end it connects again with the last id that it has. A load
balancer would send it to the second gateway by then, and so does this program. Everything but a clean end is an error.
"""
# ruff: noqa: E402 - where the project is not installed, the imports below need the changed sys.path

import asyncio
import json
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import click
import uvloop
from command import environment
from replicas import replica_process

from worker import Client
from worker.sandbox.embedded_redis import start_redis
from worker.sandbox.simulator.server import Options, Scenario, Simulator

_ENDS = {"done", "error", "cancelled"}
_PATIENCE = 300.0
_TREE = click.Path(path_type=Path, exists=True, resolve_path=True)


class Follower(asyncio.Protocol):
    """Follows one request. `errors` is what a client would notice, `ids` are the entries in the order of arrival."""

    def __init__(self, request_id: str, port: Callable[[], int]) -> None:
        self.ids: list[str] = []
        self.errors: list[str] = []
        self.connections = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request_id = request_id
        self._port = port
        self._begin()

    def _begin(self) -> None:
        self._raw, self._events = bytearray(), bytearray()
        self._has_head = self._ended = False
        self._transport: asyncio.Transport | None = None

    async def connect(self) -> None:
        self._begin()
        self.connections += 1
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port())
        except OSError as error:
            self._fail(f"refused: {error}")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not derive from it
        last = f"Last-Event-ID: {self.ids[-1]}\r\n" if self.ids else ""
        head = f"GET /requests/{self._request_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
        self._transport.write(f"{head}{last}\r\n".encode())

    def data_received(self, data: bytes) -> None:
        self._raw += data
        if not self._has_head:
            head, found, rest = self._raw.partition(b"\r\n\r\n")
            if not found:
                return
            if b" 200 " not in head.split(b"\r\n")[0] or b"chunked" not in head.lower():
                self._fail(f"answered {bytes(head[:80])!r}")
                return
            self._has_head, self._raw = True, rest
        while not self._ended and (size := self._raw.find(b"\r\n")) >= 0:
            length = int(self._raw[:size], 16)
            if len(self._raw) < size + 2 + length + 2:
                return
            self._events += self._raw[size + 2 : size + 2 + length]
            del self._raw[: size + 2 + length + 2]
            self._ended = length == 0
        self._read_events()
        if self._ended:
            self._leave()
            if not self.over.done():
                self._reconnecting = asyncio.create_task(self.connect())

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended:
            self._fail(f"the connection was lost after {self.ids[-1:]}: {exc}")

    def _read_events(self) -> None:
        *events, rest = self._events.split(b"\n\n")
        self._events = rest
        for event in events:
            data = next((line[6:] for line in event.split(b"\n") if line.startswith(b"data: ")), None)
            if b"event:" in event:
                self._fail(f"an event of a fault: {bytes(event[:200])!r}")
            for entry in json.loads(data) if data is not None else ():
                self.ids.append(entry["id"])
                if entry["type"] in _ENDS:
                    self._ended = True
                    self._finish()

    def _fail(self, error: str) -> None:
        if not self.over.done():
            self.errors.append(error)
            self._ended = True
            self._leave()
            self._finish()

    def _finish(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def _leave(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass
class Deploy:
    """What came of a deploy under followers."""

    followers: list[Follower]
    logs: dict[str, list[str]] = field(default_factory=dict)
    """The ids of the entries of each log."""
    status: int = 0
    """With which the first gateway has ended."""
    seconds: float = 0.0
    """From the signal to its end."""

    @property
    def errors(self) -> list[str]:
        return [error for follower in self.followers for error in follower.errors]

    @property
    def moved(self) -> int:
        """How many followers had to connect again."""
        return sum(follower.connections > 1 for follower in self.followers)


async def deploy_under_followers(
    requests: Sequence[str], followers: int, ports: tuple[int, int], end_the_first: Callable[[], Awaitable[int]],
    client: Client,
) -> Deploy:  # fmt: skip
    """Follow requests by the first gateway, end it once every follower has entries, and read on by the second."""
    now = iter(ports)
    port = next(now)
    made = [Follower(requests[number % len(requests)], lambda: port) for number in range(followers)]
    for follower in made:
        await follower.connect()
    async with asyncio.timeout(_PATIENCE):
        while not all(len(follower.ids) > 3 or follower.over.done() for follower in made):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        port = next(now)
        began = time.monotonic()
        deploy = Deploy(made, status=await end_the_first(), seconds=time.monotonic() - began)
        await asyncio.gather(*(follower.over for follower in made))
    deploy.logs = {each: [str(entry.id) async for entry in client.follow(each)] for each in requests}
    for number, follower in enumerate(made):
        if follower.ids != deploy.logs[requests[number % len(requests)]]:
            follower.errors.append(f"entries are missing or doubled: {len(follower.ids)}")
    return deploy


async def _measure(
    followers: int, requests: int, tokens: int, rate: float, first_tree: Path | None, second_tree: Path | None
) -> Deploy:
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(start_redis())
        simulator = await stack.enter_async_context(Simulator(Options(scenario=Scenario(tokens=tokens, rate=rate))))
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "worker", "run",
            env=environment(
                REDIS_URL=redis.url, VLLM_URLS=simulator.url, WORKER_SLOTS=str(requests), WORKER_LOG_LEVEL="error"
            ),
        )  # fmt: skip
        stack.push_async_callback(worker.wait)
        stack.callback(worker.terminate)
        first = await stack.enter_async_context(
            replica_process(redis.url, 0, first_tree, drain_delay=1, access_log="false")
        )
        second = await stack.enter_async_context(replica_process(redis.url, 0, second_tree, access_log="false"))
        client = await stack.enter_async_context(Client(redis.url))
        ids = [
            await client.enqueue({"messages": [{"role": "user", "content": f"Tell me {number}"}]})
            for number in range(requests)
        ]
        ports = (first.port, second.port)
        return await deploy_under_followers(ids, followers, ports, lambda: first.end(signal.SIGTERM), client)


@click.command()
@click.option("--followers", default=2000, show_default=True)
@click.option("--requests", default=200, show_default=True)
@click.option("--tokens", default=150, show_default=True, help="Of each answer.")
@click.option("--rate", default=5.0, show_default=True, help="Tokens a second of each answer.")
@click.option("--first", "first_tree", type=_TREE, help="Folder of another version, which the first gateway runs.")
@click.option("--second", "second_tree", type=_TREE, help="Folder of another version, which the second gateway runs.")
def main(
    followers: int, requests: int, tokens: int, rate: float, first_tree: Path | None, second_tree: Path | None
) -> None:
    """Replace a gateway under followers, and print what they noticed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    deploy = uvloop.run(_measure(followers, requests, tokens, rate, first_tree, second_tree))
    entries = sum(len(follower.ids) for follower in deploy.followers)
    click.echo(
        f"{followers:,} followers of {requests:,} requests, {entries:,} entries: {len(deploy.errors):,} errors; "
        f"{deploy.moved:,} connected again; the gateway ended with {deploy.status} after {deploy.seconds:.1f} s"
    )
    for error in deploy.errors[:10]:
        click.echo(error)
    sys.exit(bool(deploy.errors or deploy.status))


if __name__ == "__main__":
    main()

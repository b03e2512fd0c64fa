"""A server for tests of streams: uvicorn in the test's own event loop, and readers of its responses."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TypeAlias, cast

import msgspec
import uvicorn

from worker import Client
from worker.contract.entries import JSON, Object
from worker.gateway.delivery_meter import DeliveryMeter
from worker.gateway.open_streams import OpenStreams, QueuePosition, StreamPace
from worker.gateway.outlets import Receive, Scope, Send
from worker.gateway.tails import Tails
from worker.telemetry.events import Event

App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class Events:
    """Keeps every event."""

    def __init__(self) -> None:
        self.seen: list[Event] = []

    def emit(self, event: Event) -> None:
        self.seen.append(event)

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.seen)


def open_streams(
    client: Client, events: Events | None = None, pace: StreamPace | None = None, position: QueuePosition | None = None
) -> OpenStreams:
    """The open streams of a replica, with its client."""
    events = events or Events()
    tails = Tails(client, DeliveryMeter(events))
    if position is None:
        return OpenStreams(tails, pace=pace, telemetry=events)
    return OpenStreams(tails, position=position, pace=pace, telemetry=events)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve(app: App) -> AsyncIterator[int]:
    """Serve an application; yields the port. At the end, connections that are still open are cut."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, http="httptools", ws="websockets-sansio", lifespan="off",
        log_level="critical", access_log=False, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event
        await asyncio.sleep(0.001)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


class EventReader:
    """Reads a stream of server-sent events from a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.comments: list[str] = []
        self.is_whole = False
        """Whether the response has ended with its last chunk."""

    @classmethod
    async def open(cls, port: int, path: str, method: str = "GET", **headers: str) -> "EventReader":
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        self = cls(reader, writer)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(head[0].split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        return self

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the chunks of the body up to the last one, or to where the connection breaks."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(self._writer):
            if "content-length" in self.headers:
                yield await self._reader.readexactly(int(self.headers["content-length"]))
                self.is_whole = True
                return
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readexactly(2)
            self.is_whole = True

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def events(self) -> AsyncIterator[tuple[str, str, str]]:
        """Yield each event as its id, name and data."""
        rest = b""
        async for chunk in self.chunks():
            *events, rest = (rest + chunk).split(b"\n\n")
            for raw in events:
                fields: dict[str, str] = {}
                for line in raw.decode().split("\n"):
                    name, _, value = line.partition(": ")
                    if name:
                        fields[name] = value
                    else:
                        self.comments.append(value)
                if "data" in fields:
                    yield fields.get("id", ""), fields.get("event", ""), fields["data"]
        assert not rest

    async def entries(self) -> list[Object]:
        """The entries of all events up to the end."""
        return [entry async for _, _, data in self.events() for entry in entries_of(data)]

    def close(self) -> None:
        self._writer.close()


def entries_of(data: str | bytes) -> list[Object]:
    return cast("list[Object]", msgspec.json.decode(data))


def as_json(value: object) -> JSON:
    return cast("JSON", msgspec.json.decode(msgspec.json.encode(value)))

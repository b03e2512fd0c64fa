"""The response that streams one log: heartbeats, clients that do not read, and the ends of a stream."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from gateway_fixtures import Served, StartGateway
from redis.asyncio import Redis
from serving import App, EventReader, Events, as_json, entries_of, open_streams, serve
from waits import eventually
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from written_log import END, START, WrittenLog, delta

from worker import Client
from worker.contract.entries import Delta, Entry, Failed, Opened, Queued
from worker.contract.ids import QUEUED, SEAL, EntryId
from worker.gateway.open_streams import OpenStreams, StreamPace
from worker.gateway.outlets import Receive, Scope, Send
from worker.gateway.protocols.chat_chunks import ChatChunks
from worker.gateway.protocols.native import NativeEvents
from worker.gateway.protocols.protocol import StreamProtocol
from worker.gateway.settings import GatewaySettings
from worker.gateway.stream_response import StreamResponse
from worker.telemetry.stream_events import CaughtUp, FollowerDropped, StreamClosed, StreamOpened


def app_of(streams: OpenStreams, log: WrittenLog, protocol: StreamProtocol) -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamResponse(streams, log.id, protocol)(scope, receive, send)

    return app


async def close(streams: OpenStreams) -> None:
    await streams.aclose()
    await streams.tails.aclose()


async def follows(log: WrittenLog) -> None:
    async def is_followed() -> bool:
        return await log.subscribers() > 0

    await eventually(is_followed)


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
async def streams(client: Client, events: Events) -> AsyncIterator[OpenStreams]:
    streams = open_streams(client, events)
    yield streams
    await close(streams)


async def test_a_live_log_arrives_entry_by_entry_and_ends_cleanly(
    streams: OpenStreams, events: Events, log: WrittenLog
) -> None:
    await log.write(START, delta(1, 1))
    async with serve(app_of(streams, log, NativeEvents())) as port:
        readers = [await EventReader.open(port, "/") for _ in range(3)]
        reading = [asyncio.create_task(reader.entries()) for reader in readers]
        await follows(log)
        await log.append(*(delta(1, n) for n in range(2, 50)), END)
        for entries in await asyncio.gather(*reading):
            assert entries == [as_json(entry.as_dict()) for entry in log.written]
        assert all(reader.is_whole for reader in readers)
    assert (events.count(StreamOpened), events.count(StreamClosed), events.count(CaughtUp)) == (3, 3, 3)


async def test_a_backlog_comes_in_few_events(streams: OpenStreams, log: WrittenLog) -> None:
    await log.write(START, *(delta(1, n) for n in range(1, 10_000)), END)
    async with serve(app_of(streams, log, NativeEvents())) as port:
        reader = await EventReader.open(port, "/")
        frames = [entries_of(data) async for _, _, data in reader.events()]
    assert len(frames) <= 20
    assert sum(map(len, frames)) == 10_001


async def test_a_client_that_leaves_ends_only_its_stream(streams: OpenStreams, events: Events, log: WrittenLog) -> None:
    await log.write(START)
    async with serve(app_of(streams, log, NativeEvents())) as port:
        leaving, staying = [await EventReader.open(port, "/") for _ in range(2)]
        reading = asyncio.create_task(staying.entries())
        await follows(log)
        leaving.close()

        async def has_left() -> bool:
            return events.count(StreamClosed) == 1

        await eventually(has_left)
        await log.append(delta(1, 1), END)
        assert len(await reading) == 3
    ends = [event.end for event in events.seen if isinstance(event, StreamClosed)]
    assert ends == ["left", "done"]


async def test_a_waiting_stream_gets_the_place_in_the_queue_and_then_heartbeats(
    client: Client, log: WrittenLog
) -> None:
    places = iter([12, 7, None])
    asked: list[str] = []

    async def position(request_id: str) -> int | None:
        asked.append(request_id)
        return next(places, None)

    streams = open_streams(client, pace=StreamPace(heartbeat=0.02, tick=0.01), position=position)
    await log.write(Queued(id=QUEUED))
    async with serve(app_of(streams, log, NativeEvents())) as port:
        reader = await EventReader.open(port, "/")
        reading = asyncio.create_task(reader.entries())

        async def is_alive() -> bool:
            return "queued 7" in reader.comments and reader.comments[-1] == "ping"

        await eventually(is_alive)
        assert [text for text in reader.comments if text != "ping"] == ["queued 12", "queued 7"]
        await log.append(START)
        seen, count = len(asked), len(reader.comments)

        async def beats_on() -> bool:
            return len(reader.comments) > count + 3

        await eventually(beats_on)
        assert len(asked) <= seen + 1
        await log.append(END)
        assert len(await reading) == 3
    assert set(asked) == {log.id}
    await close(streams)


async def test_a_chat_completion_gets_comments_before_its_first_token_and_between_tokens(
    client: Client, log: WrittenLog
) -> None:
    async def position(_: str) -> int | None:
        return 3

    streams = open_streams(client, pace=StreamPace(heartbeat=0.02, tick=0.01), position=position)
    await log.write(Queued(id=QUEUED))
    async with serve(app_of(streams, log, ChatChunks())) as port:
        reader = await EventReader.open(port, "/")
        received: list[str] = []

        async def read() -> None:
            async for _, _, data in reader.events():
                received.append(data)

        reading = asyncio.create_task(read())

        async def has_place() -> bool:
            return "queued 3" in reader.comments

        await eventually(has_place)
        for count, entry in enumerate((START, Opened(id=EntryId(1, 1), response_id="c"), delta(1, 2), delta(1, 3))):
            await log.append(entry)

            async def has_event(count: int = count) -> bool:
                return len(received) == count

            await eventually(has_event)
            seen = len(reader.comments)

            async def is_alive(seen: int = seen) -> bool:
                return "ping" in reader.comments[seen:]

            await eventually(is_alive)
        await log.append(END)
        await reading
    await close(streams)


def test_a_silent_stream_gets_a_comment_every_10_to_15_seconds_by_default() -> None:
    """Proxies close a connection that is silent for longer; the OpenAI clients read each comment."""
    heartbeat = GatewaySettings.model_fields["heartbeat"].default
    assert heartbeat >= 10
    assert heartbeat + StreamPace().tick <= 15


async def test_a_client_that_never_reads_loses_only_itself(client: Client, events: Events, log: WrittenLog) -> None:
    streams = open_streams(client, events, StreamPace(write_timeout=5.0, tick=0.05))
    text = "x" * 200_000
    answer: list[Entry] = [START, *(Delta(id=EntryId(1, n), content=text) for n in range(1, 100)), END]
    async with serve(app_of(streams, log, NativeEvents())) as port:
        stalled = socket.create_connection(("127.0.0.1", port))
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        await log.write(answer[0])
        reader = await EventReader.open(port, "/")
        reading = asyncio.create_task(reader.entries())
        await follows(log)
        await log.append(*answer[1:])
        assert len(await reading) == len(answer)

        async def is_dropped() -> bool:
            return events.count(FollowerDropped) == 1

        await eventually(is_dropped)
        stalled.close()
    ends = [event.end for event in events.seen if isinstance(event, StreamClosed)]
    assert sorted(ends) == ["done", "stalled"]
    await close(streams)


async def test_a_stream_that_must_stop_in_the_middle_ends_as_its_protocol_needs(
    streams: OpenStreams, log: WrittenLog
) -> None:
    await log.write(START, delta(1, 1))
    apps = [app_of(streams, log, protocol) for protocol in (NativeEvents(), ChatChunks())]
    async with serve(apps[0]) as native, serve(apps[1]) as chat:
        readers = [await EventReader.open(port, "/") for port in (native, chat)]
        reading = [asyncio.create_task(reader.body()) for reader in readers]
        await follows(log)
        streams.end_all(5.0)
        bodies = await asyncio.gather(*reading)
        assert bodies[0].endswith(b"retry: 1000\n\n")
        assert b'data: {"error":{' in bodies[1]
        late = await EventReader.open(native, "/")
        assert await late.body() == b"retry: 1000\n\n"
        assert all(reader.is_whole for reader in (*readers, late))


async def test_an_error_of_the_log_ends_the_stream_in_band(streams: OpenStreams, log: WrittenLog, redis: Redis) -> None:
    await log.write(START, delta(1, 1), delta(1, 3), Failed(id=SEAL, code="internal"))  # 1-2 is missing
    async with serve(app_of(streams, log, NativeEvents())) as port:
        reader = await EventReader.open(port, "/")
        found = [event async for event in reader.events()]
    assert [(event_id, name) for event_id, name, _ in found] == [("1-1", ""), (str(SEAL), "gone")]
    assert await redis.exists(log.key)


async def test_head_has_no_body(streams: OpenStreams, log: WrittenLog) -> None:
    await log.write(START)
    async with serve(app_of(streams, log, NativeEvents())) as port:
        reader = await EventReader.open(port, "/", method="HEAD")
        assert reader.status == 200
        reader.close()
    assert len(streams) == 0


CLOSE_CODES = [("unknown", "", 4404), ("gone", "", 4410), ("here", "?after=abc", 4400)]


@pytest.mark.parametrize(("request_id", "query", "code"), CLOSE_CODES)
async def test_a_websocket_that_is_refused_gets_a_close_code(
    gateway: Served, redis: Redis, request_id: str, query: str, code: int
) -> None:
    await redis.set("chat:ended:{gone}", b'{"outcome":"done","time":1}', ex=60)
    await WrittenLog(redis, "here").write(START)
    url = f"ws://127.0.0.1:{gateway.port}/requests/{request_id}/ws{query}"
    async with connect(url, proxy=None) as websocket:
        with pytest.raises(ConnectionClosed) as closed:
            await websocket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == code


async def test_every_message_of_a_websocket_is_an_array_of_entries(
    start_gateway: StartGateway, log: WrittenLog
) -> None:
    """Also in the silence in which an event stream gets comments."""
    gateway = await start_gateway(heartbeat=0.1)
    await log.write(Queued(id=QUEUED))
    events = await EventReader.open(gateway.port, f"/requests/{log.id}/events")
    async with connect(f"ws://127.0.0.1:{gateway.port}/requests/{log.id}/ws", proxy=None) as websocket:
        messages = [await websocket.recv()]
        reading = asyncio.create_task(events.entries())

        async def is_silent() -> bool:
            return len(events.comments) > 2

        await eventually(is_silent)
        await log.append(START, END)
        with pytest.raises(ConnectionClosed):  # noqa: PT012 - the messages end with the connection
            while True:
                messages.append(await websocket.recv())
        assert len(await reading) == 3
    assert [entry["type"] for message in messages for entry in entries_of(message)] == ["queued", "started", "done"]


async def test_a_websocket_is_told_to_come_back_after_a_restart(start_gateway: StartGateway, log: WrittenLog) -> None:
    gateway = await start_gateway()
    await log.write(START)
    url = f"ws://127.0.0.1:{gateway.port}/requests/{log.id}/ws"
    async with connect(url, proxy=None, subprotocols=["vllm-relay.v1"]) as websocket:  # type: ignore[list-item]  # a NewType
        assert websocket.subprotocol == "vllm-relay.v1"
        await websocket.recv()
        await websocket.send("ignored")
        gateway.gateway.stop()
        with pytest.raises(ConnectionClosed) as closed:
            await websocket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012

"""The response that streams one log, served by uvicorn."""

import asyncio

from serving import EventReader, Events, as_json, open_streams, serve
from waits import eventually
from written_log import END, START, WrittenLog, delta

from worker import Client
from worker.gateway.outlets import Receive, Scope, Send
from worker.gateway.protocols.native import NativeEvents
from worker.gateway.stream_response import StreamResponse
from worker.telemetry.stream_events import StreamClosed


async def test_a_live_log_arrives_entry_by_entry_and_ends_cleanly(client: Client, log: WrittenLog) -> None:
    events = Events()
    streams = open_streams(client, events)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamResponse(streams, log.id, NativeEvents())(scope, receive, send)

    await log.write(START, delta(1, 1))
    async with serve(app) as port:
        readers = [await EventReader.open(port, "/") for _ in range(3)]
        reading = [asyncio.create_task(reader.entries()) for reader in readers]

        async def subscribed() -> bool:
            return await log.subscribers() > 0

        await eventually(subscribed)
        await log.append(*(delta(1, n) for n in range(2, 50)), END)
        for entries in await asyncio.gather(*reading):
            assert entries == [as_json(entry.as_dict()) for entry in log.written]
        assert all(reader.is_whole for reader in readers)
    assert events.count(StreamClosed) == 3
    await streams.aclose()
    await streams.tails.aclose()

"""The cursor of the event stream of all requests: every event has it, so it must stay small."""

import json

import httpx
from conftest import StartWorker
from gateway_fixtures import Served
from serving import EventReader
from waits import eventually

from worker import Client
from worker.gateway.multiplex import short_id
from worker.sandbox.simulator.server import Simulator

BODY = {"messages": [{"role": "user", "content": "Who are you?"}]}
ENDED_NAMED = 8


async def test_a_cursor_names_the_latest_requests_that_have_ended_and_no_others(
    gateway: Served, http: httpx.AsyncClient, client: Client
) -> None:
    ids = [(await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"] for _ in range(12)]
    reader = await EventReader.open(gateway.port, "/events")
    events, cursor = reader.events(), ""
    for _ in ids:
        await anext(events)
    for request_id in ids:
        await client.cancel(request_id)
        cursor, _, data = await anext(events)
        assert request_id in data
    # The last request is named as one that is followed: it has ended with this event.
    assert cursor.split(",") == [f"{short_id(request_id)}:end" for request_id in ids[-1 - ENDED_NAMED :]]
    reader.close()

    (latest,) = [(await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"]]
    again = await EventReader.open(gateway.port, "/events", Last_Event_ID=cursor)
    cursor, _, data = await anext(again.events())
    assert latest in data
    assert cursor == f"{short_id(latest)}:0-1", "a reader that comes back follows what runs"
    again.close()


async def test_a_reader_that_comes_back_gets_the_ends_that_it_missed(
    gateway: Served, http: httpx.AsyncClient, client: Client, simulator: Simulator, start_worker: StartWorker
) -> None:
    ids = [(await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"] for _ in range(2)]
    reader = await EventReader.open(gateway.port, "/events")
    events, cursor = reader.events(), ""
    for _ in ids:
        cursor, _, _ = await anext(events)
    reader.close()
    await start_worker(simulator)
    for request_id in ids:
        await client.result(request_id)

    async def are_forgotten() -> bool:
        return not (await http.get(f"{gateway.url}/requests")).json()["requests"]

    await eventually(are_forgotten)
    again = await EventReader.open(gateway.port, "/events", Last_Event_ID=cursor)
    missed, entries = set(ids), dict[str, list[str]]()
    async for _, _, data in again.events():
        for part in json.loads(data):
            entries.setdefault(part["request"], []).extend(entry["type"] for entry in part["entries"])
        missed -= {request_id for request_id, types in entries.items() if types[-1] == "done"}
        if not missed:
            break
    assert not any("queued" in types for types in entries.values()), "it has that entry already"
    again.close()

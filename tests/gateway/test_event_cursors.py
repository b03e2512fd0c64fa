"""The cursor of the event stream of all requests: every event has it, so it must stay small."""

import json

import httpx
from conftest import StartWorker
from gateway_fixtures import Served
from redis.asyncio import Redis
from serving import EventReader
from waits import eventually

from worker import Client
from worker.contract.keys import Keys
from worker.gateway.multiplex import MOST_REQUESTS, short_id
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


async def test_a_reader_gets_the_end_of_a_request_that_no_worker_ever_met(
    gateway: Served, http: httpx.AsyncClient
) -> None:
    cancelled = (await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"]
    reader = await EventReader.open(gateway.port, "/events")
    cursor, _, _ = await anext(reader.events())
    reader.close()
    await http.delete(f"{gateway.url}/requests/{cancelled}")  # the lifecycle has nothing of it until a worker comes
    again = await EventReader.open(gateway.port, "/events", Last_Event_ID=cursor)
    _, _, data = await anext(again.events())
    assert [(part["request"], [entry["type"] for entry in part["entries"]]) for part in json.loads(data)] == [
        (cancelled, ["cancelled"])
    ]
    again.close()


async def test_a_reader_learns_that_a_log_which_it_followed_is_gone(
    gateway: Served, http: httpx.AsyncClient, client: Client, redis: Redis
) -> None:
    lost = (await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"]
    reader = await EventReader.open(gateway.port, "/events")
    cursor, _, _ = await anext(reader.events())
    reader.close()
    await client.cancel(lost)
    await redis.delete(Keys().tokens(lost))
    again = await EventReader.open(gateway.port, "/events", Last_Event_ID=cursor)
    _, name, data = await anext(again.events())
    assert (name, json.loads(data)["request"]) == ("gone", lost)
    again.close()


async def test_requests_that_nobody_saw_end_hide_none_that_runs(
    gateway: Served, http: httpx.AsyncClient, client: Client
) -> None:
    runs = (await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"]
    ended = [(await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"] for _ in range(MOST_REQUESTS + 1)]
    reader = await EventReader.open(gateway.port, "/events")
    events, seen = reader.events(), set[str]()
    while len(seen) < MOST_REQUESTS:  # of all those that wait, the newest
        _, _, data = await anext(events)
        seen |= {part["request"] for part in json.loads(data)}
    assert runs not in seen
    for request_id in ended:
        await client.cancel(request_id)
    while runs not in seen:
        _, _, data = await anext(events)
        seen |= {part["request"] for part in json.loads(data)}
    reader.close()

    for _ in range(MOST_REQUESTS + 1):
        request_id = (await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"]
        await client.cancel(request_id)
    listed = (await http.get(f"{gateway.url}/requests")).json()["requests"]
    assert [shown["id"] for shown in listed] == [runs]

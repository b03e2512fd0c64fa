"""The native API: start a request, read its state, follow it, cancel it."""

import asyncio
from typing import cast

import httpx
import msgspec
import pytest
from conftest import stream
from gateway_fixtures import KEY_A, KEY_ALL, KEY_B, KEYS, Served, StartGateway
from redis.asyncio import Redis
from serving import EventReader, as_json, entries_of
from waits import eventually
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from written_log import END, START, WrittenLog, delta

from worker import Client
from worker.contract.entries import Cancelled, Failed, Object, Restarted, Started
from worker.contract.ids import SEAL, EntryId
from worker.gateway.ids import new_id

BODY = {"messages": [{"role": "user", "content": "Who are you?"}]}
EVENT_SOURCE = {"Accept": "text/event-stream"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def error_of(response: httpx.Response) -> Object:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return cast("Object", error)


@pytest.mark.usefixtures("worker")
async def test_a_request_is_started_followed_and_read(gateway: Served, http: httpx.AsyncClient) -> None:
    started = await http.post(f"{gateway.url}/requests", json=BODY)
    assert started.status_code == 202
    urls = started.json()["urls"]
    assert started.headers["location"] == urls["state"]
    reader = await EventReader.open(gateway.port, urls["events"])
    entries = await reader.entries()
    text = "".join(str(entry.get("content", "")) for entry in entries)
    state = (await http.get(gateway.url + urls["state"])).json()
    assert entries[-1]["type"] == "done"
    assert text
    assert state["text"] == text
    assert state["state"] == "ended"
    assert state["outcome"] == "done"
    assert state["usage"]["completion_tokens"] > 0
    assert state["cursor"] == str(SEAL)


async def test_a_waiting_request_has_a_place_in_its_queue_and_can_be_cancelled(
    gateway: Served, http: httpx.AsyncClient
) -> None:
    ids = [(await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"] for _ in range(2)]
    state = (await http.get(f"{gateway.url}/requests/{ids[0]}")).json()
    assert (state["state"], state["position"]) == ("queued", 0)
    listed = (await http.get(f"{gateway.url}/requests")).json()["requests"]
    assert {request["id"] for request in listed} == set(ids)
    cancelled = await http.delete(f"{gateway.url}/requests/{ids[0]}")
    assert cancelled.json() == {"id": ids[0], "state": "ended", "outcome": "cancelled"}
    assert (await http.delete(f"{gateway.url}/requests/{ids[0]}")).json()["outcome"] == "cancelled"
    listed = (await http.get(f"{gateway.url}/requests")).json()["requests"]
    assert [request["id"] for request in listed] == [ids[1]]


async def test_a_read_waits_for_the_end(gateway: Served, http: httpx.AsyncClient, log: WrittenLog) -> None:
    await log.write(START, delta(1, 1))
    waiting = asyncio.create_task(http.get(f"{gateway.url}/requests/{log.id}?wait=60"))

    async def is_followed() -> bool:
        return await log.subscribers() == 1

    await eventually(is_followed)
    await log.append(delta(1, 2), END)
    state = (await waiting).json()
    assert (state["text"], state["state"]) == ("1-1 1-2 ", "ended")
    short = await http.get(f"{gateway.url}/requests/{log.id}?wait=0.01")
    assert short.json()["state"] == "ended"


@pytest.mark.parametrize("wait", ["abc", "-1", "61", "nan", "inf"])
async def test_a_bad_wait_is_refused(gateway: Served, http: httpx.AsyncClient, log: WrittenLog, wait: str) -> None:
    await log.write(START)
    response = await http.get(f"{gateway.url}/requests/{log.id}?wait={wait}")
    assert response.status_code == 400
    assert error_of(response)["param"] == "wait"


async def test_options_of_the_job_are_taken_from_the_body_or_from_headers(
    gateway: Served, http: httpx.AsyncClient, redis: Redis
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    relay = {"queue": "bulk", "retention": 60, "tenant": "t"}
    await http.post(f"{gateway.url}/requests", json=BODY | {"relay": relay}, headers={"traceparent": "00-" + "1" * 300})
    headers = {"Relay-Queue": "bulk", "Relay-Timeout": "30", "Relay-Fallbacks": "m1, m2", "traceparent": trace}
    await http.post(f"{gateway.url}/requests", json=BODY, headers=headers)
    jobs = [fields for _, fields in await stream(redis, "chat:jobs:bulk")]
    assert b"relay" not in msgspec.json.decode(jobs[0][b"request"])
    assert (jobs[0][b"retention"], jobs[0][b"tenant"]) == (b"60", b"t")
    assert msgspec.json.decode(jobs[1][b"fallbacks"]) == ["m1", "m2"]
    assert int(jobs[1][b"deadline"]) > 0
    assert (jobs[0].get(b"traceparent"), jobs[1][b"traceparent"]) == (None, trace.encode())


@pytest.mark.parametrize(
    ("relay", "headers"),
    [
        ({"nope": 1}, {}),
        ({"queue": 1}, {}),
        ({"timeout": "soon"}, {}),
        ({"timeout": -1}, {}),
        ("text", {}),
        ({}, {"Relay-Timeout": "soon"}),
        ({}, {"Relay-Retention": "1.5"}),
        ({}, {"Relay-Queue": "no such name!"}),
    ],
)
async def test_bad_options_are_refused_and_nothing_is_queued(
    gateway: Served, http: httpx.AsyncClient, redis: Redis, relay: object, headers: dict[str, str]
) -> None:
    response = await http.post(f"{gateway.url}/requests", json=BODY | {"relay": relay}, headers=headers)
    assert response.status_code == 400
    error_of(response)
    assert not await redis.keys("chat:jobs*")
    assert (await http.get(f"{gateway.url}/requests")).json()["requests"] == []


WRONG_TYPES: list[dict[str, object]] = [
    {"messages": "Hi"},
    {"messages": [1]},
    {"messages": []},
    {"messages": None},
    {"model": 5},
    {"stream": "yes"},
    {"n": "2"},
]


@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=str)
async def test_a_body_of_wrong_types_is_refused_and_nothing_is_queued(
    gateway: Served, http: httpx.AsyncClient, redis: Redis, wrong: dict[str, object]
) -> None:
    response = await http.post(f"{gateway.url}/requests", json=BODY | wrong)
    assert response.status_code == 400
    error_of(response)
    assert not await redis.keys("chat:jobs*")
    assert not await redis.keys("chat:tokens*")


async def test_an_idempotency_key_has_255_characters_at_most(gateway: Served, http: httpx.AsyncClient) -> None:
    response = await http.post(f"{gateway.url}/requests", json=BODY, headers={"Idempotency-Key": "k" * 256})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_the_same_idempotency_key_is_one_job(gateway: Served, http: httpx.AsyncClient, redis: Redis) -> None:
    headers = {"Idempotency-Key": "k"}
    first, second = [await http.post(f"{gateway.url}/requests", json=BODY, headers=headers) for _ in range(2)]
    assert first.json()["id"] == second.json()["id"]
    other = await http.post(f"{gateway.url}/requests", json=BODY | {"model": "other"}, headers=headers)
    assert other.status_code == 422
    assert await redis.xlen("chat:jobs") == 1


async def test_a_foreign_id_is_answered_as_an_unknown_one_on_every_route(
    start_gateway: StartGateway, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway(keys=KEYS)
    started = await http.post(f"{gateway.url}/requests", json=BODY, headers=bearer(KEY_A))
    theirs, unknown = started.json()["id"], new_id("b-tenant")
    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/events")]:
        answers = [
            await http.request(method, f"{gateway.url}/requests/{request_id}{path}", headers=bearer(KEY_B))
            for request_id in (theirs, unknown)
        ]
        assert [answer.status_code for answer in answers] == [404, 404]
        assert answers[0].content == answers[1].content
    many = [await http.get(f"{gateway.url}/events?ids={found}", headers=bearer(KEY_B)) for found in (theirs, unknown)]
    assert [answer.status_code for answer in many] == [404, 404]
    assert many[0].content == many[1].content
    assert (await http.get(f"{gateway.url}/requests", headers=bearer(KEY_B))).json()["requests"] == []
    assert (await http.get(f"{gateway.url}/requests/{theirs}", headers=bearer(KEY_ALL))).status_code == 200


async def test_a_read_token_reads_its_request_and_cannot_cancel_it(
    start_gateway: StartGateway, http: httpx.AsyncClient, client: Client
) -> None:
    gateway = await start_gateway(keys=KEYS)
    first, second = [
        (await http.post(f"{gateway.url}/requests", json=BODY, headers=bearer(KEY_A))).json() for _ in range(2)
    ]
    token = first["token"]
    assert (await http.get(f"{gateway.url}/requests/{first['id']}?token={token}")).status_code == 200
    assert (await http.get(f"{gateway.url}/requests/{second['id']}?token={token}")).status_code == 401
    assert (await http.delete(f"{gateway.url}/requests/{first['id']}?token={token}")).status_code == 401
    assert (await http.get(f"{gateway.url}/requests/{first['id']}")).status_code == 401
    reader = await EventReader.open(gateway.port, first["urls"]["events"])
    await client.cancel(first["id"])
    assert (await reader.entries())[-1]["type"] == "cancelled"


STARTS = ["", "-1", "0", "0-0"]
BAD = [
    "abc",
    "1-",
    "-",
    "1",
    "1-1-1",
    "99999999999999999999-1",
    "1-1%00",
    "%D9%A1-%D9%A1",
    "01-1",
    "1-01",
    " 1-1",
    "1-1,1-2",
]


@pytest.mark.parametrize("cursor", STARTS)
async def test_what_clients_send_for_the_start_is_the_start(gateway: Served, log: WrittenLog, cursor: str) -> None:
    await log.write(START, delta(1, 1), END)
    for path, headers in [(f"?after={cursor}", {}), ("?after=1-1", {"Last_Event_ID": cursor})]:
        reader = await EventReader.open(gateway.port, f"/requests/{log.id}/events{path}", **headers)
        assert len(await reader.entries()) == 3


@pytest.mark.parametrize("cursor", BAD)
async def test_a_bad_cursor_is_refused(gateway: Served, http: httpx.AsyncClient, log: WrittenLog, cursor: str) -> None:
    await log.write(START, delta(1, 1))
    url = f"{gateway.url}/requests/{log.id}/events?after={cursor}"
    refused = await http.get(url)
    assert refused.status_code == 400
    assert error_of(refused)["code"] == "invalid_cursor"
    in_band = await http.get(url, headers=EVENT_SOURCE)
    assert in_band.status_code == 200
    assert in_band.headers["content-type"].startswith("text/event-stream")
    assert in_band.text.startswith(f"event: problem\nid: {SEAL}\ndata: ")
    many = await http.get(f"{gateway.url}/events?ids={log.id}&after={log.id}:{cursor}")
    assert many.status_code == 400


async def test_a_cursor_that_a_running_log_never_had_is_refused(
    gateway: Served, http: httpx.AsyncClient, log: WrittenLog
) -> None:
    await log.write(START, delta(1, 1))
    for path in (f"/requests/{log.id}/events?after=3-0", f"/events?ids={log.id}&after={log.id}:3-0"):
        refused = await http.get(gateway.url + path)
        assert refused.status_code == 400
        assert error_of(refused)["code"] == "invalid_cursor"
        in_band = await http.get(gateway.url + path, headers=EVENT_SOURCE)
        assert in_band.text.startswith("event: problem\n")
        again = await http.get(gateway.url + path, headers=EVENT_SOURCE | {"Last-Event-ID": str(SEAL)})
        assert again.status_code == 204
    async with connect(f"ws://127.0.0.1:{gateway.port}/requests/{log.id}/ws?after=3-0", proxy=None) as websocket:
        with pytest.raises(ConnectionClosed) as closed:
            await websocket.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4400


@pytest.mark.parametrize("cursor", ["1-7", "2-0"])
async def test_a_cursor_that_a_failover_has_lost_goes_on_after_the_repair(
    gateway: Served, log: WrittenLog, cursor: str
) -> None:
    """The last entries, and the attempt that has begun in them, may be missing on the new master."""
    await log.write(START, delta(1, 1))
    paths = (f"/requests/{log.id}/events?after={cursor}", f"/events?ids={log.id}&after={log.id}:{cursor}")
    readers = [await EventReader.open(gateway.port, path) for path in paths]
    await log.append(Restarted(id=EntryId(3, 0)))
    for reader in readers:
        async for _, _, data in reader.events():
            assert '"type":"restarted"' in data
            break
        reader.close()


async def test_after_the_end_an_event_source_is_told_to_stay_away(
    gateway: Served, http: httpx.AsyncClient, log: WrittenLog
) -> None:
    await log.write(START, delta(1, 1), END)
    reader = await EventReader.open(gateway.port, f"/requests/{log.id}/events")
    last = [event_id async for event_id, _, _ in reader.events()][-1]
    headers = EVENT_SOURCE | {"Last-Event-ID": last}
    assert (await http.get(f"{gateway.url}/requests/{log.id}/events", headers=headers)).status_code == 204


async def test_a_log_that_is_gone_is_reported_in_the_stream(
    gateway: Served, http: httpx.AsyncClient, redis: Redis
) -> None:
    await redis.set("chat:ended:{r}", b'{"outcome":"done","time":1}', ex=60)
    url = f"{gateway.url}/requests/r/events"
    refused = await http.get(url)
    assert refused.status_code == 410
    gone = await http.get(url, headers=EVENT_SOURCE)
    assert gone.text.startswith(f"event: gone\nid: {SEAL}\ndata: ")
    state = (await http.get(f"{gateway.url}/requests/r")).json()
    assert state == {"id": "r", "state": "expired", "outcome": "done", "ended_at": 1}
    assert (await http.get(f"{gateway.url}/requests/unknown/events", headers=EVENT_SOURCE)).status_code == 404


async def test_head_ends_at_once_and_the_connection_goes_on(
    gateway: Served, http: httpx.AsyncClient, log: WrittenLog
) -> None:
    await log.write(START)
    for path in (f"/requests/{log.id}/events", f"/events?ids={log.id}", "/events"):
        head = await http.head(gateway.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"].startswith("text/event-stream")
        assert (await http.get(f"{gateway.url}/healthz")).status_code == 200


async def test_many_requests_are_followed_over_one_connection(
    gateway: Served, http: httpx.AsyncClient, redis: Redis
) -> None:
    logs = [WrittenLog(redis, name) for name in ("one", "two", "three")]
    for log in logs:
        await log.write(START, delta(1, 1))
    await logs[2].write(END)
    path = "/events?ids=one,two,three"
    reader = await EventReader.open(gateway.port, path)
    events = reader.events()
    got: dict[str, list[Object]] = {log.id: [] for log in logs}
    cursor = ""

    async def read_until(*names: str) -> None:
        nonlocal cursor
        async for event_id, _, data in events:
            cursor = event_id
            for part in entries_of(data):
                got[str(part["request"])] += cast("list[Object]", part["entries"])
            if all(len(got[log.id]) == len(log.written) for log in logs if log.id in names):
                return

    await read_until("one", "two", "three")
    await logs[0].append(delta(1, 2))
    await read_until("one")
    reader.close()
    for log in logs[:2]:
        await log.append(delta(1, 2 + (log is logs[0])), END)
    reader = await EventReader.open(gateway.port, path, Last_Event_ID=cursor)
    events = reader.events()
    await read_until("nothing")
    async for event_id, _, data in events:
        cursor = event_id
        for part in entries_of(data):
            got[str(part["request"])] += cast("list[Object]", part["entries"])
    for log in logs:
        assert got[log.id] == [as_json(entry.as_dict()) for entry in log.written]
    assert (await http.get(gateway.url + path, headers={"Last-Event-ID": cursor})).status_code == 204


async def test_all_running_requests_are_followed_over_one_connection(
    gateway: Served, http: httpx.AsyncClient, client: Client
) -> None:
    first = (await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"]
    reader = await EventReader.open(gateway.port, "/events")
    events = reader.events()
    assert first in (await anext(events))[2]
    second = (await http.post(f"{gateway.url}/requests", json=BODY)).json()["id"]
    assert second in (await anext(events))[2]
    for request_id in (first, second):
        await client.cancel(request_id)
        assert "cancelled" in (await anext(events))[2]
    reader.close()


async def test_a_cursor_names_no_request_that_is_not_followed(gateway: Served, http: httpx.AsyncClient) -> None:
    """Requests that ended while the reader was away stay in no cursor, which every event has."""
    for _ in range(12):
        await http.post(f"{gateway.url}/requests", json=BODY)
    cursor = ",".join(f"{number:012x}:1-5" for number in range(200))
    reader = await EventReader.open(gateway.port, "/events", Last_Event_ID=cursor)
    events = reader.events()
    for number in range(1, 13):
        cursor, _, _ = await anext(events)
        assert len(cursor.split(",")) == number
    reader.close()


@pytest.mark.parametrize("path", ["/events?ids=", "/events?ids=" + ",".join(map(str, range(65)))])
async def test_a_bad_list_of_requests_is_refused(gateway: Served, http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(gateway.url + path)
    assert response.status_code == 400
    assert error_of(response)["param"] == "ids"


async def test_readers_of_a_job_that_never_answers_get_its_end(gateway: Served, redis: Redis) -> None:
    """The end comes by the feed, or at the next look at the log: the reader does not wait for its client's patience."""
    ends = [
        Failed(id=SEAL, attempt=1, code="upstream_error", message="no"),
        Failed(id=SEAL, code="buried", message="no"),
        Cancelled(id=SEAL),
        Failed(id=SEAL, code="deadline", message="late"),
    ]
    for number, end in enumerate(ends):
        log = WrittenLog(redis, f"job-{number}")
        await log.write(Started(id=EntryId(1, 0)))
        reader = await EventReader.open(gateway.port, f"/requests/{log.id}/events")
        events = reader.events()
        await anext(events)
        await log.write(end)
        await log.publish(end)
        assert entries_of((await anext(events))[2])[-1]["type"] == end.type
        assert [event async for event in events] == []
        assert reader.is_whole


@pytest.mark.parametrize(("path", "methods"), [("/requests", "GET, HEAD, POST"), ("/requests/r", "DELETE, GET, HEAD")])
async def test_a_wrong_method_is_told_all_methods_of_its_path(
    gateway: Served, http: httpx.AsyncClient, path: str, methods: str
) -> None:
    response = await http.put(gateway.url + path)
    assert (response.status_code, response.headers["Allow"]) == (405, methods)

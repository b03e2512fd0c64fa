"""Readers that lose their connection at any entry and go on at another replica: the pieces join to the whole."""

from collections.abc import AsyncGenerator, Callable
from typing import TypeAlias

import pytest
from example_logs import LOGS
from gateway_fixtures import Served, StartGateway
from proxy import Proxy
from redis.asyncio import Redis
from serving import EventReader, as_json, entries_of
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from written_log import END, START, WrittenLog, delta

from worker.contract.entries import AnyEntry, Object, Unknown

STORED = {name: log for name, log in LOGS.items() if not any(isinstance(entry, Unknown) for entry in log)}
"""The logs of types that this version can write."""
EVERY_LOG = pytest.mark.parametrize("entries", STORED.values(), ids=STORED)


@pytest.fixture
async def replicas(start_gateway: StartGateway) -> list[Served]:
    return [await start_gateway() for _ in range(2)]


Read: TypeAlias = Callable[[Served, str, str], AsyncGenerator[Object]]
"""Reads the entries of a request after one, until its end."""


async def read_events(replica: Served, request_id: str, after: str) -> AsyncGenerator[Object]:
    reader = await EventReader.open(replica.port, f"/requests/{request_id}/events", Last_Event_ID=after)
    assert reader.status == 200
    try:
        async for event_id, name, data in reader.events():
            entries = entries_of(data)
            assert (name, event_id) == ("", entries[-1]["id"])
            for entry in entries:
                yield entry
        assert reader.is_whole
    finally:
        reader.close()


async def read_messages(replica: Served, request_id: str, after: str) -> AsyncGenerator[Object]:
    url = f"ws://127.0.0.1:{replica.port}/requests/{request_id}/ws?after={after}"
    async with connect(url, proxy=None, compression=None) as socket:
        with pytest.raises(ConnectionClosed) as closed:  # noqa: PT012 - the entries end with the connection
            while True:
                for entry in entries_of(await socket.recv()):
                    yield entry
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1000


BOTH = pytest.mark.parametrize("read", [read_events, read_messages], ids=["events", "websocket"])


@BOTH
@EVERY_LOG
async def test_a_reader_that_comes_back_after_any_entry_gets_the_rest(
    replicas: list[Served], log: WrittenLog, entries: list[AnyEntry], read: Read
) -> None:
    await log.write(*entries)
    whole = [as_json(entry.as_dict()) for entry in entries]
    for number, entry in enumerate(entries):
        after = str(entries[number - 1].id) if number else ""
        rest = [found async for found in read(replicas[number % 2], log.id, after)]
        assert rest == whole[number:], f"from {entry.id}"


@BOTH
@EVERY_LOG
async def test_a_live_reader_that_is_cut_after_every_entry_gets_each_once(
    replicas: list[Served], redis: Redis, entries: list[AnyEntry], read: Read
) -> None:
    log = WrittenLog(redis, "live")
    got: list[object] = []
    after = ""
    for number, entry in enumerate(entries):
        await log.append(entry)
        rest = read(replicas[number % 2], log.id, after)
        found = await anext(rest)
        got.append(found)
        after = str(found["id"])
        await rest.aclose()
    assert got == [as_json(entry.as_dict()) for entry in entries]


@pytest.mark.parametrize("path", ["/requests/r/events", "/events?ids=r"])
async def test_an_outage_longer_than_the_patience_ends_no_event_source_for_ever(
    redis_proxy: Proxy, start_gateway: StartGateway, log: WrittenLog, path: str
) -> None:
    """The stream ends without an id, so its reader comes back to the place where it is."""
    await log.write(START, delta(1, 1))
    impatient, patient = [await start_gateway(redis_url=redis_proxy.redis_url, patience=each) for each in (1, 60)]
    reader = await EventReader.open(impatient.port, path)
    events = reader.events()
    cursor, _, _ = await anext(events)
    redis_proxy.refuse()
    await redis_proxy.cut()
    assert [(event_id, name) async for event_id, name, _ in events] == [("", "busy")]
    assert reader.is_whole
    await redis_proxy.heal()
    await log.append(delta(1, 2), END)
    again = await EventReader.open(patient.port, path, Last_Event_ID=cursor)
    assert again.status == 200
    text = (await again.body()).decode()
    assert '"id":"1-2"' in text
    assert '"type":"done"' in text
    assert '"id":"1-1"' not in text

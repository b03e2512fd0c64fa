"""A slow reader of many requests over one connection gets every entry once."""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import cast

from gateway_fixtures import Served
from redis.asyncio import Redis
from serving import EventReader, entries_of
from written_log import END, START, WrittenLog, delta

from worker import Delta
from worker.contract.entries import Object
from worker.contract.ids import EntryId

_PIECES = 200
_PIECE = "x" * 100_000
"""All pieces together are more than the buffers of a connection take."""

Got = defaultdict[str, list[object]]


async def collect(events: AsyncIterator[tuple[str, str, str]], got: Got, until: Callable[[], bool]) -> None:
    """Collect the ids of the entries of each request."""
    while not until() and (event := await anext(events, None)) is not None:
        for part in entries_of(event[2]):
            got[str(part["request"])] += [entry["id"] for entry in cast("list[Object]", part["entries"])]


async def test_a_reader_that_pauses_gets_every_entry_of_every_request_once(gateway: Served, redis: Redis) -> None:
    """The connection waits for its client because of one request, while the others have nothing to write."""
    quiet, loud = [WrittenLog(redis, name) for name in ("quiet", "loud")]
    for log in (quiet, loud):
        await log.write(START)
    events = (await EventReader.open(gateway.port, "/events?ids=quiet,loud")).events()
    got: Got = defaultdict(list)
    await collect(events, got, lambda: len(got) == 2)
    for n in range(1, 4):
        await quiet.append(delta(1, n))
        await collect(events, got, lambda n=n: len(got["quiet"]) > n)  # type: ignore[misc]
    for n in range(1, _PIECES):  # nobody reads meanwhile
        await loud.append(Delta(id=EntryId(1, n), content=_PIECE))
    for log in (quiet, loud):
        await log.append(END)
    await collect(events, got, lambda: False)
    assert got == {log.id: [str(entry.id) for entry in log.written] for log in (quiet, loud)}

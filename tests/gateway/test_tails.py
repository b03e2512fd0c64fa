"""Readers of logs in one process: their shared tails, and what a reader does that does not keep up."""

import asyncio
import random
from collections.abc import AsyncIterator

import msgspec
import pytest
from proxy import Proxy
from redis.asyncio import Redis
from serving import Events, as_json
from waits import eventually
from written_log import END, START, WrittenLog, delta

from worker import Client
from worker.client.errors import Expired, IncompleteLog, InvalidArgument
from worker.contract.entries import Delta, Restarted
from worker.contract.ids import BEFORE_ALL, EntryId
from worker.gateway.delivery_meter import DeliveryMeter
from worker.gateway.log_cursor import LogCursor
from worker.gateway.protocols.chat_chunks import ChatChunks
from worker.gateway.protocols.native import NativeEvents, NativeMessages
from worker.gateway.protocols.protocol import Frame, StreamProtocol
from worker.gateway.tails import WINDOW_BYTES, Tails
from worker.telemetry.stream_events import EntriesDelivered


class Collector:
    """Owns a cursor, and keeps what it writes. While `is_blocked`, its client does not read."""

    def __init__(
        self, tails: Tails, log: WrittenLog, protocol: StreamProtocol, position: EntryId = BEFORE_ALL, skip: int = 0
    ) -> None:
        self.written: list[bytes] = []
        self.is_blocked = False
        self.held = 0
        self._changed = asyncio.Event()
        self.cursor = LogCursor(tails, log.id, protocol, self, self._write, position=position, skip=skip)
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        try:
            while not self.cursor.is_over:
                if self.cursor.is_behind:
                    await self.cursor.catch_up()
                else:
                    await self._wait()
            if self.cursor.error is not None:
                raise self.cursor.error
        finally:
            self.cursor.leave()

    def _write(self, frame: Frame) -> bool:
        assert not self.held, "a frame was written while one was held"
        self.written.append(frame.data)
        self.held = int(self.is_blocked)
        return not self.held

    def read_again(self) -> None:
        """The client reads what was sent, and goes on."""
        self.is_blocked, self.held = False, 0
        self.cursor.on_writable()
        self.wake()

    async def wait_writable(self) -> None:
        while self.held:
            await self._wait()

    def wake(self) -> None:
        self._changed.set()

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    @property
    def entries(self) -> list[object]:
        return [entry for data in self.written for entry in msgspec.json.decode(data)]

    async def has(self, count: int) -> None:
        async def enough() -> bool:
            if self.task.done():
                self.task.result()
            return len(self.entries) >= count

        await eventually(enough)


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
async def tails(client: Client, events: Events) -> AsyncIterator[Tails]:
    tails = Tails(client, DeliveryMeter(events))
    yield tails
    await tails.aclose()


def as_dicts(log: WrittenLog) -> list[object]:
    return [as_json(entry.as_dict()) for entry in log.written]


def big(n: int) -> Delta:
    return Delta(id=EntryId(1, n), content=f"{n} " + "x" * 10_000)


async def test_a_reader_that_lacks_nothing_gets_nothing_when_its_connection_takes_more(
    tails: Tails, log: WrittenLog
) -> None:
    """The connection had to wait because of a heartbeat."""
    await log.write(START)
    reader = Collector(tails, log, NativeMessages())
    await reader.has(1)
    for n in range(1, 4):
        await log.append(delta(1, n))
        await reader.has(1 + n)
    reader.read_again()
    await log.append(END)
    await reader.task
    assert reader.entries == as_dicts(log)


async def test_readers_of_one_request_share_its_tail(tails: Tails, log: WrittenLog, events: Events) -> None:
    await log.write(START, delta(1, 1))
    readers = [Collector(tails, log, NativeMessages()) for _ in range(5)]
    for reader in readers:
        await reader.has(2)
    await eventually(lambda: _subscribers(log, 1))
    tail = tails.find(log.id, NativeMessages())
    assert tail is not None
    assert tail is tails.find(log.id, NativeMessages())
    assert tails.find(log.id, NativeEvents()) is None
    await log.append(delta(1, 2), delta(1, 3), END)
    await asyncio.gather(*(reader.task for reader in readers))
    assert all(reader.entries == as_dicts(log) for reader in readers)
    assert tails.find(log.id, NativeMessages()) is None
    tails.meter.report()
    (delivered,) = (event for event in events.seen if isinstance(event, EntriesDelivered))
    assert delivered.entries == 5 * len(log.written)


async def _subscribers(log: WrittenLog, count: int) -> bool:
    return await log.subscribers() == count


async def test_a_tail_ends_with_its_last_reader(tails: Tails, log: WrittenLog) -> None:
    await log.write(START)
    reader = Collector(tails, log, NativeMessages())
    await reader.has(1)
    await eventually(lambda: _subscribers(log, 1))
    reader.task.cancel()
    await eventually(lambda: _subscribers(log, 0))
    assert tails.find(log.id, NativeMessages()) is None


async def test_a_reader_that_does_not_read_goes_on_within_the_window(tails: Tails, log: WrittenLog) -> None:
    await log.write(START)
    slow, other = Collector(tails, log, NativeMessages()), Collector(tails, log, NativeMessages())
    await slow.has(1)
    await other.has(1)
    slow.is_blocked = True
    await log.append(*(delta(1, n) for n in range(1, 20)))
    await other.has(20)
    assert len(slow.entries) == 2
    slow.read_again()
    assert slow.entries == other.entries
    await log.append(delta(1, 20), END)
    await asyncio.gather(slow.task, other.task)
    assert slow.entries == other.entries == as_dicts(log)


class DirectCollector(Collector):
    """A collector whose client is written to directly, in chunks."""

    def __init__(self, tails: Tails, log: WrittenLog) -> None:
        super().__init__(tails, log, NativeMessages())
        self.is_closed = False
        self.cursor.direct = self._write_chunk

    def _write_chunk(self, chunk: bytes) -> None:
        if self.is_closed:
            raise RuntimeError("the handler is closed")
        size, _, rest = chunk.partition(b"\r\n")
        if not self._write(Frame(self.cursor.position, rest[: int(size, 16)])):
            self.cursor.on_blocked()


async def test_readers_that_are_written_to_directly_get_the_same(tails: Tails, log: WrittenLog) -> None:
    await log.write(START)
    readers = [DirectCollector(tails, log), Collector(tails, log, NativeMessages()), DirectCollector(tails, log)]
    for reader in readers:
        await joined(reader)
    await log.append(*(delta(1, n) for n in range(1, 20)), END)
    await asyncio.gather(*(reader.task for reader in readers))
    assert all(reader.entries == as_dicts(log) for reader in readers)


async def test_a_direct_reader_that_does_not_read_gets_nothing_more_and_goes_on(tails: Tails, log: WrittenLog) -> None:
    await log.write(START)
    slow, other = DirectCollector(tails, log), DirectCollector(tails, log)
    await joined(slow)
    await joined(other)
    slow.is_blocked = True
    await log.append(*(delta(1, n) for n in range(1, 20)))
    await other.has(20)
    assert len(slow.entries) == 2
    slow.read_again()
    assert slow.entries == other.entries
    await log.append(delta(1, 20), END)
    await asyncio.gather(slow.task, other.task)
    assert slow.entries == other.entries == as_dicts(log)


async def test_a_closed_connection_keeps_no_entry_from_the_others(tails: Tails, log: WrittenLog) -> None:
    await log.write(START)
    closed, *others = readers = [DirectCollector(tails, log) for _ in range(3)]
    for reader in readers:
        await joined(reader)
    closed.is_closed = True
    await log.append(delta(1, 1), END)
    await asyncio.gather(*(reader.task for reader in others))
    assert all(reader.entries == as_dicts(log) for reader in others)
    assert len(closed.entries) == 1


async def test_a_reader_that_begins_to_be_written_to_directly_gets_each_entry_once(
    tails: Tails, log: WrittenLog
) -> None:
    """A chat completion does so with its first entry, in the step in which the tail writes this entry."""
    await log.write(START)
    reader = DirectCollector(tails, log)
    reader.cursor.direct = None
    plain = reader.cursor.write

    def write_first(frame: Frame) -> bool:
        if frame.last == EntryId(1, 1):
            reader.cursor.write_by(plain, reader._write_chunk)
        return plain(frame)

    reader.cursor.write = write_first
    await joined(reader)
    await log.append(*(delta(1, n) for n in range(1, 10)), END)
    await reader.task
    assert reader.entries == as_dicts(log)


async def test_a_reader_that_falls_out_of_the_window_reads_the_log_again(tails: Tails, log: WrittenLog) -> None:
    await log.write(START)
    slow, other = Collector(tails, log, NativeMessages()), Collector(tails, log, NativeMessages())
    await slow.has(1)
    await other.has(1)
    slow.is_blocked = True
    count = 2 * WINDOW_BYTES // 10_000
    await log.append(*(big(n) for n in range(1, count)))
    await other.has(count)
    tail = tails.find(log.id, NativeMessages())
    assert tail is not None
    assert tail.end - tail.first < count
    slow.read_again()
    await slow.has(count)
    slow.is_blocked = True
    await log.append(*(big(n) for n in range(count, 2 * count)), END)
    await other.task
    slow.read_again()
    await slow.task
    assert slow.entries == other.entries == as_dicts(log)


async def test_a_chat_reader_that_falls_out_of_the_window_gets_each_chunk_once(tails: Tails, log: WrittenLog) -> None:
    await log.write(START)
    slow, other = Collector(tails, log, ChatChunks()), Collector(tails, log, ChatChunks())
    await eventually(lambda: _subscribers(log, 1))
    slow.is_blocked = True
    await log.append(*(big(n) for n in range(1, 2 * WINDOW_BYTES // 10_000)), END)
    await other.task
    slow.read_again()
    await slow.task
    assert b"".join(slow.written) == b"".join(other.written)
    late = Collector(tails, log, ChatChunks(), skip=7)
    await late.task
    assert b"".join(late.written) == b"".join(other.written).split(b"\n\n", 7)[7]


async def test_a_chat_reader_cannot_have_more_than_the_answer_has(tails: Tails, log: WrittenLog) -> None:
    await log.write(START, delta(1, 1))
    with pytest.raises(InvalidArgument):
        await Collector(tails, log, ChatChunks(), skip=100).task


async def test_a_log_that_disappears_ends_its_readers(tails: Tails, log: WrittenLog, redis: Redis) -> None:
    await log.write(START)
    reader = Collector(tails, log, NativeMessages())
    await reader.has(1)
    await redis.set(f"chat:ended:{{{log.id}}}", b'{"outcome":"done","time":1}', ex=60)
    await redis.delete(log.key)
    with pytest.raises(Expired):
        await reader.task


async def joined(reader: Collector) -> None:
    """Wait until a reader has joined a tail, and so reads the log no more."""

    async def is_joined() -> bool:
        return not reader.cursor.is_behind

    await eventually(is_joined)


async def test_a_reader_with_a_cursor_that_the_log_never_had_disturbs_nobody(tails: Tails, log: WrittenLog) -> None:
    """Whether it comes first and starts a tail, or joins one, it learns at the end that its entry is missing."""
    await log.write(START, delta(1, 1))
    strange = [Collector(tails, log, NativeMessages(), position=EntryId(9, 0))]
    await joined(strange[0])
    readers = [Collector(tails, log, NativeMessages()) for _ in range(2)]
    for reader in readers:
        await joined(reader)
    strange.append(Collector(tails, log, NativeMessages(), position=EntryId(1, 50)))
    await joined(strange[1])
    await log.append(delta(1, 2), END)
    for reader in readers:
        await reader.task
        assert reader.entries == as_dicts(log)
    for reader in strange:
        with pytest.raises(IncompleteLog):
            await reader.task
        assert reader.entries == []


async def test_readers_go_on_after_a_failover_has_lost_the_end_of_the_log(
    tails: Tails, log: WrittenLog, redis: Redis
) -> None:
    """The tail begins after the log's new end: a reader that comes now finds no place in it."""
    await log.write(START, *(delta(1, n) for n in range(1, 6)))
    early = Collector(tails, log, NativeMessages())
    await early.has(6)
    await joined(early)
    await eventually(lambda: _subscribers(log, 1))  # the tail has found the log
    await redis.delete(log.key)
    kept = WrittenLog(redis, log.id)
    await kept.write(START, delta(1, 1), delta(1, 2))
    late = Collector(tails, log, NativeMessages())
    ahead = Collector(tails, log, NativeMessages(), position=EntryId(1, 4))
    for reader in (late, ahead):
        await joined(reader)
    await kept.append(Restarted(id=EntryId(2, 0)), delta(2, 1), END)
    await asyncio.gather(early.task, late.task, ahead.task)
    assert late.entries == as_dicts(kept)
    assert early.entries == as_dicts(log) + as_dicts(kept)[3:]
    assert ahead.entries == as_dicts(kept)[3:]
    await tails.aclose()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("tail of")]


async def join_at_random(
    tails: Tails, logs: list[WrittenLog], chosen: random.Random, count: int
) -> list[tuple[WrittenLog, EntryId, Collector]]:
    """Start readers of the logs, from their start, from their end, or from an entry between."""
    readers = []
    for number in range(count):
        log = chosen.choice(logs)
        after = chosen.choice([BEFORE_ALL, log.written[-1].id, chosen.choice(log.written).id])
        readers.append((log, after, Collector(tails, log, NativeMessages(), position=after)))
        if number % 3 == 0:
            await asyncio.sleep(0.002 if number % 10 == 0 else 0)
    return readers


async def test_readers_that_join_at_any_moment_get_every_entry_once(redis_proxy: Proxy, redis: Redis) -> None:
    """A thousand joins while entries come, and while every answer of Redis is late."""
    logs = [WrittenLog(redis, f"r{number}") for number in range(5)]
    for log in logs:
        await log.write(START)
    async with Client(redis_proxy.redis_url) as client:
        tails = Tails(client, DeliveryMeter(Events()))
        redis_proxy.down = 0.005
        chosen = random.Random(1)  # noqa: S311 - the same joins in every run
        joining = asyncio.create_task(join_at_random(tails, logs, chosen, 1000))
        for n in range(1, 40):
            for log in logs:
                await log.append(delta(1, n))
        readers = await joining
        for log in logs:
            await log.append(END)
        await asyncio.gather(*(reader.task for _, _, reader in readers))
        for log, after, reader in readers:
            assert reader.entries == [as_json(entry.as_dict()) for entry in log.written if entry.id > after]
        await tails.aclose()

"""The publisher: one for the process, it writes what all logs have appended, a MULTI at a time.

One flush is on its way at a time, and whatever is appended meanwhile goes with the next: so a stream never has two
unanswered batches, and the busier the worker, the larger its batches. A flush is one MULTI, in a cluster one for each
slot: Redis takes all of it or nothing, so that a refusal leaves no hole. The connection is the publisher's own (in a
cluster one to each master). After a loss every log's end is read before anything is written on a new one, since a
failover may have dropped what had been acknowledged.
"""

import asyncio
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError

from worker.broker.connection import Backoff, command_client, is_transient
from worker.broker.log import LogDiverged, LogGone, LogRefused, Pending, TokenLog
from worker.broker.wire import Wires, bulk, pack
from worker.contract.entries import Fields
from worker.contract.ids import EntryId
from worker.telemetry.metrics import Metrics

_log = structlog.get_logger()

_Batch: TypeAlias = list[tuple[TokenLog, list[Pending]]]

_MAX_ENTRIES_OF_A_LOG = 256
_MAX_ENTRIES = 2048
_HIGH_WATER_BYTES = 1024 * 1024
"""Of all logs together: else, where more comes than can be done, reading would leave no time for writing."""
_BUSY = 10_000
"""Entries a second from which on flushes wait for more: each costs as much as ten entries."""
_LINGER = 0.001
"""Seconds; it takes a quarter off the worker's CPU and half off Redis's."""
_FEED_WAITS = 0.001
"""Seconds; a MULTI for the feed alone costs as much as one for entries."""
_PUBLISH = b"*3\r\n" + bulk(b"PUBLISH")
_OF_THE_FEED = re.compile("'publish'|channel")
"""In what Redis 6.2 and 7 say to a user who may not publish."""
_encode = msgspec.json.encode


class Publisher:
    """Writes the entries of every log that this process owns, and tells the feed of what was accepted."""

    def __init__(self, url: str, metrics: Metrics | None = None) -> None:
        self._redis: Redis = command_client(url, connections=1)
        self._wires = Wires(self._redis)
        self._metrics = metrics or Metrics()
        self.is_full = False
        self._pending = 0
        self._logs: set[TokenLog] = set()
        self._by_request: dict[str, TokenLog] = {}
        self._dirty: dict[TokenLog, None] = {}
        self._feed: dict[str, list[tuple[str, Fields]]] = {}
        self._look = True  # before the first write, so that connecting has one place
        self._asked: set[TokenLog] = set()
        self._mute = False
        self._leaving = False
        self._work = asyncio.Event()
        self._backoff = Backoff("log_write_failed")
        self._flushed = 0.0
        self._written = 0
        self._is_busy = False

    def attach(self, log: TokenLog) -> None:
        """Watch over a log that this process has begun to own.

        It may have been cancelled since it was read, by a hint that came before this: so it is looked at once.
        """
        self._logs.add(log)
        self._by_request[log.request_id] = log
        self._ask(log)

    def detach(self, log: TokenLog) -> None:
        """The process is done with a log."""
        log.forget()
        self._logs.discard(log)
        self._dirty.pop(log, None)
        if self._by_request.get(log.request_id) is log:
            del self._by_request[log.request_id]

    def wake(self, log: TokenLog, size: int) -> None:
        """A log has an entry of so many bytes to write."""
        self._pending += size
        if self._pending >= _HIGH_WATER_BYTES:
            self.is_full = True
        if log not in self._dirty:
            self._dirty[log] = None
            self._work.set()

    def relieve(self, size: int) -> None:
        """So many bytes need not be written any more."""
        self._pending -= size
        if self.is_full and self._pending < _HIGH_WATER_BYTES // 2:
            self.is_full = False
            for log in self._logs:
                log.release()

    def announce(self, channel: str, entries: Iterable[tuple[str, Fields]]) -> None:
        """Tell the feed of entries that Redis has accepted, each with its id. It is only speed: it may be lost."""
        if not self._mute:
            if not self._feed:  # it goes with the next entries, or alone if there are none
                asyncio.get_running_loop().call_later(_FEED_WAITS, self._work.set)
            self._feed.setdefault(channel, []).extend(entries)

    def look(self) -> None:
        """Read every log's end soon: a log that was sealed or fenced while nothing was appended shows it there."""
        self._look = True
        self._work.set()

    def look_at(self, request_id: str) -> None:
        """Read the end of one request's log soon, if it is written here."""
        log = self._by_request.get(request_id)
        if log is not None:
            self._ask(log)

    def _ask(self, log: TokenLog) -> None:
        self._asked.add(log)
        self._work.set()

    async def run(self) -> None:
        """Write until `leave` is called and nothing is left to write.

        It is never cancelled: redis-py 8.1 was seen to swallow a cancellation while it connects.
        """
        while not self._leaving or self._work.is_set() or self._feed:
            await self._work.wait()
            if self._is_busy and not self._leaving:
                await asyncio.sleep(_LINGER)
            self._work.clear()
            try:
                if self._look or self._asked:
                    await self._look_at_logs()
                batch, feed = self._collect()
                self._is_busy = self._rate(batch) > _BUSY
                if batch or feed:
                    self._take_replies(batch, await self._write(batch, feed))
                    self._backoff.reset()  # not after a look: reading works while Redis has no room to write
            except (RedisError, OSError) as error:
                if self._leaving:
                    return
                await self._recover(error)
            if self._dirty or self._look or self._asked:
                self._work.set()

    def _rate(self, batch: _Batch) -> float:
        """Entries a second since the flush before this one."""
        now = asyncio.get_running_loop().time()
        since, self._flushed = now - self._flushed, now
        return sum(len(entries) for _, entries in batch) / max(since, 1e-6)

    def leave(self) -> None:
        """Come to an end: write what there is, then return from `run`."""
        self._leaving = True
        self._work.set()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._wires.close()
        await self._redis.aclose()

    def _collect(self) -> tuple[_Batch, dict[str, list[tuple[str, Fields]]]]:
        """The next flush. Logs that do not fit wait their turn at the end of the line."""
        batch: _Batch = []
        room = _MAX_ENTRIES
        for log in list(self._dirty):
            if room <= 0:
                break
            del self._dirty[log]
            entries = log.batch(min(room, _MAX_ENTRIES_OF_A_LOG))
            if entries:
                batch.append((log, entries))
                room -= len(entries)
        feed, self._feed = self._feed, {}
        return batch, feed

    async def _write(self, batch: _Batch, feed: dict[str, list[tuple[str, Fields]]]) -> list[Any]:
        commands = [(log.key, entry[3]) for log, entries in batch for entry in entries]
        commands += [(channel, _PUBLISH + bulk(channel.encode()) + bulk(_encode(it))) for channel, it in feed.items()]
        return await self._wires.execute(commands)

    def _take_replies(self, batch: _Batch, replies: list[Any]) -> None:
        begin = 0
        for log, entries in batch:
            end = begin + len(entries)
            good = begin
            while good < end and isinstance(replies[good], bytes):
                good += 1
            if good > begin:
                self._accept(log, log.take_accepted(entries[good - begin - 1][0]))
            if good < end:
                self._judge(log, replies[good:end])
            elif log.has_more:
                self._dirty[log] = None
            begin = end
        self._metrics.written.inc(self._written)
        self._written = 0

    def _judge(self, log: TokenLog, verdicts: list[object]) -> None:
        """Redis refused an entry, the first of these: find out what its id ran into."""
        text = str(verdicts[0])
        if verdicts[0] is None:
            log.lose(LogGone("the log is not there any more"))
        elif "equal or smaller" in text or "exhausted the last" in text:
            self.look()  # written already, fenced or sealed: the log's end tells which
        elif any(isinstance(verdict, bytes) for verdict in verdicts):
            log.lose(LogDiverged(f"Redis refused an entry and took a later one: {text}"))
        else:
            log.lose(LogRefused(text))

    def _accept(self, log: TokenLog, accepted: list[Pending]) -> None:
        if accepted:
            self._written += len(accepted)
            self.announce(log.feed, [entry[1:3] for entry in accepted])

    async def _look_at_logs(self) -> None:
        """Read the end of every log, or of those asked for, and judge by it. Nothing is in flight meanwhile."""
        if await self._wires.connect():
            self._look = True
        which = self._logs if self._look else self._asked & self._logs
        logs = [(log, log.attempt) for log in which if not log.lost.done()]
        self._look, self._asked = False, set()  # a look that is asked for meanwhile is one more
        replies = await self._wires.ask(
            [(log.key, pack(b"XREVRANGE", log.key.encode(), b"+", b"-", b"COUNT", b"1")) for log, _ in logs]
        )
        for (log, attempt), reply in zip(logs, replies, strict=True):
            if log.attempt == attempt:
                self._reconcile(log, reply)
            else:  # its owner began another meanwhile: the reply may be older than that
                self.look()

    def _reconcile(self, log: TokenLog, reply: object) -> None:
        if isinstance(reply, RedisError) and is_transient(reply):  # LOADING is a ConnectionError in redis-py
            raise reply
        if not isinstance(reply, list):
            log.lose(LogRefused(str(reply)))
            return
        self._accept(log, log.reconcile(EntryId.parse(reply[0][0]) if reply else None))
        if log.has_more:
            self._dirty[log] = None

    async def _recover(self, error: BaseException) -> None:
        """After a lost connection or a refusal: nobody knows what was written, so look before writing again."""
        self._metrics.write_failures.inc()
        if isinstance(error, NoPermissionError) and _OF_THE_FEED.search(str(error)):
            # It is in one MULTI with entries, and would hold them back for ever.
            self._mute = True
            _log.warning("feed_refused", error=str(error))
        await self._backoff.wait(error)
        await self._wires.close()
        self._look = True

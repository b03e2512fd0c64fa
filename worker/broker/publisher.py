"""The publisher: one for the process (in a cluster one for each master), it writes what all logs have appended.

One flush is on its way at a time, and whatever is appended meanwhile goes with the next: so a stream never has two
unanswered batches, and the busier the worker, the larger its batches. A flush is one MULTI, in a cluster one for each
slot: Redis takes all of it or nothing, so that a refusal leaves no hole. The connection is the publisher's own. After
a loss every log's end is read before anything is written on a new one, since a
failover may have dropped what had been acknowledged.

Flush follows flush without a task, for waking one costs more than a small flush; `run` connects, reads the ends of
logs, and mends what went wrong, while nothing is in flight. Where very much is written the whole process sleeps after
a flush, for less than a millisecond.
"""

import asyncio
import enum
import time
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..contract.entries import Fields
from ..contract.ids import EntryId
from ..redisio.errors import redacted_message
from ..redisio.pipelined import Command, NodeConnections, Outcome, PipelinedConnection, pack
from ..redisio.retry import Backoff
from ..telemetry.events import NO_TELEMETRY, EntriesAccepted, Telemetry, WriteFailed
from .feed import FeedBatch, FeedPublisher, note_listeners, trial
from .log_writer import AppendBatch, LogDiverged, LogGone, LogWriter, refusal_of, refused_in


class _Phase(enum.Enum):
    """What the publisher is at."""

    IDLE = enum.auto()
    DUE = enum.auto()
    """A flush is about to begin."""
    FLYING = enum.auto()
    """It waits for replies."""
    HELD = enum.auto()
    """`run` is at work."""


_MAX_ENTRIES = 2048
_HIGH_WATER_BYTES = 1024 * 1024
"""Of all logs together: else, where more comes than can be done, reading would leave no time for writing."""
_BUSY = 10_000
"""Entries a second, since the flush before, from which on the process reads and writes in a beat."""
_BEAT = 0.0007
"""Seconds. Waking for each token, where many come, costs a seventh more CPU than reading at once what has come."""


class Publisher:
    """Writes the entries of every log that this process owns, and tells the feed of what was accepted."""

    def __init__(
        self, redis: Redis, telemetry: Telemetry = NO_TELEMETRY, *, in_cluster: bool = False,
        connection_type: type[PipelinedConnection] = PipelinedConnection,
    ) -> None:  # fmt: skip
        """Write to the server of a client, which the publisher closes at its end."""
        self._redis = redis
        self._wires = NodeConnections(redis, by_slot=in_cluster, connection_type=connection_type)
        self._in_cluster = in_cluster
        self._telemetry = telemetry
        self.is_full = False
        self._bytes = 0
        self._logs: set[LogWriter] = set()
        self._by_request: dict[str, LogWriter] = {}
        self._out: list[AppendBatch] = []
        self._feed = FeedPublisher(self._tell, telemetry)
        self._phase = _Phase.IDLE
        self._look = True  # before the first write, so that connecting has one place
        self._asked: set[LogWriter] = set()
        self._refused: dict[LogWriter, int] = {}
        """Those that Redis says have an entry already, and its attempt: their ends must show it."""
        self._hinted: set[str] = set()
        self._trouble: Exception | None = None
        self._leaving = False
        self._work = asyncio.Event()
        self._backoff = Backoff("log_write_failed", telemetry)
        self._flushed = 0.0
        self._rested = 0.0

    def attach(self, log: LogWriter) -> None:
        """Watch over a log that this process has begun to own.

        It may have been cancelled since it was read, by a hint that came before this: then it is looked at now.
        """
        log.sink = self
        self._logs.add(log)
        self._by_request[log.request_id] = log
        if log.request_id in self._hinted:
            self._ask(log)

    @property
    def logs(self) -> list[LogWriter]:
        """All that it watches over."""
        return list(self._logs)

    def detach(self, log: LogWriter) -> None:
        """The process is done with a log."""
        log.discard_pending()
        self._leave_out(log)

    def _leave_out(self, log: LogWriter) -> None:
        self._logs.discard(log)
        self._refused.pop(log, None)
        if self._by_request.get(log.request_id) is log:
            del self._by_request[log.request_id]

    def adopt(self, log: LogWriter) -> None:
        """Go on with a log that another publisher has given up: its end is read before more is written."""
        self.attach(log)
        self._bytes += log.pending_bytes
        self._ask(log)

    def disown(self, log: LogWriter) -> None:
        """Be done with a log that another publisher goes on with."""
        self.dequeue(log)
        self.release_bytes(log.pending_bytes)
        self._feed.pending.pop(log, None)
        self._leave_out(log)

    def enqueue(self, run: AppendBatch) -> None:
        """Entries to write, after all others of their log."""
        self._out.append(run)
        self._bytes += len(run[3])
        if self._bytes >= _HIGH_WATER_BYTES:
            self.is_full = True
        if self._phase is _Phase.IDLE:
            self._schedule()

    def dequeue(self, log: LogWriter) -> None:
        """What it has taken of a log need not be written."""
        self._out = [run for run in self._out if run[0] is not log]

    def release_bytes(self, size: int) -> None:
        """So many bytes need not be written any more."""
        self._bytes -= size
        if self.is_full and self._bytes < _HIGH_WATER_BYTES // 2:
            self.is_full = False
            for log in self._logs:
                log.wake_waiters()

    def publish(self, channel: str, entries: Iterable[tuple[str, Fields]]) -> None:
        """Tell the feed of entries that Redis has accepted, each with its id. It is only speed: it may be lost."""
        self._feed.publish(channel, entries)

    def _tell(self) -> None:
        """There are news, and no entries with which they could go."""
        if self._phase is _Phase.IDLE:
            self._phase = _Phase.DUE
            self._go_on()

    def verify_all(self) -> None:
        """Read every log's end soon: a log that was sealed or fenced while nothing was appended shows it there."""
        self._look = True
        self._call()

    def verify_idle(self) -> None:
        """Read the ends of those logs soon to which Redis has accepted nothing since this was last called.

        Of the others it is known: what is written to a log that was sealed or fenced is refused.
        """
        for log in self._logs:
            accepted = log.accepted
            if log.accepted_at_check == accepted:
                self._asked.add(log)
            log.accepted_at_check = accepted
        if self._feed.is_mute:
            self._asked.update(islice(self._logs, 1))  # with any look it is tried whether the feed is refused still
        self._hinted.clear()
        self._call()

    def verify(self, request_id: str) -> None:
        """Read the end of one request's log soon, if it is written here, or will be in a moment."""
        log = self._by_request.get(request_id)
        if log is not None:
            self._ask(log)
        else:
            self._hinted.add(request_id)

    def _ask(self, log: LogWriter) -> None:
        self._asked.add(log)
        self._call()

    def stop(self) -> None:
        """Come to an end: write what there is, then return from `run`."""
        self._leaving = True
        self._call()

    def _call(self) -> None:
        """There is something for `run` to do."""
        if self._phase is _Phase.IDLE:
            self._schedule()

    def _schedule(self) -> None:
        self._phase = _Phase.DUE
        asyncio.get_running_loop().call_soon(self._go_on)  # after all that has arrived by now

    def _go_on(self) -> None:
        """Begin what is to be done next; nothing is in flight."""
        if self._trouble or self._look or self._asked or self._leaving:
            self._phase = _Phase.HELD
            self._work.set()
        else:
            self._flush()

    async def run(self) -> None:
        """Write until `leave` is called and nothing is left to write.

        It is never cancelled: redis-py 8.1 was seen to swallow a cancellation while it connects.
        """
        while True:
            await self._work.wait()
            self._work.clear()
            try:
                if self._trouble:
                    raise self._trouble
                while self._look or self._asked:
                    await self._look_at_logs()
            except (RedisError, OSError) as error:
                self._trouble = None
                if self._leaving:
                    return
                await self._recover(error)
                self._go_on()
                continue
            if self._leaving and not (self._out or self._feed.pending):
                return
            self._flush()

    def _flush(self) -> None:
        """Write what there is to write, and tell the feed."""
        if not (self._out or self._feed.pending):
            self._phase = _Phase.IDLE
            return
        commands: list[Command] = []
        batch, entries = self._out, 0
        for log, _, together, packed in batch:
            commands.append((log.key, packed, len(together)))
            entries += len(together)
            if entries >= _MAX_ENTRIES:
                batch = batch[: len(commands)]
                break
        self._out = self._out[len(batch) :]
        told, of_the_feed = self._feed.drain(self._publish)
        commands += of_the_feed
        now = time.monotonic()
        is_busy = entries > _BUSY * (now - self._flushed)
        self._flushed = now
        self._phase = _Phase.FLYING
        self._wires.execute(commands, partial(self._land, batch, told))
        if is_busy and not self._leaving:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._rest)  # after uvloop has sent it, which it does at the end of a step

    @property
    def has_shards(self) -> bool:
        """Whether the feed goes to sharded channels."""
        return self._wires.has_sharded_channels

    @property
    def _publish(self) -> bytes:
        return b"SPUBLISH" if self.has_shards else b"PUBLISH"

    def _rest(self) -> None:
        """Sleep until the next beat: as a network driver that moderates its interrupts."""
        left = self._rested + _BEAT - time.monotonic()
        if left > 0:
            time.sleep(left)
        self._rested = time.monotonic()

    def _land(self, batch: list[AppendBatch], told: FeedBatch, outcome: Outcome) -> None:
        """The replies to a flush are there."""
        if isinstance(outcome, Exception):
            self._trouble = outcome
        else:
            try:
                self._take_replies(batch, told, outcome)
            except Exception as error:  # noqa: BLE001 - `run` raises it
                self._trouble = error
            else:
                self._backoff.reset()  # not after a look: reading works while Redis has no room to write
        if self._out or self._trouble or self._look or self._asked or self._leaving:
            self._schedule()
        else:
            self._phase = _Phase.IDLE
            if self._feed.pending:
                self._feed.schedule()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._wires.close()
        await self._redis.aclose()

    def _take_replies(self, batch: list[AppendBatch], told: FeedBatch, replies: list[Any]) -> None:
        now = time.monotonic()
        verdicts = replies[: len(replies) - len(told)]
        # First: whoever did not listen yet when this was written reads it, and whoever did is to be told of it.
        if self.has_shards or not self._in_cluster:  # else each node counts its own alone
            note_listeners(told, replies[len(verdicts) :], now)
        refused = {} if {*map(type, verdicts)} <= {bytes} else refused_in(batch, verdicts)
        unheard: dict[LogWriter, AppendBatch] = {}
        written = 0
        for run in batch:
            log = run[0]
            if log not in refused and log.accept(run):
                written += len(run[2])
                if not log.feed_idle_until:
                    self._feed.publish_accepted(log, run[1], run[2])
                elif now >= log.feed_idle_until:
                    unheard[log] = run
        for log, first, entries, _ in unheard.values():
            # The last is enough: whoever has come since reads the log up to there.
            self._feed.publish_accepted(log, first + len(entries) - 1, entries[-1:])
        if written:
            self._telemetry.emit(EntriesAccepted(written))
        for log, since in refused.items():
            self._judge(log, since)

    def _judge(self, log: LogWriter, verdicts: list[object]) -> None:
        """Redis refused an entry, the first of these: find out what its id ran into.

        Raises:
            RedisError: when it is nothing about this log: it may pass.
        """
        first = verdicts[0]
        if not isinstance(first, RedisError):
            log.mark_lost(LogGone("the log is not there any more"))
            return
        text = redacted_message(first)
        if "equal or smaller" in text or "exhausted the last" in text:
            self._asked.add(log)  # written already, fenced or sealed: the log's end tells which
            self._refused[log] = log.attempt
        elif any(isinstance(verdict, bytes) for verdict in verdicts):
            log.mark_lost(LogDiverged(f"Redis refused an entry and took a later one: {text}"))
        elif refusal := refusal_of(first):
            log.mark_lost(refusal)
        else:
            raise first

    async def _look_at_logs(self) -> None:
        """Read the end of every log, or of those asked for, and judge by it. Nothing is in flight meanwhile."""
        if await self._wires.connect():
            self._look = True
        which = self._logs if self._look else self._asked & self._logs
        logs = [(log, log.attempt) for log in which if log.loss is None]
        self._look, self._asked = False, set()  # a look that is asked for meanwhile is one more
        asked: list[Command] = [
            (log.key, pack(b"XREVRANGE", log.key.encode(), b"+", b"-", b"COUNT", b"1"), 1) for log, _ in logs
        ]
        if is_trial := bool(self._feed.is_mute and logs):
            asked.append(trial(logs[0][0], self._publish))
        replies = await self._wires.query(asked)
        if is_trial and not isinstance(replies.pop(), RedisError):
            self._feed.unmute()
        looked_at = {log for log, _ in logs}
        self._out = [run for run in self._out if run[0] not in looked_at]
        for (log, attempt), reply in zip(logs, replies, strict=True):
            if log.attempt == attempt:
                self._reconcile(log, reply)
            else:  # its owner began another meanwhile: the reply may be older than that
                self._asked.add(log)
        for log in looked_at:
            self._out += log.pending

    def _reconcile(self, log: LogWriter, reply: object) -> None:
        if isinstance(reply, RedisError):
            refusal = refusal_of(reply)
            if refusal is None:
                raise reply
            log.mark_lost(refusal)
            return
        tail = cast("list[list[bytes]]", reply)
        accepted = log.reconcile(EntryId.parse(tail[0][0]) if tail else None)
        was_refused = self._refused.pop(log, 0) == log.attempt
        if was_refused and log.loss is None and not accepted:  # sent again, it would be refused again
            log.mark_lost(LogDiverged("Redis has had an entry that is not there any more: somebody deleted it"))
        if accepted:
            self._telemetry.emit(EntriesAccepted(sum(len(entries) for _, _, entries, _ in accepted)))
        for _, first, entries, _ in accepted:
            self._feed.publish_accepted(log, first, entries)

    async def _recover(self, error: BaseException) -> None:
        """After a lost connection or a refusal: nobody knows what was written, so look before writing again."""
        self._telemetry.emit(WriteFailed())
        self._feed.mute_if_refused(error)
        self._refused.clear()  # by another server perhaps
        await self._backoff.wait(error)
        await self._wires.close()
        self._look = True

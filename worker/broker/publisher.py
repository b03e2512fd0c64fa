"""The publisher, which writes the entries of all logs of this process. A cluster has one for each master.

One flush is in flight at a time, and entries that are appended meanwhile go with the next flush. So a log never has two
unanswered batches, and a busier worker has larger batches. A flush is one MULTI, in a cluster one for each slot: Redis
accepts all of it or nothing, so that a refusal leaves no hole. The publisher has a connection of its own. After a lost
connection the publisher reads the end of every log before it writes again, since a failover may have lost acknowledged
entries.

Flushes follow one another without a task, because waking a task costs more than a small flush. `run` connects, verifies
the ends of logs and recovers from errors, while nothing is in flight. At a high rate of entries, the whole process
sleeps after a flush, for less than a millisecond.
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
from ..redisio.pipelined import Command, NodeConnections, Outcome, PipelinedConnection, pack
from ..redisio.retry import Backoff
from ..telemetry.events import NO_TELEMETRY, Telemetry, WriteFailed
from .accepted_entries import AcceptedEntries
from .feed import FeedBatch, FeedPublisher, trial
from .flush_pace import FlushPace
from .log_scripts import is_id_taken
from .log_writer import AppendBatch, LogDiverged, LogWriter, refusal_from, refused_logs
from .write_stalls import WriteStalls

_HIGH_WATER_BYTES = 1024 * 1024
"""The limit for all logs together. Without it, an overloaded process would only read from vLLM, and not write."""


class _Phase(enum.Enum):
    """The state of the publisher."""

    IDLE = enum.auto()
    SCHEDULED = enum.auto()
    """The next flush, or a hand-over to `run`, happens in this step of the event loop or the next."""
    IN_FLIGHT = enum.auto()
    """A flush waits for its replies."""
    HELD = enum.auto()
    """`run` connects, verifies or recovers."""


class Publisher:
    """Writes the entries of every log that this process owns, and publishes to the feed what Redis accepted."""

    def __init__(
        self, redis: Redis, telemetry: Telemetry = NO_TELEMETRY, pace: FlushPace | None = None, *,
        in_cluster: bool = False, connection_type: type[PipelinedConnection] = PipelinedConnection,
    ) -> None:  # fmt: skip
        """Write to the server of a client. `aclose` closes the client."""
        self._redis = redis
        self._connections = NodeConnections(redis, by_slot=in_cluster, connection_type=connection_type)
        self._in_cluster = in_cluster
        self._telemetry = telemetry
        self._pace = pace or FlushPace()
        self._accepted = AcceptedEntries(telemetry, self._pace.report_every)
        self._stalls = WriteStalls(telemetry)
        self.feed = FeedPublisher(self._flush_feed, telemetry, self._pace)
        self._backoff = Backoff("log_write_failed", telemetry)
        self.is_full = False
        self.pending_bytes = 0
        """The bytes of all commands that Redis has not accepted."""
        self._logs: set[LogWriter] = set()
        self._by_request: dict[str, LogWriter] = {}
        self._queue: list[AppendBatch] = []
        self._phase = _Phase.IDLE
        self._must_verify_all = True  # before the first write, so that there is one place that connects
        self._to_verify: set[LogWriter] = set()
        self._refused: dict[LogWriter, int] = {}
        """Logs, with their attempt, of which Redis refused an entry as present already. Their ends must show it."""
        self._to_verify_when_attached: set[str] = set()
        """Requests with a cancel hint that came before their log was attached."""
        self._error: Exception | None = None
        self._is_stopping = False
        self._work = asyncio.Event()
        self._last_pause = 0.0

    def attach(self, log: LogWriter) -> None:
        """Begin to write a log that this process owns.

        If a cancel hint for the log came before this call, the log is verified: it may have been cancelled since it
        was read.
        """
        log.sink = self
        self._logs.add(log)
        self._by_request[log.request_id] = log
        if log.request_id in self._to_verify_when_attached:
            self._verify_soon(log)

    @property
    def logs(self) -> list[LogWriter]:
        """All attached logs."""
        return list(self._logs)

    def detach(self, log: LogWriter) -> None:
        """Forget a log that this process no longer writes."""
        log.discard_pending()
        self._remove(log)

    def _remove(self, log: LogWriter) -> None:
        self._logs.discard(log)
        self._refused.pop(log, None)
        if self._by_request.get(log.request_id) is log:
            del self._by_request[log.request_id]

    def adopt(self, log: LogWriter) -> None:
        """Continue a log that another publisher has disowned: its end is verified before more is written."""
        self.attach(log)
        self.pending_bytes += log.pending_bytes
        self._verify_soon(log)

    def disown(self, log: LogWriter) -> None:
        """Forget a log that another publisher continues. The log keeps its pending entries."""
        self.dequeue(log)
        self.release_bytes(log.pending_bytes)
        self.feed.pending.pop(log, None)
        self._remove(log)

    def enqueue(self, batch: AppendBatch) -> None:
        """Write entries, after all earlier ones of their log. See `EntrySink`, also below."""
        self._queue.append(batch)
        self.pending_bytes += len(batch[3])
        if self.pending_bytes >= _HIGH_WATER_BYTES:
            self.is_full = True
        if self._phase is _Phase.IDLE:
            self._schedule()

    def dequeue(self, log: LogWriter) -> None:
        """Drop the entries of a log that were enqueued and are not in flight."""
        self._queue = [batch for batch in self._queue if batch[0] is not log]

    def release_bytes(self, size: int) -> None:
        """Subtract bytes that were accepted or dropped."""
        self.pending_bytes -= size
        if self.is_full and self.pending_bytes < _HIGH_WATER_BYTES // 2:
            self.is_full = False
            for log in self._logs:
                log.wake_waiters()

    def publish(self, channel: str, entries: Iterable[tuple[str, Fields]]) -> None:
        """Publish entries that Redis has accepted to the feed, each with its id. The feed may lose them."""
        self.feed.publish(channel, entries)

    def _flush_feed(self) -> None:
        if self._phase is _Phase.IDLE:
            self._phase = _Phase.SCHEDULED
            self._proceed()

    def verify_all(self) -> None:
        """Read the end of every log soon, to find a seal or a fence that came while nothing was appended."""
        self._must_verify_all = True
        self._wake()

    def verify_idle(self) -> None:
        """Read soon the ends of the logs of which Redis has accepted nothing since the last call.

        The other logs need no check: Redis refuses entries for a log that was sealed or fenced.
        """
        for log in self._logs:
            accepted = log.accepted
            if log.accepted_at_check == accepted:
                self._to_verify.add(log)
            log.accepted_at_check = accepted
        if self.feed.is_muted:
            self._to_verify.update(islice(self._logs, 1))  # a verification also tries whether Redis accepts the feed
        self._to_verify_when_attached.clear()
        self._wake()

    def verify(self, request_id: str) -> None:
        """Read the end of one request's log soon, or as soon as the log is attached."""
        if log := self._by_request.get(request_id):
            self._verify_soon(log)
        else:
            self._to_verify_when_attached.add(request_id)

    def _verify_soon(self, log: LogWriter) -> None:
        self._to_verify.add(log)
        self._wake()

    def stop(self) -> None:
        """Write what is enqueued, then return from `run`."""
        self._is_stopping = True
        self._wake()

    def _wake(self) -> None:
        if self._phase is _Phase.IDLE:
            self._schedule()

    def _schedule(self) -> None:
        self._phase = _Phase.SCHEDULED
        asyncio.get_running_loop().call_soon(self._proceed)  # after the callbacks of all that has arrived by now

    def _proceed(self) -> None:
        """Hand over to `run` or flush; nothing is in flight."""
        if self._error or self._must_verify_all or self._to_verify or self._is_stopping:
            self._phase = _Phase.HELD
            self._work.set()
        else:
            self._flush()

    async def run(self) -> None:
        """Write until `stop` is called and nothing is left to write, or Redis fails after that.

        The task of `run` is never cancelled: redis-py 8.1 was seen to swallow a cancellation while it connects.
        """
        while True:
            await self._work.wait()
            self._work.clear()
            try:
                if self._error:
                    raise self._error
                while self._must_verify_all or self._to_verify:
                    await self._verify_logs()
                self._stalls.end(self._logs)
            except (RedisError, OSError) as error:
                self._error = None
                if self._is_stopping:
                    return
                await self._recover(error)
                self._proceed()
                continue
            if self._is_stopping and not (self._queue or self.feed.pending):
                return
            self._flush()

    def _flush(self) -> None:
        """Write what is enqueued, up to the limit, and publish to the feed."""
        if not (self._queue or self.feed.pending):
            self._phase = _Phase.IDLE
            return
        commands: list[Command] = []
        batches, entries, max_entries = self._queue, 0, self._pace.max_entries
        for log, _, appended, packed in batches:
            commands.append((log.key, packed, len(appended)))
            entries += len(appended)
            if entries >= max_entries:
                batches = batches[: len(commands)]
                break
        self._queue = self._queue[len(batches) :]
        feed, feed_commands = self.feed.drain(self._publish_command, batches)
        commands += feed_commands
        now = time.monotonic()
        is_busy = entries > self._pace.busy_rate * (now - self._stalls.sent)
        self._stalls.on_sent(now)
        self._phase = _Phase.IN_FLIGHT
        self._connections.execute(commands, partial(self._on_outcome, batches, feed))
        if is_busy and not self._is_stopping:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._pause)  # uvloop sends at the end of the loop's step: pause after that

    @property
    def has_shards(self) -> bool:
        """Whether the feed uses sharded channels."""
        return self._connections.has_sharded_channels

    @property
    def _publish_command(self) -> bytes:
        return b"SPUBLISH" if self.has_shards else b"PUBLISH"

    def _pause(self) -> None:
        """Sleep until the interval since the last pause is over, like a network driver that moderates interrupts."""
        left = self._last_pause + self._pace.interval - time.monotonic()
        if left > 0:
            self._pace.sleep(left)
        self._last_pause = time.monotonic()

    def _on_outcome(self, batches: list[AppendBatch], feed: FeedBatch, outcome: Outcome) -> None:
        """Handle the replies to a flush, or the error in their place."""
        if isinstance(outcome, Exception):
            self._error = outcome
        else:
            self._stalls.on_reply(self._logs)
            try:
                self._apply_replies(batches, feed, outcome)
            except Exception as error:  # noqa: BLE001 - `run` raises it
                self._error = error
            else:
                self._stalls.end(self._logs)
                self._backoff.reset()  # not after a verification: without memory, Redis refuses writes but not reads
        if self._queue or self._error or self._must_verify_all or self._to_verify or self._is_stopping:
            self._schedule()
        else:
            self._phase = _Phase.IDLE
            if self.feed.pending:
                self.feed.schedule()

    async def aclose(self) -> None:
        """Close the connection."""
        self._accepted.report()
        await self._connections.close()
        await self._redis.aclose()

    def _apply_replies(self, batches: list[AppendBatch], feed: FeedBatch, replies: list[Any]) -> None:
        now = time.monotonic()
        entry_replies = replies[: len(replies) - len(feed)]
        # Note the listeners first: a follower that listened when this was written needs these entries from the feed.
        self.feed.on_replies(
            feed, replies[len(entry_replies) :], now, are_counts=self.has_shards or not self._in_cluster
        )
        refused = {} if {*map(type, entry_replies)} <= {bytes} else refused_logs(batches, entry_replies)
        unpublished: dict[LogWriter, AppendBatch] = {}
        accepted = 0
        for batch in batches:
            log = batch[0]
            if log not in refused and log.accept(batch):
                accepted += len(batch[2])
                if now >= log.feed_idle_until > 0.0:
                    unpublished[log] = batch
                elif not log.feed_idle_until and log not in self.feed.published:
                    self.feed.publish_accepted(log, batch[1], batch[2])
        for log, first, entries, _ in unpublished.values():
            # The last entry is enough: a follower that has subscribed since then reads the log up to this entry.
            self.feed.publish_accepted(log, first + len(entries) - 1, entries[-1:])
        self._accepted.add(accepted)
        for log, since in refused.items():
            self._handle_refusal(log, since)

    def _handle_refusal(self, log: LogWriter, replies: list[object]) -> None:
        """Handle the refusal of an entry. `replies` are those from that entry on.

        Raises:
            RedisError: when the reason does not concern this log alone.
        """
        first = replies[0]
        if isinstance(first, RedisError) and is_id_taken(first):
            self._to_verify.add(log)  # written already, fenced or sealed: the log's end shows which
            self._refused[log] = log.attempt
        elif any(isinstance(reply, bytes) for reply in replies):
            log.mark_lost(LogDiverged(f"Redis refused an entry and accepted a later one: {first}"))
        elif not isinstance(first, RedisError):  # nil: there is no log or, on Valkey 9.1, its slot is moving
            self._to_verify.add(log)
        elif refusal := refusal_from(first):
            log.mark_lost(refusal)
        else:
            raise first

    async def _verify_logs(self) -> None:
        """Read the end of every log, or of those to verify, and compare. Nothing is in flight meanwhile."""
        self._stalls.on_sent(time.monotonic())
        if await self._connections.connect():
            self._must_verify_all = True
        selected = self._logs if self._must_verify_all else self._to_verify & self._logs
        logs = [(log, log.attempt) for log in selected if log.loss is None]
        self._must_verify_all, self._to_verify = False, set()  # a later request is another verification
        commands: list[Command] = [
            (log.key, pack(b"XREVRANGE", log.key.encode(), b"+", b"-", b"COUNT", b"1"), 1) for log, _ in logs
        ]
        if is_trial := bool(self.feed.is_muted and logs):
            commands.append(trial(logs[0][0], self._publish_command))
        replies = await self._connections.query(commands)
        if is_trial and not isinstance(replies.pop(), RedisError):
            self.feed.unmute()
        verified = {log for log, _ in logs}
        self._queue = [batch for batch in self._queue if batch[0] not in verified]
        for (log, attempt), reply in zip(logs, replies, strict=True):
            if log.attempt == attempt:
                self._reconcile(log, reply)
            else:  # its owner has begun another attempt meanwhile, and the reply may be older
                self._to_verify.add(log)
        for log in verified:
            self._queue += log.pending

    def _reconcile(self, log: LogWriter, reply: object) -> None:
        """Compare a log with its last entry in Redis."""
        if isinstance(reply, RedisError):
            refusal = refusal_from(reply)
            if refusal is None:
                raise reply
            log.mark_lost(refusal)
            return
        tail = cast("list[list[bytes]]", reply)
        accepted = log.reconcile(EntryId.parse(tail[0][0]) if tail else None)
        was_refused = self._refused.pop(log, 0) == log.attempt
        if was_refused and log.loss is None and not accepted:  # Redis would refuse the same entries again
            log.mark_lost(LogDiverged("Redis has had an entry that is not in the log: somebody deleted it"))
        self._accepted.add(sum(len(entries) for _, _, entries, _ in accepted))
        for _, first, entries, _ in accepted:
            self.feed.publish_accepted(log, first, entries)

    async def _recover(self, error: BaseException) -> None:
        """Verify all logs before writing again, since after an error it is unknown which entries Redis has."""
        self._telemetry.emit(WriteFailed())
        self._stalls.begin(self._logs)
        self.feed.mute_if_refused(error)
        self._refused.clear()  # the next connection may lead to another server
        await self._backoff.wait(error)
        await self._connections.close()
        self._must_verify_all = True

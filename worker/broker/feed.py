"""The publishing end of the feed: a pub/sub copy of the entries that Redis has accepted, for logs that have listeners.

The copy is sent with the publisher's next flush, or soon afterwards in a flush of its own. A script publishes the first
entries of an attempt in the MULTI that adds them, because a reader waits for the first token. The feed is for speed
only: if Redis refuses it, nothing more is published, and followers read the logs.
"""

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import msgspec
from redis.exceptions import ResponseError

from ..contract.entries import Fields
from ..contract.ids import SEAL
from ..redisio.errors import redacted_message
from ..redisio.pipelined import Command, pack
from ..telemetry.events import Failing, RecordRefused, Recovered, Telemetry
from .flush_pace import FlushPace
from .log_writer import AppendBatch, LogWriter

FeedBatch: TypeAlias = dict[LogWriter | str, list[tuple[str, Fields]]]
"""Entries to publish, each with its id: by their log, or by the channel of a log that this process does not write."""

_REFUSED = "feed_refused"
_NAMES_THE_FEED = re.compile("['`]s?publish['`]|one of the channels|access a channel|' channel$", re.IGNORECASE)
"""Matches the errors of Redis 6.2 to 8 and Valkey 9 for a PUBLISH that was renamed or is not allowed."""
_FIRST = 2
"""The `n` of the last entry with which entries are published at once: mostly 1 is `opened` and 2 the first delta."""
_PUBLISH_FIRST = b"""
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
return last and last[1] == ARGV[1] and redis.call(ARGV[2], ARGV[3], ARGV[4])
"""
"""Publishes entries if the last of them is the last one of the log, and returns the number of listeners; else nil.

KEYS is the log. ARGV: the id of the last entry, the command that publishes, the channel, the message. Only the owner of
an attempt adds entries to it, one after another, so the log then has all of the entries. The source is sent each time:
in a MULTI, it would be noticed too late that Redis does not know a script.
"""
encode = msgspec.json.encode


class FeedPublisher:
    """Collects the entries that a publisher's next flush publishes. `on_due` is called if no flush follows soon."""

    def __init__(self, on_due: Callable[[], None], telemetry: Telemetry, pace: FlushPace) -> None:
        self.pending: FeedBatch = {}
        self.is_muted = False
        """Whether Redis refuses the feed, so that nothing is collected."""
        self.published: set[LogWriter] = set()
        """The logs whose first entries the flush in flight publishes; after `on_replies`, those that it did publish."""
        self._on_due = on_due
        self._telemetry = telemetry
        self._pace = pace
        self._is_scheduled = False

    def publish(self, channel: str, entries: Iterable[tuple[str, Fields]]) -> None:
        """Publish entries that Redis has accepted, each with its id."""
        if not self.is_muted:
            self.pending.setdefault(channel, []).extend(entries)
            self.schedule()

    def publish_accepted(self, log: LogWriter, first: int, entries: list[Fields]) -> None:
        """Publish entries of a log's current attempt that Redis has accepted. `first` is the `n` of the first one."""
        if not self.is_muted:
            self.pending.setdefault(log, []).extend(_with_ids(log, first, entries))
            self.schedule()

    def take_last_message(self, log: LogWriter, seal: Fields) -> str:
        """The last message of a log, with its pending entries, for a caller that publishes it; empty if Redis refuses.

        If the caller does not publish the message, readers read the entries at the next message.
        """
        if self.is_muted:
            return ""
        unpublished = self.pending.pop(log.feed, []) + self.pending.pop(log, [])
        return encode([*unpublished, (str(SEAL), seal)]).decode()

    def schedule(self) -> None:
        """Call `on_due` after the delay, unless a flush has published the pending entries by then."""
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_later(self._pace.feed_delay, self._on_timer)

    def _on_timer(self) -> None:
        self._is_scheduled = False
        if self.pending:
            self._on_due()

    def drain(self, publish: bytes, appended: Iterable[AppendBatch]) -> tuple[FeedBatch, list[Command]]:
        """Remove and return all pending entries, with the commands that publish them (PUBLISH or SPUBLISH).

        The result also has the first entries of attempts among those that are appended in the same MULTI, if somebody
        may wait for them.
        """
        batch, self.pending = self.pending, {}
        commands: list[Command] = []
        for target, entries in batch.items():
            channel = target if isinstance(target, str) else target.feed
            commands.append((channel, pack(publish, channel.encode(), encode(entries)), 1))
        firsts: dict[LogWriter, list[tuple[str, Fields]]] = {}
        for log, first, new, _ in () if self.is_muted else appended:
            if log in firsts or (first <= _FIRST and not log.feed_idle_until and log not in batch):
                firsts.setdefault(log, []).extend(_with_ids(log, first, new))
        for log, entries in firsts.items():
            batch[log] = entries
            words = entries[-1][0].encode(), publish, log.feed.encode(), encode(entries)
            commands.append((log.key, pack(b"EVAL", _PUBLISH_FIRST, b"1", log.key.encode(), *words), 1))
        self.published = set(firsts)
        return batch, commands

    def on_replies(self, batch: FeedBatch, replies: list[Any], now: float, *, are_counts: bool) -> None:
        """Note which first entries were published and, if the replies count all listeners, which logs have some.

        A node of a cluster without sharded channels counts only its own listeners. `now` is of the monotonic clock.
        """
        for target, count in zip(batch, replies, strict=True):
            if isinstance(target, LogWriter):
                if not isinstance(count, int):
                    self.published.discard(target)
                elif are_counts:
                    target.feed_idle_until = 0.0 if count else now + self._pace.feed_idle_for

    def mute_if_refused(self, error: BaseException) -> None:
        """Stop publishing if Redis refuses the feed, which would block the log entries in the same MULTI."""
        message = redacted_message(error)
        if isinstance(error, ResponseError) and _NAMES_THE_FEED.search(message):
            self.is_muted = True
            self.pending.clear()
            self._telemetry.emit(RecordRefused("feed"))
            self._telemetry.emit(Failing(_REFUSED, message))

    def unmute(self) -> None:
        """Publish again: Redis has accepted a trial message."""
        self.is_muted = False
        self._telemetry.emit(Recovered(_REFUSED))


def _with_ids(log: LogWriter, first: int, entries: list[Fields]) -> list[tuple[str, Fields]]:
    return [(f"{log.attempt}-{n}", fields) for n, fields in enumerate(entries, first)]


def trial(log: LogWriter, publish: bytes) -> Command:
    """A command that shows whether Redis accepts the feed. It uses a channel of its own, which no follower reads."""
    channel = f"{log.feed}:trial"
    return channel, pack(publish, channel.encode(), b"[]"), 1

"""What the publisher tells the feed: the entries that Redis has accepted, of logs to which somebody listens.

It goes with the next flush, or alone soon. It is only speed: where Redis refuses it, it is silent, and followers read.
"""

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import msgspec
from redis.exceptions import ResponseError

from ..contract.entries import Fields
from ..contract.feed import MAX_SILENCE
from ..redisio.errors import redacted_message
from ..redisio.pipelined import Command, pack
from ..telemetry.events import Failing, RecordRefused, Recovered, Telemetry
from .log_writer import LogWriter

FeedBatch: TypeAlias = dict[LogWriter | str, list[tuple[str, Fields]]]
"""What to tell, by log or by the channel of one."""

_FEED_WAITS = 0.001
"""Seconds; a MULTI for the feed alone costs as much as one for entries."""
_OF_THE_FEED = re.compile("['`]s?publish['`]|one of the channels|' channel$", re.IGNORECASE)
"""In what Redis 6.2 to 8 say of a PUBLISH that a user has no right to, or that was renamed."""
_REFUSED = "feed_refused"
_encode = msgspec.json.encode


class FeedPublisher:
    """Collects news for a publisher's next flush; `due` is called when there are some and nothing else may come."""

    def __init__(self, due: Callable[[], None], telemetry: Telemetry) -> None:
        self.pending: FeedBatch = {}
        self.is_mute = False
        self._due = due
        self._telemetry = telemetry
        self._is_soon = False

    def publish(self, channel: str, entries: Iterable[tuple[str, Fields]]) -> None:
        """Publish entries that Redis has accepted, each with its id."""
        if not self.is_mute:
            self.pending.setdefault(channel, []).extend(entries)
            self.schedule()

    def publish_accepted(self, log: LogWriter, first: int, entries: list[Fields]) -> None:
        """Publish entries of a log's attempt that Redis has accepted, `first` being the number of the first."""
        if not self.is_mute:
            told = [(f"{log.attempt}-{n}", fields) for n, fields in enumerate(entries, first)]
            self.pending.setdefault(log, []).extend(told)
            self.schedule()

    def schedule(self) -> None:
        """The news go with the next entries, or alone if there are none."""
        if not self._is_soon:
            self._is_soon = True
            asyncio.get_running_loop().call_later(_FEED_WAITS, self._tell)

    def _tell(self) -> None:
        self._is_soon = False
        if self.pending:
            self._due()

    def drain(self, publish: bytes) -> tuple[FeedBatch, list[Command]]:
        """The news, and the commands that tell them by SPUBLISH or PUBLISH; from now on there are none."""
        told, self.pending = self.pending, {}
        commands: list[Command] = []
        for it, news in told.items():
            channel = it if isinstance(it, str) else it.feed
            commands.append((channel, pack(publish, channel.encode(), _encode(news)), 1))
        return told, commands

    def mute_if_refused(self, error: BaseException) -> None:
        """Fall silent if it is this that Redis refuses: it is in one MULTI with entries, and would hold them back."""
        said = redacted_message(error)
        if isinstance(error, ResponseError) and _OF_THE_FEED.search(said):
            self.is_mute = True
            self.pending.clear()
            self._telemetry.emit(RecordRefused("feed"))
            self._telemetry.emit(Failing(_REFUSED, said))

    def unmute(self) -> None:
        """Redis has taken a trial message."""
        self.is_mute = False
        self._telemetry.emit(Recovered(_REFUSED))


def trial(log: LogWriter, publish: bytes) -> Command:
    """Tries whether Redis takes the feed: not on the channel itself, for followers rely on what they hear there."""
    channel = f"{log.feed}:trial"
    return channel, pack(publish, channel.encode(), b"[]"), 1


def note_listeners(told: FeedBatch, counts: list[Any], now: float) -> None:
    """How many heard what was told last, of each log; `now` is of the monotonic clock."""
    for it, count in zip(told, counts, strict=True):
        if isinstance(it, LogWriter):
            it.feed_idle_until = 0.0 if count else now + MAX_SILENCE

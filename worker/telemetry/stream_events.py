"""The events of the streams that a gateway serves.

The rules for all events are in `worker.telemetry.events`.
"""

from dataclasses import dataclass
from typing import Literal

from .events import Event

StreamEnd = Literal["done", "problem", "left", "stalled", "shutdown"]
"""Why a stream ended: its log has ended; an error; the client has left, or read nothing; the process stops."""


@dataclass(frozen=True, slots=True)
class StreamOpened(Event):
    level = "silent"
    protocol: str


@dataclass(frozen=True, slots=True)
class StreamClosed(Event):
    level = "silent"
    protocol: str
    end: StreamEnd


@dataclass(frozen=True, slots=True)
class FollowerDropped(Event):
    """The client of a stream read nothing for too long, and lost its connection."""

    protocol: str


@dataclass(frozen=True, slots=True)
class CaughtUp(Event):
    """A stream read its log, at its start (`reason` is `opened`) or because its client reads slowly (`slow`)."""

    level = "silent"
    protocol: str
    reason: Literal["opened", "slow"]
    seconds: float


@dataclass(frozen=True, slots=True)
class EntriesDelivered(Event):
    """Entries were written to the readers of this process; emitted about once a second.

    `delays` are seconds from the arrival of a live entry in this process to the last write of its frame, for a sample
    of them. When Redis has accepted an entry is not known: neither its id nor the feed has a time.
    """

    level = "silent"
    entries: int
    size: int
    delays: tuple[float, ...] = ()

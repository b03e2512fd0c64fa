"""What the processes of a run share, in a file in memory: counters, when each token was written, and latencies read.

All times are nanoseconds of CLOCK_MONOTONIC, which is one clock for all processes of a machine.
"""

import mmap
import os
import struct
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Self

_HEADER = struct.Struct("<4Q")
_COUNTERS = 16
_TOKENS = 1 << 22
_SAMPLES = 1 << 19


class Count(IntEnum):
    """The counters; each has one writer."""

    OPEN = 0
    """Streams that the load generator has open now."""
    OPENED = 1
    """Streams that it has ever opened."""
    WRITTEN = 2
    """Tokens that it has written."""
    LATE = 3
    """Of these, those written more than 5 ms after they were due."""
    WITHHELD = 4
    """Tokens that were due and not written, for their stream had too much unsent."""
    READ = 5
    """Deltas that the reader has seen."""
    STRAY = 6
    """Deltas that the reader saw with another text than the one written: lost, doubled or out of order before it."""


_READ = int(Count.READ)


class Sample(NamedTuple):
    """When a delta arrived at the reader, and how long after its write at the load generator."""

    arrived: int
    latency: int


class Board:
    """The shared file. `streams` may be open at most; each remembers the times of its last `ring` tokens."""

    def __init__(self, file: mmap.mmap, streams: int, ring: int) -> None:
        self.streams = streams
        self.ring = ring
        words = memoryview(file).cast("Q")[_HEADER.size // 8 :]
        self.counters = words[:_COUNTERS]
        self.times = words[_COUNTERS : _COUNTERS + streams * ring]
        """The time of the token `n` of the stream `s` is at `s * ring + n % ring`."""
        self._samples = words[_COUNTERS + streams * ring :]
        self._seen = self.counters[_READ]

    @classmethod
    def create(cls, path: Path, streams: int) -> Self:
        """A new file for at most `streams` streams."""
        ring = max(256, 1 << (_TOKENS // streams).bit_length() - 1)
        with path.open("w+b") as file:
            file.truncate(_HEADER.size + 8 * (_COUNTERS + streams * ring + 2 * _SAMPLES))
            file.write(_HEADER.pack(streams, ring, 0, 0))
            file.flush()
            return cls(mmap.mmap(file.fileno(), 0), streams, ring)

    @classmethod
    def attach(cls, path: Path) -> Self:
        """The file that another process has created."""
        with path.open("r+b") as file:
            shared = mmap.mmap(file.fileno(), 0)
        streams, ring, _, _ = _HEADER.unpack_from(shared)
        return cls(shared, streams, ring)

    def __getitem__(self, count: Count) -> int:
        return self.counters[count]

    def add(self, arrived: int, latency: int) -> None:
        """Note what the reader saw; the oldest are forgotten. It is made to cost little: every reader pays for it."""
        number, samples = self._seen, self._samples
        place = 2 * (number % _SAMPLES)
        samples[place] = arrived
        samples[place + 1] = latency
        self._seen = number = number + 1
        self.counters[_READ] = number

    def samples(self, first: int) -> list[Sample]:
        """What the reader saw from its sample `first` on, as far as it is remembered."""
        count = self.counters[Count.READ]
        places = (2 * (number % _SAMPLES) for number in range(max(first, count - _SAMPLES), count))
        return [Sample(self._samples[place], self._samples[place + 1]) for place in places]


def folder() -> Path:
    """Where files in memory live, or files at all where there is no such place."""
    memory = Path("/dev/shm")  # noqa: S108 - what is made there has a random name
    return memory if os.access(memory, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108

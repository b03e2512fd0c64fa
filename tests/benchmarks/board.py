"""The shared memory of the processes of a run: counters, the time of each written token, and the measured latencies.

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
    """Streams that it has opened since its start."""
    WRITTEN = 2
    """Tokens that it has written."""
    LATE = 3
    """Of these, those written more than 5 ms after they were due."""
    WITHHELD = 4
    """Tokens that were due but not written, because their stream had too many unsent bytes."""
    READ = 5
    """Deltas that the reader has seen."""
    STRAY = 6
    """Deltas whose text is not the one that was written next: a delta was lost, doubled or out of order."""


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
        """Create a file for at most `streams` streams."""
        ring = max(256, 1 << (_TOKENS // streams).bit_length() - 1)
        with path.open("w+b") as file:
            file.truncate(_HEADER.size + 8 * (_COUNTERS + streams * ring + 2 * _SAMPLES))
            file.write(_HEADER.pack(streams, ring, 0, 0))
            file.flush()
            return cls(mmap.mmap(file.fileno(), 0), streams, ring)

    @classmethod
    def attach(cls, path: Path) -> Self:
        """Open the file that another process has created."""
        with path.open("r+b") as file:
            shared = mmap.mmap(file.fileno(), 0)
        streams, ring, _, _ = _HEADER.unpack_from(shared)
        return cls(shared, streams, ring)

    def __getitem__(self, count: Count) -> int:
        return self.counters[count]

    def add(self, arrived: int, latency: int) -> None:
        """Record a delta that the reader saw, in place of the oldest record. It is cheap: every reader pays for it."""
        number, samples = self._seen, self._samples
        place = 2 * (number % _SAMPLES)
        samples[place] = arrived
        samples[place + 1] = latency
        self._seen = number = number + 1
        self.counters[_READ] = number

    def samples(self, first: int) -> list[Sample]:
        """The records of the reader from number `first` on, as far as they are kept."""
        count = self.counters[Count.READ]
        places = (2 * (number % _SAMPLES) for number in range(max(first, count - _SAMPLES), count))
        return [Sample(self._samples[place], self._samples[place + 1]) for place in places]


def folder() -> Path:
    """The folder for files in memory, or for temporary files if there is none."""
    memory = Path("/dev/shm")  # noqa: S108 - what is made there has a random name
    return memory if os.access(memory, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108

"""The newest frames of the logs that are followed now: one bounded window for each request and protocol.

A tail encodes each entry once and writes the frame to every reader in the step in which the entry arrives. A reader is
a place in the window, not a queue: one that does not read falls out of the window, and reads the log again by itself.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol, TypeAlias

from ..client.async_client import Client
from ..client.errors import IncompleteLog
from ..contract.entries import AnyEntry
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .delivery_meter import DeliveryMeter
from .protocols.protocol import Encoder, Frame, StreamProtocol

WINDOW_BYTES = 128 * 1024
"""The most bytes of frames that a tail keeps. One frame may be larger."""

_READERS = 8
"""How many streams read their logs at the same time."""


class TailReader(Protocol):
    """A reader of a tail. Its methods return at once and never raise."""

    next: int
    """The number of the next frame to deliver, while the reader is behind the tail's end."""
    position: EntryId
    """The last entry that was written, while the reader is behind the tail's end."""

    direct: Callable[[bytes], object] | None
    """Writes a chunk of HTTP, if this is possible, without any other code of ours for each entry and reader.

    If the client must read first, `block` is called in the step of the write. It raises `RuntimeError` if the
    connection is closed, which the reader notices by itself.
    """

    @property
    def write(self) -> Callable[[Frame], bool]:
        """Writes a frame. Returns false if the reader must wait for its client, and so falls behind."""

    def on_tail_over(self, error: Exception | None) -> None:
        """Called when the log has ended, or when the reader cannot follow it any longer, which is an error."""


_Writers: TypeAlias = tuple[list[Callable[[bytes], object]], list[TailReader]]
"""The functions of the readers that are written to directly, and the other readers. Nobody changes the lists."""


class Tail:
    """The newest frames of one log in one protocol, and their readers. It ends with its last reader."""

    def __init__(
        self, tails: "Tails", request_id: str, protocol: StreamProtocol, encoder: Encoder, after: EntryId
    ) -> None:
        self.request_id = request_id
        self.protocol = protocol
        self.begin = after
        """The id of the last entry before the window: a reader that has this entry finds all later ones here."""
        self.last = after
        """The id of the last entry."""
        self.first = 0
        """The number of the first frame in the window. Frames count from the tail's start."""
        self.last_frame_at = 0.0
        """When the last frame was written, by the event loop's clock."""
        self.error: Exception | None = None
        """Why the log can no longer be followed."""
        self.is_over = False
        self._tails = tails
        self._encoder = encoder
        self._window: deque[Frame] = deque()
        self._size = 0
        self._live: dict[TailReader, None] = {}
        """The readers that have every frame."""
        self._writers: _Writers | None = None
        """What to write a frame with. Made for the next frame after a change, so that many may join between two."""
        self._ahead: list[tuple[EntryId, TailReader]] = []
        """Readers that have more of the log than the tail has received yet, or more than the log still has."""
        self._readers: dict[TailReader, None] = {}
        self._time = asyncio.get_running_loop().time
        self.pump = asyncio.create_task(self._follow(after), name=f"tail of {request_id}")

    @property
    def end(self) -> int:
        """The number of the next frame."""
        return self.first + len(self._window)

    def admits(self, position: EntryId) -> bool:
        """Whether the tail has every frame after an entry."""
        return not self.is_over and position >= self.begin

    def join(self, reader: TailReader, position: EntryId) -> None:
        """Add a reader that has all entries up to `position`. The tail writes to it from the next call of `resume`."""
        self._readers[reader] = None
        if position > self.last:
            self._ahead.append((position, reader))
            reader.next = -1
        else:
            reader.next = self._number_after(position)

    def resume(self, reader: TailReader) -> bool:
        """Write what a reader lacks, as far as its client takes it. Returns false if it is before the window."""
        if reader.next < 0:  # it is ahead, and gets the frames from where it is
            return True
        if reader in self._live:  # it lacks nothing: its connection waited because of another log, or of a heartbeat
            return True
        while reader.next < self.end:
            if reader.next < self.first:
                return False
            for frame in self._frames_from(reader.next):
                reader.next += frame.entries
                reader.position = frame.last
                self._tails.meter.add(frame.entries, len(frame.data))
                if not reader.write(frame):
                    return True
        if self.is_over:
            reader.on_tail_over(self.error)
        else:
            self._live[reader] = None
            self._writers = None
        return True

    def block(self, reader: TailReader) -> None:
        """Write to a reader no more before the next call of `resume`. It has got the last frame."""
        if self._live.pop(reader, self) is None:
            self._writers = None
            reader.next, reader.position = self.end, self.last

    def refresh(self) -> None:
        """Use the functions that the readers have now."""
        self._writers = None

    def leave(self, reader: TailReader) -> None:
        """Remove a reader. The last one ends the tail."""
        if self._readers.pop(reader, self) is self:
            return
        self._live.pop(reader, None)
        self._writers = None
        self._ahead = [(position, other) for position, other in self._ahead if other is not reader]
        if not self._readers and not self.is_over:
            self.is_over = True
            self._tails.remove(self)

    def _frames_from(self, number: int) -> Iterator[Frame]:
        """The frames from a number on, joined into larger ones where the protocol allows it."""
        rest = list(islice(self._window, number - self.first, None))
        if not self.protocol.joins_writes or len(rest) == 1:
            yield from rest
            return
        group: list[Frame] = []
        size = 0
        for frame in rest:
            if group and size + len(frame.data) > self._tails.write_bytes:
                yield self._joined(group)
                group, size = [], 0
            group.append(frame)
            size += len(frame.data)
        if group:
            yield self._joined(group)

    def _joined(self, group: list[Frame]) -> Frame:
        data = b"".join([frame.data for frame in group])
        return Frame(group[-1].last, data, len(group))

    def _new_writers(self) -> _Writers:
        direct = [reader.direct for reader in self._live if reader.direct is not None]
        self._writers = writers = direct, [reader for reader in self._live if reader.direct is None]
        return writers

    def _number_after(self, position: EntryId) -> int:
        """The number of the first frame after an entry."""
        number = self.end
        for frame in reversed(self._window):
            if frame.last <= position:
                break
            number -= 1
        return number

    async def _follow(self, after: EntryId) -> None:
        try:
            await self._tails.client.pour(self.request_id, self._add, after=None if after == BEFORE_ALL else after)
        except _StreamOver:
            pass
        except Exception as error:  # noqa: BLE001 - the readers report it
            self.error = error
        self.is_over = True
        self._tails.remove(self)
        for reader in self._live:
            reader.on_tail_over(self.error)
        for _, reader in self._ahead:
            reader.next = self.end
            reader.on_tail_over(self.error)

    def _add(self, entry: AnyEntry) -> None:
        self._tails.meter.note_arrival()
        if entry.id == SEAL and self._ahead:
            self._refuse_ahead()
        piece = self._encoder.encode(entry)
        self.last = last = entry.id
        if piece:
            frame = Frame(last, self.protocol.frame((piece,), last))
            self._window.append(frame)
            self._size += len(frame.data)
            while self._size > WINDOW_BYTES and len(self._window) > 1:
                dropped = self._window.popleft()
                self.begin, self.first = dropped.last, self.first + 1
                self._size -= len(dropped.data)
            self._write(frame)
        if self._ahead:
            self._admit()
        if self._encoder.is_over:
            raise _StreamOver

    def _write(self, frame: Frame) -> None:
        direct, others = self._writers or self._new_writers()  # a write may change them
        if direct:
            chunk = frame.chunk
            for write in direct:
                try:
                    write(chunk)
                except RuntimeError:  # uvloop's transport is closed
                    continue
        for reader in others:
            if not reader.write(frame):
                self.block(reader)
        self.last_frame_at = self._time()
        if readers := len(direct) + len(others):
            self._tails.meter.add_live(readers, len(frame.data))

    def _admit(self) -> None:
        """Let readers that were ahead of the tail go on with it once the tail has reached them."""
        reached = [ahead for ahead in self._ahead if ahead[0] <= self.last]
        self._ahead = [(position, reader) for position, reader in self._ahead if position > self.last]
        for position, reader in reached:
            reader.next = self._number_after(position)  # a failover may have lost entries that the reader has
            self.resume(reader)

    def _refuse_ahead(self) -> None:
        """End the readers whose entry the log does not have: every entry before the seal has arrived."""
        ahead, self._ahead = self._ahead, []
        for position, reader in ahead:
            reader.next = self.end
            reader.on_tail_over(IncompleteLog(self.request_id, position, is_cursor=True))


class _StreamOver(Exception):
    """The stream has ended before its log."""


class Tails:
    """All tails of a gateway process.

    Args:
        client: follows the logs.
        write_bytes: the most bytes of a frame that joins several. 10,000 tokens are then less than 20 frames.
    """

    def __init__(self, client: Client, meter: DeliveryMeter, *, write_bytes: int = 40 * 1024) -> None:
        self.client = client
        self.meter = meter
        self.write_bytes = write_bytes
        self.page_slots = asyncio.Semaphore(_READERS)
        """Bounds how many pages of logs are in memory at once."""
        self._tails: dict[tuple[str, StreamProtocol], Tail] = {}
        self._open: set[Tail] = set()
        self._ending: set[asyncio.Task[None]] = set()

    def find(self, request_id: str, protocol: StreamProtocol) -> Tail | None:
        """Return the tail of a request in a protocol, if somebody follows it."""
        return self._tails.get((request_id, protocol))

    def start(self, request_id: str, protocol: StreamProtocol, encoder: Encoder, after: EntryId) -> Tail:
        """Start a tail after an entry. The encoder has encoded everything up to this entry.

        Later readers join this tail. One that was there before goes on until its last reader leaves.
        """
        tail = self._tails[request_id, protocol] = Tail(self, request_id, protocol, encoder, after)
        self._open.add(tail)
        return tail

    def remove(self, tail: Tail) -> None:
        """Forget a tail that is over, and stop following its log."""
        self._open.discard(tail)
        key = tail.request_id, tail.protocol
        if self._tails.get(key) is tail:
            del self._tails[key]
        if tail.pump is not asyncio.current_task() and not tail.pump.done():
            tail.pump.cancel()
            self._ending.add(tail.pump)
            tail.pump.add_done_callback(self._ending.discard)

    async def aclose(self) -> None:
        """Stop following every log."""
        for tail in list(self._open):
            self.remove(tail)
        await asyncio.gather(*self._ending, return_exceptions=True)

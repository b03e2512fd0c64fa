"""One reader's place in one log: it reads the log to its end, joins the tail there, and returns if it falls behind.

`catch_up` runs in the task of the stream. From then on, the tail and the connection drive the cursor in callbacks.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Protocol

from ..client.errors import ClientError, InvalidArgument
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .protocols.protocol import Encoder, Frame, StreamProtocol, without_events
from .tails import Tail, Tails

_FIRST_PAGE, _LARGEST_PAGE = 16, 1000
"""The entries of the first page of a log, and of one after a pause."""


class CursorOwner(Protocol):
    """The stream that a cursor writes to."""

    async def wait_writable(self) -> None:
        """Wait until a frame can be written."""

    def wake(self) -> None:
        """Called when the cursor needs the stream's task: to catch up, or because it is over."""


class LogCursor:
    """A reader's place in a log.

    Args:
        write: see `TailReader`.
        position: the last entry that the reader has. Frames after it are written.
        skip: how many events after `position` the reader has.
    """

    __slots__ = (
        "_owner",
        "_page",
        "_protocol",
        "_request_id",
        "_skip",
        "_tail",
        "_tails",
        "direct",
        "error",
        "is_over",
        "next",
        "position",
        "write",
    )

    def __init__(
        self, tails: Tails, request_id: str, protocol: StreamProtocol, owner: CursorOwner,
        write: Callable[[Frame], bool], *, position: EntryId = BEFORE_ALL, skip: int = 0,
    ) -> None:  # fmt: skip
        self.position = position
        """See `TailReader`."""
        self.next = 0
        """See `TailReader`."""
        self.write = write
        """See `TailReader`."""
        self.direct: Callable[[bytes], object] | None = None
        """See `TailReader`."""
        self.is_over = False
        """Whether everything up to the end of the stream was written."""
        self.error: Exception | None = None
        """Why the log cannot be followed any longer. Everything before was written."""
        self._tails = tails
        self._request_id = request_id
        self._protocol = protocol
        self._owner = owner
        self._skip = skip
        self._page = 0
        """How many entries the last frame of the backlog had: the next page has as many."""
        self._tail: Tail | None = None

    @property
    def is_behind(self) -> bool:
        """Whether `catch_up` must be called."""
        return not self.is_over and self._tail is None

    @property
    def is_queued(self) -> bool:
        """Whether the reader has all entries so far, and no worker has started the job."""
        return self._tail is not None and self._tail.last.attempt == 0

    @property
    def last_frame_at(self) -> float:
        """When the tail last wrote a frame, by the event loop's clock."""
        return self._tail.last_frame_at if self._tail is not None else 0.0

    async def catch_up(self, *, is_new: bool = False) -> None:
        """Write what the log has, and join the tail, which writes the rest.

        `is_new` is whether the log has just begun. The tail then reads it from its start.

        Raises the errors of `Client.follow`; and `InvalidArgument` when the stream has less events than are to skip.
        """
        encoder = self._protocol.new_encoder()
        read = self.position if self._protocol.starts_anywhere else BEFORE_ALL
        pieces: list[bytes] = []
        while self.is_behind:
            tail = self._tails.find(self._request_id, self._protocol)
            if tail is not None and tail.admits(read) and read >= self.position and not (self._skip or pieces):
                self._join(tail, read)
                return
            if is_new and tail is None:
                self._join(self._tails.start(self._request_id, self._protocol, encoder, read), read)
                return
            refusing, before = None if self._skip or pieces else tail, read
            read, is_at_end = await self._write_backlog(encoder, read, pieces)
            if not is_at_end:
                await self._owner.wait_writable()
            elif read == SEAL or encoder.is_over:
                self.is_over = True
            elif self._skip:
                raise InvalidArgument(f"the answer has {self._skip} events less than the client has received")
            elif (found := self._tails.find(self._request_id, self._protocol)) is None or (
                found is refusing and read == before
            ):
                # The second case: the tail does not admit the end of the log, since a failover has lost what came
                # before its window, or since its first reader had a cursor that the log never had.
                self._join(self._tails.start(self._request_id, self._protocol, encoder, read), read)

    def on_tail_over(self, error: Exception | None) -> None:
        """See `TailReader`."""
        self.is_over, self.error = True, error
        self._owner.wake()

    def write_by(self, write: Callable[[Frame], bool], direct: Callable[[bytes], object] | None) -> None:
        """Write by other functions from now on."""
        self.write, self.direct = write, direct
        if self._tail is not None:
            self._tail.refresh()

    def on_blocked(self) -> None:
        """Write nothing until `on_writable` is called, because the client must read."""
        if self._tail is not None:
            self._tail.block(self)

    def on_writable(self) -> None:
        """Go on after a write that had to wait."""
        tail = self._tail
        if tail is not None and not self.is_over and not tail.resume(self):
            self.leave()
            self._owner.wake()

    def leave(self) -> None:
        """Leave the tail."""
        if self._tail is not None:
            self._tail.leave(self)
            self._tail = None

    def _join(self, tail: Tail, read: EntryId) -> None:
        self._tail = tail
        tail.join(self, read)
        self.on_writable()

    async def _write_backlog(self, encoder: Encoder, read: EntryId, pieces: list[bytes]) -> tuple[EntryId, bool]:
        """Write the log after the entry `read` in few large frames, until its end or until the client must read.

        Returns the last entry that was encoded, and whether the end was reached. The page is dropped while the client
        does not read, since many such clients would keep a page each. `pieces` are encoded entries up to `read` that
        are not written yet.
        """
        limit, last, size = self._tails.write_bytes, read, sum(map(len, pieces))
        first = max(_FIRST_PAGE, self._page)
        try:
            async with (
                self._tails.page_slots,
                aclosing(self._tails.client.pages(self._request_id, after=read, first=first)) as pages,
            ):
                async for page in pages:
                    for entry in page:
                        piece = encoder.encode(entry)
                        read = entry.id
                        if not piece or read <= self.position:
                            continue
                        if self._skip:
                            piece, self._skip = without_events(piece, self._skip)
                            if not piece:
                                continue
                        is_full = bool(pieces) and size + len(piece) > limit
                        is_sent = not is_full or self._write_pieces(pieces, last)
                        pieces.append(piece)
                        last, size = read, len(piece) if is_full else size + len(piece)
                        if not is_sent:
                            if self._protocol.starts_anywhere:  # the entry is encoded again
                                pieces.clear()
                                read = self.position
                            return read, False
                        if is_full:
                            await asyncio.sleep(0)  # entries of other requests are written between
        except ClientError:
            self._write_pieces(pieces, last)  # what comes before the fault is good
            raise
        return read, self._write_pieces(pieces, last)

    def _write_pieces(self, pieces: list[bytes], last: EntryId) -> bool:
        """Write encoded entries, and forget them. Returns whether more can be written."""
        if not pieces:
            return True
        data = self._protocol.frame(pieces, last)
        self._tails.meter.add(len(pieces), len(data))
        self._page = min(len(pieces), _LARGEST_PAGE)
        pieces.clear()
        self.position = last
        return self.write(Frame(last, data))

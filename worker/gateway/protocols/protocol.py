"""What a streaming protocol is: a pure function from the entries of one log, from its start, to bytes on the wire.

Replay, resume and live delivery run the same function, so their bytes are the same. Equal protocols share the frames
of a request: an entry is encoded once, whatever the number of its readers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import msgspec

from ...contract.entries import AnyEntry
from ...contract.ids import EntryId

Message: TypeAlias = dict[str, Any]
"""A message of ASGI. Nobody changes one after its creation, since the streams of a request share it."""


class Frame(msgspec.Struct, gc=False):
    """What one entry, or several in a row, add to the wire.

    It is a struct that the garbage collector ignores, since tails keep hundreds of thousands of them.
    """

    last: EntryId
    data: bytes
    entries: int = 1
    message: Message | None = None
    """The message of ASGI that sends the frame, once a connection has needed one. All others share it."""

    @property
    def chunk(self) -> bytes:
        """The frame as a chunk of HTTP/1.1, for connections that are written to directly."""
        return b"%x\r\n%b\r\n" % (len(self.data), self.data)


class StreamProblem(Protocol):
    """An error as the API reports it."""

    @property
    def status(self) -> int: ...
    @property
    def code(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def is_temporary(self) -> bool: ...


class Encoder(Protocol):
    """Encodes the entries of one log, in order."""

    @property
    def is_over(self) -> bool:
        """Whether the stream ends here, though the log may go on: later entries add nothing."""

    def encode(self, entry: AnyEntry) -> bytes:
        """Return what an entry adds to the wire; b"" if nothing. The result depends only on the entries so far."""


@dataclass(frozen=True)
class StreamProtocol(ABC):
    """A protocol with its options, which are the fields of a subclass. Equal ones share their frames."""

    name: ClassVar[str]
    """The label of its metrics."""
    starts_anywhere: ClassVar[bool] = False
    """Whether encoding may begin after any entry. Otherwise it begins with the log, and a reader that comes back skips
    what it has."""
    joins_writes: ClassVar[bool] = True
    """Whether frames that follow each other may be written at once, since the wire is a stream of bytes: the body of a
    response. A connection may then be written to directly."""

    @abstractmethod
    def new_encoder(self) -> Encoder:
        """Return an encoder for one log."""

    def frame(self, pieces: Sequence[bytes], last: EntryId) -> bytes:  # noqa: ARG002 - native frames name the last entry
        """Return the frame of one or several results of the encoder, none of them empty. `last` is the last entry."""
        return b"".join(pieces)

    def message(self, frame: bytes) -> Message:
        """Return the message of ASGI that sends a frame."""
        return {"type": "http.response.body", "body": frame, "more_body": True}

    def heartbeat(self, text: str) -> bytes:
        """Return a comment, which keeps proxies from closing the connection; b"" if something else does.

        Readers ignore it.
        """
        return b": %b\n\n" % text.encode()

    def interrupted(self) -> bytes:
        """Return what ends a stream that the gateway must stop in the middle, so that no reader takes it as whole."""
        return b""

    @abstractmethod
    def failed(self, problem: StreamProblem) -> bytes:
        """Return what ends a stream after an error of the log: it has expired, lacks entries, or is not available."""


def without_events(piece: bytes, count: int) -> tuple[bytes, int]:
    """Drop the first `count` events of server-sent events; returns the rest, and how many are still to be dropped."""
    while count and piece:
        _, _, piece = piece.partition(b"\n\n")
        count -= 1
    return piece, count

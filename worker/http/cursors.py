"""What of an event stream a caller has received, and the headers that ask a gateway for the rest. No I/O."""

import re
import secrets
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

INTERRUPTED = "interrupted"
"""The code of the error that ends a stream of a gateway which must stop. The answer itself goes on."""

_INTERRUPTED = re.compile(rb'^data: \{"error":.*"code": ?"%b"' % INTERRUPTED.encode(), re.MULTILINE)
_DATA = re.compile(rb"^data:", re.MULTILINE)
_LAST_OF_CHAT = re.compile(rb'^data: (\[DONE\]|\{"error":)', re.MULTILINE)
_ID = re.compile(rb"^id: ?(.*)$", re.MULTILINE)


@dataclass
class StreamCursor:
    """How far a caller has received one event stream. It passes on whole events only, so each is received once."""

    is_chat: bool
    """Whether the stream is a chat completion, which has a last frame. A native stream ends with the status 204."""
    frames: int = 0
    """The number of events with data that were passed on."""
    last_id: str = ""
    """The last id of a native stream."""
    is_over: bool = False
    """Whether the last frame of a chat completion was passed on."""
    is_interrupted: bool = False
    """Whether the gateway has ended the stream, and not the answer, since `reconnected`."""
    _rest: bytes = b""

    def feed(self, data: bytes) -> bytes:
        """The whole events of the bytes that arrived until now. The rest of an event is kept until it is whole."""
        if self.is_interrupted:
            return b""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for number, event in enumerate(events):
            if _INTERRUPTED.search(event):
                self.is_interrupted = True
                del events[number:]
                break
            if _DATA.search(event):
                self.frames += 1
                if found := _ID.search(event):
                    self.last_id = found[1].decode()
                self.is_over = self.is_over or (self.is_chat and _LAST_OF_CHAT.search(event) is not None)
        return b"".join(event + b"\n\n" for event in events)

    def reconnected(self) -> None:
        """Drop the part of an event that a broken connection left."""
        self._rest = b""
        self.is_interrupted = False

    def headers(self) -> Mapping[str, str]:
        """The headers that ask for what comes after this cursor."""
        if self.is_chat:
            return {"Relay-After": str(self.frames)} if self.frames else {}
        return {"Last-Event-ID": self.last_id} if self.last_id else {}


@dataclass
class ResumeBackoff:
    """When to try again after a failure. Times are seconds on a clock of the caller."""

    limit: float
    """For how long to try without receiving a byte."""
    _failures: int = 0
    _failing_since: float | None = None

    def received(self, *, event: bool) -> None:
        """Bytes arrived; `event` if they completed an event, which makes the next delay short again."""
        self._failing_since = None
        if event:
            self._failures = 0

    def delay(self, now: float, retry_after: str = "") -> float | None:
        """How long to wait before the next try, or None after the limit. `retry_after` is the header of that name."""
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since > self.limit:
            return None
        asked = min(float(retry_after), 10.0) if retry_after.isdecimal() else 0.0
        delay = max(asked, min(5.0, 0.05 * 2.0**self._failures))
        self._failures += 1
        return delay * (1 + secrets.randbelow(500) / 1000)


@dataclass
class RepeatedCalls:
    """The keys of calls that failed before their answer, for the SDK that makes such a call again.

    An SDK sends no Idempotency-Key of its own. The header x-stainless-retry-count says that it repeats a call.
    """

    _keys: dict[bytes, deque[str]] = field(default_factory=lambda: defaultdict(deque))

    def key_for(self, body: bytes, retry_count: str) -> str:
        """A key for a call: that of a failed call with the same body if this is its repetition, else a new one."""
        if retry_count not in {"", "0"} and (keys := self._keys.get(body)):
            return keys.popleft()
        return secrets.token_hex(16)

    def failed(self, body: bytes, key: str) -> None:
        if len(self._keys) >= 100:
            self._keys.clear()
        self._keys[body].append(key)

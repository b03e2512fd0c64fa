"""Decodes server-sent events: converts bytes, as they arrive, into the data of complete events. No I/O.

The rules are those of the WHATWG HTML standard, 9.2.6 "Interpreting an event stream". Lines end only at CR, LF or CRLF:
`splitlines` would also split at U+2028 and U+0085, which may be inside the JSON. One space after the colon is dropped,
several data lines are joined by LF, and an event that is cut off by the end of the stream is dropped. In a stream of
completions, only the field `data` has content. `chat_stream.py`, which checks the first bytes of every response,
removes the BOM at the start of a stream.

Four rules go beyond the standard:

- A data line that is a whole chunk is an event by itself, and is returned when the next data line is there. Some
  servers end their events with one LF.
- The last event is not dropped if it is complete JSON.
- Errors are returned too, as `{"error": …}`: the data of an event named `error` or `exception`, and the value of a
  field of that name.
- JSON without `data:`, on one line or several, is returned unchanged.
"""

import json
import re

import msgspec

from ..error_bodies import decoded

_LF = 0x0A
_DONE = b"[DONE]"
MAX_EVENT_BYTES = 16 * 1024 * 1024
"""Enough for the first chunk of a prompt of a million tokens, which contains their ids."""

_ERRORS = frozenset({b"error", b"exception"})
_FIELDS = frozenset({b"id", b"retry"})
_AFTER_JSON = (b"data:", b"event:", b"error:")
"""Starts of lines that cannot be inside JSON: an object that has not ended before such a line is not JSON."""
_MAX_SKIPPED = 500
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_BLANK = b" \t"


class EventTooLarge(ValueError):
    """An event, or an unfinished line, is above the limit."""


class SSEDecoder:
    """Splits a byte stream into events. It buffers at most one unfinished event of `max_event_bytes`."""

    __slots__ = (
        "_after_cr", "_data", "_depth", "_has_data", "_held", "_is_between", "_is_error", "_is_late", "_json", "_max",
        "_objects", "_pending", "_size", "skipped",
    )  # fmt: skip

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._is_between = False  # nothing is buffered, and the stream has had an event
        self._after_cr = False  # the last chunk ended in CR, so that an LF at the start of the next belongs to it
        self._pending: list[bytes] = []  # pieces of an unfinished line
        self._data: list[bytes] = []  # data lines of an unfinished event
        self._json: list[bytes] = []  # lines of unfinished JSON without `data:`
        self._depth = 0  # how many brackets are open in that JSON
        self._size = 0  # bytes in the pieces of the line
        self._held = 0  # bytes in the data lines and the JSON, and one for each line, since empty lines take memory too
        self._is_error = False  # the unfinished event is named an error
        self._is_late = False  # the name came after the data that is buffered
        self._has_data = False
        self._objects = 0  # how many JSON objects came without `data:`
        self.skipped = b""
        """The first lines that belong to no event, which are quoted in the error if no answer came."""

    @property
    def holds_json(self) -> bool:
        """Whether JSON without `data:` has begun and not ended, such as a completion that is not streamed."""
        return bool(self._json) or (bool(self._pending) and self._pending[0].startswith((b"{", b"[")))

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that this chunk completes, in order.

        Raises:
            EventTooLarge: when an unfinished or finished event is above the limit.
        """
        # The fast path, at a quarter of the cost: complete events, mostly one, each of one line, as vLLM sends them.
        if (
            self._is_between and chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.find(b"\r") < 0
            and len(chunk) <= self._max
        ):  # fmt: skip
            if chunk.find(b"\n") == len(chunk) - 2:
                return [chunk[6:-2]]
            events = chunk[6:-2].split(b"\n\ndata: ")
            if b"\n" not in b"".join(events):  # a third of the cost of checking each event, or of counting
                return events
        events = self._by_lines(chunk)
        is_buffering = self._pending or self._data or self._json or self._after_cr or self._is_error
        self._is_between = self._has_data and not is_buffering
        return events

    def end(self) -> list[bytes]:
        """The events that the end of the stream completes: complete JSON that lacks only its line ends.

        A single object without `data:`, if nothing else came, is a completion that is not streamed: `[DONE]` is added.
        Other unfinished lines go to `skipped`.
        """
        events = self._events([b"".join(self._pending)] if self._pending else [])
        self._pending.clear()
        if self._json:
            self._give_up_json()
        for event in self._events([b""]):
            if _is_json(event):
                events.append(event)
            else:
                self._skip(event)
        if self._objects == 1 and not self._has_data:
            self._objects = 0
            events.append(_DONE)
        return events

    def _by_lines(self, chunk: bytes) -> list[bytes]:
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk[0] == _LF:
                chunk = chunk[1:]
        if b"\r" in chunk:
            self._after_cr = chunk[-1] == 0x0D
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in chunk:
            if chunk:
                self._pending.append(chunk)
                self._grow(len(chunk))
            return []
        lines = chunk.split(b"\n")
        if self._pending:
            self._pending.append(lines[0])
            lines[0] = b"".join(self._pending)
            self._pending.clear()
        rest = lines.pop()
        events = self._events(lines)
        if rest:
            self._pending.append(rest)
        self._size = 0
        self._grow(len(rest))
        return events

    def _events(self, lines: list[bytes]) -> list[bytes]:
        events: list[bytes] = []
        data = self._data
        for line in lines:
            if self._json:
                if not line.startswith(_AFTER_JSON):
                    self._add_json(line, events)
                    continue
                self._give_up_json()
            if not line:
                if data:
                    event = data[0] if len(data) == 1 else b"\n".join(data)
                    data.clear()
                    self._held = 0
                    if len(event) > self._max:
                        raise self._too_large()
                    events.append(_as_error(event) if self._is_error else event)
                self._is_error = self._is_late = False
            elif line.startswith(b"data:"):
                self._add_data(line[6:] if line[5:6] == b" " else line[5:], events)
            elif line == b"data":
                self._add_data(b"", events)
            elif not line.startswith(b":"):
                self._add_other(line, events)
        return events

    def _add_data(self, line: bytes, events: list[bytes]) -> None:
        self._has_data = True
        self._end_held_line(events)
        if line == _DONE and not self._data and not self._is_error:
            events.append(line)
            return
        self._data.append(line)
        self._held += len(line) + 1

    def _end_held_line(self, events: list[bytes]) -> None:
        """Return a buffered data line that is a whole chunk, without a blank line, since the next line begins."""
        if len(self._data) == 1 and _is_chunk(self._data[0]):
            event = self._data.pop()
            self._held = 0
            if len(event) > self._max:
                raise self._too_large()
            events.append(_as_error(event) if self._is_error and not self._is_late else event)
            self._is_late = False

    def _add_other(self, line: bytes, events: list[bytes]) -> None:
        """Handle a line of another field, or of no field."""
        name, _, value = line.partition(b":")
        if name in _ERRORS:
            self._end_held_line(events)
            events.append(_as_error(value.strip()))
        elif name == b"event":
            is_error = value.strip() in _ERRORS
            self._is_late = is_error and not self._is_error and bool(self._data)
            self._is_error = is_error or (self._is_error and bool(self._data))
        elif _begins_json(text := line.strip(_BLANK)):
            self._end_held_line(events)
            if not self._data:
                self._add_json(text, events)
        elif name not in _FIELDS:
            self._skip(line)

    def _add_json(self, line: bytes, events: list[bytes]) -> None:
        """Add the next line of JSON without `data:`, which may be its last."""
        self._json.append(line)
        self._held += len(line) + 1
        self._depth += _opened(line)
        if self._depth <= 0:
            events.append(b"\n".join(self._json).strip(_BLANK))
            self._objects += 1
            self._clear_json()

    def _give_up_json(self) -> None:
        """Skip the buffered lines, which began as JSON and are not JSON."""
        for line in self._json:
            self._skip(line)
        self._clear_json()

    def _clear_json(self) -> None:
        self._json.clear()
        self._depth = self._held = 0

    def _skip(self, line: bytes) -> None:
        if len(self.skipped) < _MAX_SKIPPED:
            self.skipped += line[:_MAX_SKIPPED] + b"\n"

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size + self._held > self._max + 1:  # the end of the last line does not count
            raise self._too_large()

    def _too_large(self) -> EventTooLarge:
        return EventTooLarge(f"an event of the stream is larger than {self._max} bytes")


def _begins_json(line: bytes) -> bool:
    """Whether a line is a JSON object or list, or the first line of one."""
    return line.startswith((b"{", b"[")) and (line.endswith((b"}", b"]")) or _opened(line) > 0)


def _opened(line: bytes) -> int:
    """How many brackets a line of JSON leaves open; negative if it closes more. A JSON string is on one line."""
    line = _STRING.sub(b"", line)
    return line.count(b"{") + line.count(b"[") - line.count(b"}") - line.count(b"]")


def _is_json(data: bytes) -> bool:
    """Whether data may be a chunk. Like the parser, this accepts more than a strict decoder does."""
    try:
        json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return data == _DONE
    return True


def _is_chunk(line: bytes) -> bool:
    return line == _DONE or (line.startswith(b"{") and _is_json(line))


def _as_error(data: bytes) -> bytes:
    """The data of an event named `error` or `exception`, in the shape of other errors."""
    value = decoded(data)
    if isinstance(value, dict) and "error" in value:
        return msgspec.json.encode(value)
    is_text = value is None and data != b"null"
    return msgspec.json.encode({"error": data.decode("utf-8", "replace") if is_text else value})

"""Server-sent events without I/O: bytes in as they arrive, the data of whole events out.

The rules are those of the WHATWG HTML standard, 9.2.6 "Interpreting an event stream": lines end at CR, LF or CRLF
and at nothing else (U+2028 and U+0085 may stand inside the JSON, where `splitlines` would cut), one space after the
colon is dropped, several data lines are joined by LF, and an event that the end of the stream cuts off is dropped.
Fields other than `data` carry nothing in a stream of completions. The BOM at the start of a stream is taken away by
`chat_stream.py`, which looks at the first bytes of every answer.

Four things go beyond the standard. A data line that is a whole chunk is an event of its own, and goes out when the next
one is there: some servers end their events with one LF. The last event is not dropped where it is whole JSON. Errors
come out too: the data of an event that is called `error` or `exception`, and the value of a field of that name, as
`{"error": …}`. So does JSON without `data:`, on one line or over several, as it is.
"""

import json
import re

import msgspec

from ..error_bodies import decoded

_LF = 0x0A
_DONE = b"[DONE]"
MAX_EVENT_BYTES = 16 * 1024 * 1024
"""Room for the first chunk of a prompt of a million tokens, whose ids stand in it."""


_ERRORS = frozenset({b"error", b"exception"})
_FIELDS = frozenset({b"id", b"retry"})
_AFTER_JSON = (b"data:", b"event:", b"error:")
"""Lines that cannot be inside JSON: an object that has no end by then is none."""
_MOST_PASSED_OVER = 500
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_BLANK = b" \t"


class EventTooLarge(ValueError):
    """An event, or a line that does not end, is above the limit."""


class SSEDecoder:
    """Splits a byte stream into events; it keeps at most one unfinished event of `max_event_bytes`."""

    __slots__ = (
        "_after_cr", "_data", "_depth", "_has_data", "_held", "_is_between", "_is_error", "_is_late", "_json", "_max",
        "_objects", "_pending", "_size", "skipped",
    )  # fmt: skip

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._is_between = False  # nothing is held of what came before, and it is a stream of events
        self._after_cr = False  # the last read ended in CR, so an LF that comes next belongs to it
        self._pending: list[bytes] = []  # pieces of a line whose end has not come
        self._data: list[bytes] = []  # data lines of an event whose end has not come
        self._json: list[bytes] = []  # lines of JSON without `data:` whose end has not come
        self._depth = 0  # of brackets that are open in it
        self._size = 0  # bytes in the pieces
        self._held = 0  # bytes in the data lines and in the JSON, each with its end: empty ones take room too
        self._is_error = False  # the event whose end has not come is called an error
        self._is_late = False  # it is called so only behind the data that is held
        self._has_data = False
        self._objects = 0  # that came without `data:`
        self.skipped = b""
        """The first lines that are of no event, for errors that say what came in place of an answer."""

    @property
    def holds_json(self) -> bool:
        """Whether JSON without `data:` has begun and not ended, such as a completion that is no stream."""
        return bool(self._json) or (bool(self._pending) and self._pending[0].startswith((b"{", b"[")))

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that this chunk completes, in order.

        Raises:
            EventTooLarge: when an unfinished or finished event is above the limit.
        """
        # What vLLM nearly always sends, at a quarter of the price: whole events, mostly one, each of one line.
        if (
            self._is_between and chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and chunk.find(b"\r") < 0
            and len(chunk) <= self._max
        ):  # fmt: skip
            if chunk.find(b"\n") == len(chunk) - 2:
                return [chunk[6:-2]]
            events = chunk[6:-2].split(b"\n\ndata: ")
            if b"\n" not in b"".join(events):  # at a third of the price of looking into each, or of counting
                return events
        events = self._by_lines(chunk)
        is_holding = self._pending or self._data or self._json or self._after_cr or self._is_error
        self._is_between = self._has_data and not is_holding
        return events

    def end(self) -> list[bytes]:
        """What the end of the stream completes, where nothing but its line ends is missing: it is whole JSON.

        One object without `data:` is a whole completion where nothing else came: `[DONE]` follows it. What is not
        completed goes to `skipped`.
        """
        events = self._events([b"".join(self._pending)] if self._pending else [])
        self._pending.clear()
        if self._json:
            self._give_up_json()
        for event in self._events([b""]):
            if _is_json(event):
                events.append(event)
            else:
                self._pass_over(event)
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
                    self._take_json(line, events)
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
                self._take_data(line[6:] if line[5:6] == b" " else line[5:], events)
            elif line == b"data":
                self._take_data(b"", events)
            elif not line.startswith(b":"):
                self._take_other(line, events)
        return events

    def _take_data(self, line: bytes, events: list[bytes]) -> None:
        self._has_data = True
        self._let_go(events)
        if line == _DONE and not self._data and not self._is_error:
            events.append(line)
            return
        self._data.append(line)
        self._held += len(line) + 1

    def _let_go(self, events: list[bytes]) -> None:
        """Something else begins. A data line that is held and is a whole chunk needs no blank line."""
        if len(self._data) == 1 and _is_chunk(self._data[0]):
            event = self._data.pop()
            self._held = 0
            if len(event) > self._max:
                raise self._too_large()
            events.append(_as_error(event) if self._is_error and not self._is_late else event)
            self._is_late = False

    def _take_other(self, line: bytes, events: list[bytes]) -> None:
        """A line of another field, or of none."""
        name, _, value = line.partition(b":")
        if name in _ERRORS:
            self._let_go(events)
            events.append(_as_error(value.strip()))
        elif name == b"event":
            is_error = value.strip() in _ERRORS
            self._is_late = is_error and not self._is_error and bool(self._data)
            self._is_error = is_error or (self._is_error and bool(self._data))
        elif _begins_json(text := line.strip(_BLANK)):
            self._let_go(events)
            if not self._data:
                self._take_json(text, events)
        elif name not in _FIELDS:
            self._pass_over(line)

    def _take_json(self, line: bytes, events: list[bytes]) -> None:
        """The next line of JSON that stands there without `data:`; perhaps its last."""
        self._json.append(line)
        self._held += len(line) + 1
        self._depth += _opened(line)
        if self._depth <= 0:
            events.append(b"\n".join(self._json).strip(_BLANK))
            self._objects += 1
            self._clear_json()

    def _give_up_json(self) -> None:
        """What began as JSON is none."""
        for line in self._json:
            self._pass_over(line)
        self._clear_json()

    def _clear_json(self) -> None:
        self._json.clear()
        self._depth = self._held = 0

    def _pass_over(self, line: bytes) -> None:
        if len(self.skipped) < _MOST_PASSED_OVER:
            self.skipped += line[:_MOST_PASSED_OVER] + b"\n"

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size + self._held > self._max + 1:  # the end of an event's last line is no part of it
            raise self._too_large()

    def _too_large(self) -> EventTooLarge:
        return EventTooLarge(f"an event of the stream is larger than {self._max} bytes")


def _begins_json(line: bytes) -> bool:
    """Whether a line is an object or a list, or the first line of one that has more lines."""
    return line.startswith((b"{", b"[")) and (line.endswith((b"}", b"]")) or _opened(line) > 0)


def _opened(line: bytes) -> int:
    """How many brackets a line of JSON leaves open; below 0 where it closes more. No string of JSON spans lines."""
    line = _STRING.sub(b"", line)
    return line.count(b"{") + line.count(b"[") - line.count(b"}") - line.count(b"]")


def _is_json(data: bytes) -> bool:
    """Whether it is what a chunk may be, however odd: the parser reads more than a strict decoder does."""
    try:
        json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return data == _DONE
    return True


def _is_chunk(line: bytes) -> bool:
    return line == _DONE or (line.startswith(b"{") and _is_json(line))


def _as_error(data: bytes) -> bytes:
    """The data of an event that is called an error, in the shape of other errors."""
    value = decoded(data)
    if isinstance(value, dict) and "error" in value:
        return msgspec.json.encode(value)
    is_text = value is None and data != b"null"
    return msgspec.json.encode({"error": data.decode("utf-8", "replace") if is_text else value})

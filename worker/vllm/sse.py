"""Server-sent events without I/O: bytes in as they arrive, the data of whole events out.

The rules are those of the WHATWG HTML standard, 9.2.6 "Interpreting an event stream": lines end at CR, LF or CRLF
and at nothing else (U+2028 and U+0085 may stand inside the JSON, where `splitlines` would cut), one space after the
colon is dropped, several data lines are joined by LF, a BOM at the start is passed over, and an event that the end
of the stream cuts off is dropped. Fields other than `data` carry nothing in a stream of completions.

Three things go beyond the standard. Data lines of one event that are whole chunks, each of its own, are several events.
The last event is not dropped where it is whole JSON. Errors come out too: the data of an event that is called `error`
or `exception`, and the value of a field of that name, as `{"error": …}`, and a line of JSON without `data:` as it is.
"""

import json

import msgspec

from worker.vllm.error_bodies import decoded

_BOM = b"\xef\xbb\xbf"
_LF = 0x0A
_DONE = b"[DONE]"
MAX_EVENT_BYTES = 16 * 1024 * 1024
"""Room for the first chunk of a prompt of a million tokens, whose ids stand in it."""


_ERRORS = frozenset({b"error", b"exception"})
_FIELDS = frozenset({b"id", b"retry"})
_MOST_PASSED_OVER = 500


class EventTooLarge(ValueError):
    """An event, or a line that does not end, is above the limit."""


class SSEDecoder:
    """Splits a byte stream into events; it keeps at most one unfinished event of `max_event_bytes`."""

    __slots__ = (
        "_after_cr", "_data", "_held", "_is_between", "_is_error", "_max", "_pending", "_size", "_start", "passed_over",
    )  # fmt: skip

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._is_between = False  # nothing is held of what came before, and no BOM can come
        self._start: bytes | None = b""  # the bytes so far that may be a BOM; None once that is settled
        self._after_cr = False  # the last read ended in CR, so an LF that comes next belongs to it
        self._pending: list[bytes] = []  # pieces of a line whose end has not come
        self._data: list[bytes] = []  # data lines of an event whose end has not come
        self._size = 0  # bytes in the pieces
        self._held = 0  # bytes in the data lines, each with its end: empty ones take room too
        self._is_error = False  # the event whose end has not come is called an error
        self.passed_over = b""
        """The first lines that are of no event, for who has to say what came in place of an answer."""

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
        self._is_between = False
        events = self._by_lines(chunk if self._start is None else self._without_bom(chunk))
        self._is_between = self._start is None and not (self._pending or self._data or self._after_cr or self._is_error)
        return events

    def end(self) -> list[bytes]:
        """The last event of a stream that has ended, where nothing but its line ends is missing: it is whole JSON."""
        events = self._events([b"".join(self._pending), b""])
        self._pending.clear()
        return [event for event in events if _is_json(event)]

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
        events = []
        data = self._data
        for line in lines:
            if not line:
                if data:
                    event = data[0] if len(data) == 1 else b"\n".join(data)
                    whole = data.copy() if len(data) > 1 and all(map(_is_chunk, data)) else []
                    data.clear()
                    self._held = 0
                    if len(event) > self._max:
                        raise self._too_large()
                    events += whole or [_as_error(event) if self._is_error else event]
                self._is_error = False
            elif line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._held += len(data[-1]) + 1
            elif line == b"data":
                data.append(b"")
                self._held += 1
            elif not line.startswith(b":"):
                self._take_other(line, events)
        return events

    def _take_other(self, line: bytes, events: list[bytes]) -> None:
        """A line of another field, or of none."""
        name, _, value = line.partition(b":")
        if name in _ERRORS:
            events.append(_as_error(value.strip()))
        elif name == b"event":
            self._is_error = value.strip() in _ERRORS
        elif line.startswith((b"{", b"[")) and line.endswith((b"}", b"]")) and not self._data:
            events.append(line)
        elif name not in _FIELDS and len(self.passed_over) < _MOST_PASSED_OVER:
            self.passed_over += line[:_MOST_PASSED_OVER] + b"\n"

    def _without_bom(self, chunk: bytes) -> bytes:
        start = (self._start or b"") + chunk
        if len(start) < len(_BOM) and _BOM.startswith(start):
            self._start = start
            return b""
        self._start = None
        return start.removeprefix(_BOM)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size + self._held > self._max + 1:  # the end of an event's last line is no part of it
            raise self._too_large()

    def _too_large(self) -> EventTooLarge:
        return EventTooLarge(f"an event of the stream is larger than {self._max} bytes")


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
    return msgspec.json.encode({"error": data.decode("utf-8", "replace") if value is None else value})

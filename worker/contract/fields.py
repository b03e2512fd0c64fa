"""How the fields of entries are read from text, and what makes one unreadable.

Strict is what a worker relies on: an id or a name that becomes a key or a command, a count, the ids of tokens. Lenient
is whatever a server says beside: a number that is none is no reason not to read the rest.
"""

import json
import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import msgspec

from .ids import SEAL, EntryId
from .keys import is_queue_name

Reader: TypeAlias = Callable[[str], object]
"""Reads the text of a field. It raises ValueError, MsgspecError or RecursionError where that cannot be read."""


def _count(text: str) -> int:
    """A number of things.

    Raises:
        ValueError: when it is no whole number, or below 0.
    """
    if (count := int(text)) < 0:
        raise ValueError(f"{text} is below 0")
    return count


def _stream_id(text: str) -> str:
    """An id of an entry, as text.

    Raises:
        ValueError: when Redis has no such id; a command that held it would fail each time.
    """
    if text and max(EntryId.parse(text)) > SEAL.n:
        raise ValueError(f"{text[:50]!r} is above the greatest id")
    return text


def _queue(text: str) -> str:
    """The name of a queue.

    Raises:
        ValueError: when no queue has such a name.
    """
    if text and not is_queue_name(text):
        raise ValueError(f"{text[:80]!r} is no name of a queue")
    return text


def _time(text: str) -> int:
    """Unix seconds or milliseconds; 0 where a server or another writer has something else, for nothing hangs on it."""
    try:
        return int(text)
    except ValueError:
        return 0


def _json_reader(kind: type | None = None) -> Reader:
    """Reads a field that is JSON, of one type if a reader relies on that.

    What msgspec cannot decode and others can is no reason not to read the rest: a number that is too large, NaN and
    Infinity are null, as in JavaScript's own JSON, and half of a surrogate pair is a question mark.
    """
    decode: Callable[[str | bytes], object] = msgspec.json.Decoder(kind or Any).decode

    def read(text: str) -> object:
        try:
            return decode(text)
        except msgspec.DecodeError as error:
            try:
                value = json.loads(text, parse_float=_number, parse_int=_whole_number, parse_constant=lambda _: None)
            except ValueError:
                raise error from None
            return decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

    return read


def _number(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _whole_number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:  # of more digits than Python reads
        return None


_read_object = _json_reader(dict)


def _usage(text: str) -> object:
    """The tokens that were used. A count that is no whole number is left out, so that others may reckon with them."""
    usage = cast("dict[str, object]", _read_object(text))
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        if isinstance(count := usage.get(name), float) and count.is_integer():
            usage[name] = int(count)
        elif not isinstance(count, int) or isinstance(count, bool):
            usage.pop(name, None)
    return usage


READERS: dict[str, Reader] = {
    "v": int,
    "time": _time,
    "index": int,
    "created": _time,
    "deadline": _time,
    "attempt": int,
    "delivery": _count,
    "prompt_tokens": int,
    "cut": _count,
    "usage": _usage,
    "timings": _json_reader(dict),
    "extra": _json_reader(dict),
    "tool_calls": _json_reader(list[dict[str, Any]]),
    "token_ids": msgspec.json.Decoder(list[int]).decode,
    "forgets": msgspec.json.Decoder(list[str]).decode,
    "logprobs": _json_reader(),
    "stop_reason": _json_reader(),
}
"""By their names, the fields that are JSON on the wire."""
TEXTS: dict[str, Reader] = {"queue": _queue, "job": _stream_id, "after": _stream_id}
"""Texts that others make a key or a command of; any other text is taken as it is."""

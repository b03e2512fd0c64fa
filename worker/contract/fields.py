"""Readers of the fields of entries: each converts the text of a field, or rejects the entry as unreadable.

Fields that a worker relies on are read strictly: ids and names that become keys or parts of commands, counts, the ids
of tokens. Fields that only repeat what a server sent are read leniently, so that a bad number does not make the rest
unreadable.
"""

import json
import math
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeAlias, cast

import msgspec

from .ids import SEAL, EntryId
from .keys import is_queue_name

_MOST_LEVELS = 128
"""Levels of nested lists and objects in a field. Python cannot join pieces of more than 300 (`accumulation.py`).
Workers write at most 100."""
_TOO_DEEP = f"it nests more than {_MOST_LEVELS} levels of lists and objects"

Reader: TypeAlias = Callable[[str], object]
"""Reads the text of a field. It raises ValueError, MsgspecError or RecursionError for a text that cannot be read."""


def _count(text: str) -> int:
    """Read a count.

    Raises:
        ValueError: when the text is not a whole number, or the number is below 0.
    """
    if (count := int(text)) < 0:
        raise ValueError(f"{text} is below 0")
    return count


def _stream_id(text: str) -> str:
    """Check the id of a stream entry; returns it as text.

    Raises:
        ValueError: when Redis cannot have such an id. Every command with this id would fail.
    """
    if text and max(EntryId.parse(text)) > SEAL.n:
        raise ValueError(f"{text[:50]!r} is above the greatest id")
    return text


def _queue(text: str) -> str:
    """Check the name of a queue.

    Raises:
        ValueError: when no queue can have such a name.
    """
    if text and not is_queue_name(text):
        raise ValueError(f"{text[:80]!r} is not a name of a queue")
    return text


def _time(text: str) -> int:
    """Read Unix seconds or milliseconds; 0 for any other text, since nothing depends on these times."""
    try:
        return int(text)
    except ValueError:
        return 0


def nests_deeper(value: object, levels: int) -> bool:
    """Whether a decoded JSON value has more than this number of levels of nested lists and objects."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inside = chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
        level = [one for one in inside if isinstance(one, dict | list)]
    return bool(level)


def _json_reader(kind: type | None = None) -> Reader:
    """A reader of a field that is JSON; `kind` is its type, if readers rely on that.

    msgspec rejects some JSON that other libraries write. Python's `json` reads it: a number that is too large, NaN and
    Infinity become null, as JavaScript writes them, and half of a surrogate pair becomes a question mark. JSON that is
    nested too deeply is rejected.
    """
    decode: Callable[[str | bytes], object] = msgspec.json.Decoder(kind or Any).decode

    def read(text: str) -> object:
        try:
            value = decode(text)
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None
        except msgspec.DecodeError as error:
            try:
                value = json.loads(text, parse_float=_number, parse_int=_whole_number, parse_constant=lambda _: None)
            except RecursionError:
                raise ValueError(_TOO_DEEP) from None
            except ValueError:
                raise error from None
            value = decode(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
        if text.count("[") + text.count("{") > _MOST_LEVELS and nests_deeper(value, _MOST_LEVELS):
            raise ValueError(_TOO_DEEP)
        return value

    return read


def _number(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _whole_number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:  # more digits than Python converts
        return None


_read_object = _json_reader(dict)


def _usage(text: str) -> object:
    """Read the numbers of tokens that were used. A count that is not a whole number is left out."""
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
"""The readers of fields that are not text, by the field's name."""
TEXTS: dict[str, Reader] = {"queue": _queue, "job": _stream_id, "after": _stream_id}
"""The readers of texts that become a key or a part of a command. Other texts are not checked."""

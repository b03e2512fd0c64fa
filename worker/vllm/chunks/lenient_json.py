"""Decodes the JSON of chunks, and replaces what strict decoders refuse. No I/O.

Servers send bytes that are not UTF-8, characters split in two, and numbers of any size. Every reader of a log must be
able to decode the result.
"""

import json
import re
from typing import Any

import msgspec

from ...contract.fields import nests_deeper
from .shapes import RawObject

_decode = msgspec.json.decode
_decode_object = msgspec.json.Decoder(RawObject).decode

_LONGEST_INTEGER = 300
"""Digits. A longer integer does not fit into a float, to which most readers convert it."""
_MOST_LEVELS = 100
"""Levels of nested lists and objects. Decoders in Python fail at 1,000 levels, less the depth of their callers."""

_TWO_DIGITS = re.compile(rb"[0-9][0-9]")


class ChunkDecoder:
    """Decodes the chunks of one stream into objects whose fields are still JSON.

    Bytes that are not UTF-8 become replacement characters. Halves of surrogate pairs do too, but two halves in two
    chunks of a choice become one character. NaN, Infinity, numbers that are too large for a float, integers of more
    than 300 digits, and values that are nested too deeply for some readers become null.
    """

    __slots__ = ("_halves",)

    def __init__(self) -> None:
        self._halves: dict[
            tuple[str, ...], str
        ] = {}  # the first half of a pair, by the path of the text that ended with it

    @property
    def holds_half(self) -> bool:
        """Whether half a character waits for its other half."""
        return bool(self._halves)

    def decode(self, data: bytes) -> RawObject:
        """The fields of a chunk, undecoded.

        Raises:
            DecodeError: when the data is not a JSON object.
            RecursionError: when the data is nested too deeply.
        """
        try:
            value = _decode(data)  # the fields that stay JSON too, since readers of the log decode them
            if not self._halves and is_readable(value, data):
                return _decode_object(data)
            if _may_have_long_number(data):
                value = _leniently_decoded(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = _leniently_decoded(data)
        if isinstance(value, dict):
            self._join_halves(value)
        value = _flattened(value, _MOST_LEVELS)
        return _decode_object(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

    def _join_halves(self, chunk: dict[str, Any]) -> None:
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index = str(choice.get("index") or 0)
                for name in choice.keys() & {"delta", "text"}:
                    choice[name] = self._joined(choice[name], (index, name))
                if choice.get("finish_reason"):
                    self._release(choice, index)

    def _joined(self, value: Any, path: tuple[str, ...]) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(value, str):
            return self._text(value, path)
        if isinstance(value, list):  # a piece of a tool call has the index of its call
            places = (str(one.get("index", n) if isinstance(one, dict) else n) for n, one in enumerate(value))
            return [self._joined(one, (*path, place)) for one, place in zip(value, places, strict=True)]
        if isinstance(value, dict):
            return {name: self._joined(one, (*path, name)) for name, one in value.items()}
        return value

    def _text(self, text: str, path: tuple[str, ...]) -> str:
        whole = (self._halves.pop(path, "") + text).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        if not "\ud800" <= whole[-1:] <= "\udbff":
            return whole
        self._halves[path] = whole[-1]
        return whole[:-1]

    def _release(self, choice: dict[str, Any], index: str) -> None:
        """Put the halves of a choice back into its text at its end, since the other halves will not come."""
        for path in [path for path in self._halves if path[0] == index]:
            half, (_, name, *inner) = self._halves.pop(path), path
            holder = choice if name == "text" else choice.get("delta")
            if name == "delta" and not holder:
                holder = choice["delta"] = {}
            field = inner[0] if inner else name
            if len(inner) < 2 and isinstance(holder, dict) and isinstance(text := holder.get(field) or "", str):
                holder[field] = text + half


def _leniently_decoded(data: bytes) -> Any:  # noqa: ANN401 - any JSON
    try:
        return json.loads(
            data.decode("utf-8", "replace"),
            parse_constant=lambda _: None, parse_float=_float_or_null, parse_int=_int_or_null,
        )  # fmt: skip
    except (ValueError, RecursionError):
        raise msgspec.DecodeError("not JSON") from None


def is_readable(value: Any, data: bytes) -> bool:  # noqa: ANN401 - any JSON
    """Whether every reader can decode the JSON in `data`, which Python decoded to `value`."""
    return not (_is_deep(value, data) or _may_have_long_number(data))


def _may_have_long_number(data: bytes) -> bool:
    """Whether the data may contain more than 300 digits in a row: then two of every 150th byte are digits."""
    return len(data) > _LONGEST_INTEGER and _TWO_DIGITS.search(data[:: _LONGEST_INTEGER // 2]) is not None


def _is_deep(value: Any, data: bytes) -> bool:  # noqa: ANN401
    """Whether a value, decoded from `data`, has too many levels."""
    return data.count(b"[") + data.count(b"{") > _MOST_LEVELS and nests_deeper(value, _MOST_LEVELS)


def _flattened(value: Any, levels: int) -> Any:  # noqa: ANN401
    """A value with null in place of everything below this number of levels."""
    if not isinstance(value, dict | list):
        return value
    if not levels:
        return None
    if isinstance(value, list):
        return [_flattened(one, levels - 1) for one in value]
    return {name: _flattened(one, levels - 1) for name, one in value.items()}


def _float_or_null(text: str) -> float | None:
    number = float(text)
    return number if abs(number) < float("inf") else None


def _int_or_null(text: str) -> int | None:
    return int(text) if len(text) <= _LONGEST_INTEGER else None

"""JSON in the canonical form of RFC 8785 (JCS), so that equal values are equal bytes in every language.

The text has no white space. Keys are sorted by their UTF-16 code units. Only the characters that JSON must escape are
escaped. Numbers are written as ECMAScript writes a double (ECMA-262, Number::toString): `1` for 1.0, `1e-7`, `1e+21`.
"""

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import msgspec

_EXACT = 2**53
"""Every whole number below this is exact as a double."""


def canonical_json(value: object) -> bytes:
    """A JSON value in the form of RFC 8785, as UTF-8.

    msgspec escapes strings as the RFC requires. Values that msgspec would write in another form are replaced first, in
    copies of the lists and objects.
    """
    top = [value]
    unread: list[Any] = [top]
    while unread:  # not recursive, since a request may be nested deeply
        container = unread.pop()
        for key, item in container.items() if type(container) is dict else enumerate(container):
            kind = type(item)
            if kind is str:
                continue
            if kind is float:
                container[key] = _number(item)
            elif kind is int:
                if not -_EXACT < item < _EXACT:
                    container[key] = _large_integer(item)
            elif kind is dict:
                container[key] = {name: item[name] for name in _sorted(item)}
                unread.append(container[key])
            elif kind is list or kind is tuple:
                container[key] = list(item)
                unread.append(container[key])
    return msgspec.json.encode(top[0])


def _sorted(names: Iterable[str]) -> list[str]:
    if "".join(names).isascii():
        return sorted(names)
    return sorted(names, key=lambda name: name.encode("utf-16-be"))


def _number(value: float) -> float | msgspec.Raw | None:
    size = abs(value)
    if size < 1e21:
        if value.is_integer():
            return int(value) if size < _EXACT else int(Decimal(repr(value)))
        return msgspec.Raw(f"{Decimal(repr(value)):f}".encode()) if 1e-6 <= size < 1e-5 else value
    return msgspec.Raw(repr(value).encode()) if math.isfinite(value) else None


def _large_integer(value: int) -> int | float | msgspec.Raw | None:
    try:
        return _number(float(value))
    except OverflowError:  # greater than every double: the RFC has no form for such a number
        return value

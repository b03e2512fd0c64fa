"""JSON in the canonical form of RFC 8785 (JCS), so that equal values are equal bytes in every language.

There is no white space; keys are sorted by their UTF-16 code units; only what JSON must escape is escaped; numbers are
as ECMAScript writes a double (ECMA-262, Number::toString): `1` for 1.0, `1e-7`, `1e+21`.
"""

import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import msgspec

_EXACT = 2**53
"""Every whole number below this is exact as a double."""


def canonical_json(value: object) -> bytes:
    """A JSON value as RFC 8785 writes it, in UTF-8.

    msgspec escapes strings as the RFC requires. Values that msgspec would write in another way are replaced first.
    """
    top = [value]
    unread: list[Any] = [top]
    while unread:  # not recursive, since a request may be nested deeply
        made = unread.pop()
        for place, item in made.items() if type(made) is dict else enumerate(made):
            kind = type(item)
            if kind is str:
                continue
            if kind is float:
                made[place] = _number(item)
            elif kind is int:
                if not -_EXACT < item < _EXACT:
                    made[place] = _large(item)
            elif kind is dict:
                made[place] = {name: item[name] for name in _sorted(item)}
                unread.append(made[place])
            elif kind is list or kind is tuple:
                made[place] = list(item)
                unread.append(made[place])
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


def _large(value: int) -> int | float | msgspec.Raw | None:
    try:
        return _number(float(value))
    except OverflowError:  # above all doubles: the RFC has no form for such a number
        return value

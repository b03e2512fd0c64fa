"""Durations, sizes and foreign texts as an operator reads them."""

import datetime as dt
import textwrap

_LATEST = 253_402_300_800_000
"""The year 10,000 in Unix ms."""

WIDTH = 80
"""The columns of a line that is printed for an operator."""

_UNITS = ("B", "KB", "MB", "GB", "TB")


def duration(seconds: float) -> str:
    """A duration in the largest unit that fits: `8 s`, `3 min`, `5 h`, `2 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """A number of bytes: `512 B`, `1.2 GB`."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if not unit else f"{count:.1f} {_UNITS[unit]}"


def instant(unix_ms: int) -> str:
    """A time, such as `2026-11-30 07:12:32Z`."""
    if not 0 < unix_ms < _LATEST:
        return "an unknown time"
    return dt.datetime.fromtimestamp(unix_ms / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def printable(text: str) -> str:
    """A text that others may have chosen, without characters that would control a terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def folded(text: str, indent: int = 0, width: int = WIDTH) -> list[str]:
    """A text in lines of at most `width` columns, of which all but the first are indented, without control characters.

    In a narrow terminal an indentation may take half of them.
    """
    indent = min(indent, width // 2)
    return textwrap.wrap(printable(text), width, subsequent_indent=" " * indent, break_on_hyphens=False)

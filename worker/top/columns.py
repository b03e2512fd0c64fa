"""Columns of a table and how its rows are filtered, sorted and fitted into a width. It does no I/O."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from rich.cells import cell_len

T = TypeVar("T")

Tone: TypeAlias = Literal["", "dim", "good", "warning", "error"]
"""How a cell is coloured. Nothing is said by the colour alone."""

SortValue: TypeAlias = float | str | None
"""What a column is sorted by: None if a row has no value, which sorts it to the end."""

_ROOMY = 100
"""The width from which on columns are two cells apart."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The text of a cell, its value for sorting, and its tone."""

    text: str
    value: SortValue = None
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """A column. Texts longer than its width are shortened, to no less than `least` cells.

    Where the width is too small, the column with the greatest `drop` is left out first, and one with 0 never.
    """

    label: str
    cell: Callable[[T], Cell]
    least: int = 0
    is_number: bool = False
    drop: int = 0


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """A row: what it is about, and its cells."""

    subject: T
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """What rows are sorted by: a column's number, or -1 for the order in which they came."""

    column: int = -1
    is_reversed: bool = False


def arranged(rows: Sequence[T], columns: Sequence[Column[T]], order: Order, text: str = "") -> list[Row[T]]:
    """The rows that have a text in one of their cells, sorted. Upper and lower case are the same."""
    found = [Row(subject, tuple(column.cell(subject) for column in columns)) for subject in rows]
    wanted = text.casefold()
    found = [row for row in found if any(wanted in cell.text.casefold() for cell in row.cells)]
    if order.column < 0:
        return found[::-1] if order.is_reversed else found
    with_value = [row for row in found if row.cells[order.column].value is not None]
    without = [row for row in found if row.cells[order.column].value is None]
    return sorted(with_value, key=lambda row: _rank(row.cells[order.column].value), reverse=order.is_reversed) + without


def _rank(value: SortValue) -> tuple[float, str]:
    return (0.0, value) if isinstance(value, str) else (value or 0.0, "")


def widths(columns: Sequence[Column[T]], rows: Sequence[Row[T]], available: int) -> list[int]:
    """The width of each column, so that all and the gaps between them fit; 0 for a column that is left out.

    Texts are shortened first, the longest of them most. Columns are left out if that does not suffice.
    """
    longest = [
        max([cell_len(column.label) + 1, *[cell_len(row.cells[number].text) for row in rows]])
        for number, column in enumerate(columns)
    ]
    shown = list(range(len(columns)))
    while True:
        found = {number: longest[number] for number in shown}
        over = sum(found.values()) + gap(available) * (len(shown) - 1) - available
        while over > 0:
            longer = [number for number in shown if 0 < columns[number].least < found[number]]
            if not longer:
                break
            found[max(longer, key=found.__getitem__)] -= 1
            over -= 1
        droppable = [number for number in shown if columns[number].drop]
        if over <= 0 or not droppable:
            return [found.get(number, 0) for number in range(len(columns))]
        shown.remove(max(droppable, key=lambda number: columns[number].drop))


def gap(available: int) -> int:
    """The cells between two columns."""
    return 2 if available >= _ROOMY else 1


def shortened(text: str, width: int) -> str:
    """A text in at most `width` cells. Of a name the middle is left out, since names differ at both ends."""
    if cell_len(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    head = width - 1 if " " in text else (width - 1) // 2
    tail = width - 1 - head
    start, end = text, text if tail else ""
    while cell_len(start) > head:
        start = start[:-1]
    while cell_len(end) > tail:
        end = end[1:]
    return f"{start}…{end}"

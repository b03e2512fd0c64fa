"""The widget of a table whose rows are replaced every few seconds while a person reads, scrolls and selects."""

from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar, Generic

from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from ..ops.units import printable
from .columns import Column, Order, Row, T, arranged, gap, shortened, widths


class LiveTable(ScrollView, Generic[T], can_focus=True):
    """Shows rows in columns. Only the visible lines are rendered.

    The selection stays with its row, by `key`, when the rows are replaced. `empty` is shown where there are no rows.
    """

    DEFAULT_CSS = """
    LiveTable {
        height: auto; scrollbar-size: 1 1; overflow-x: hidden; border-top: solid $primary;
        border-title-color: $text-muted; border-title-style: bold;
    }
    LiveTable:focus { border-top: solid $accent; border-title-color: $text-accent; }
    LiveTable .header { text-style: bold; color: $text-muted; }
    LiveTable:focus .cursor { background: $primary; text-style: bold; }
    LiveTable .dim { color: $text-muted; }
    LiveTable .good { color: $text-success; }
    LiveTable .warning { color: $text-warning; }
    LiveTable .error { color: $text-error; text-style: bold; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"header", "cursor", "dim", "good", "warning", "error"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "move_pages(-1)", show=False),
        Binding("pagedown", "move_pages(1)", show=False),
        Binding("home", "move_to_end(-1)", show=False),
        Binding("end", "move_to_end(1)", show=False),
    ]

    class Changed(Message):
        """Another row is selected, or the rows were replaced."""

    def __init__(self, name: str, columns: Sequence[Column[T]], key: Callable[[T], Hashable], *, empty: str) -> None:
        super().__init__(id=name)
        self._title = name
        self._columns = columns
        self._key = key
        self._empty = empty
        self._order = Order()
        self._filter = ""
        self._subjects: Sequence[T] | None = None
        """None until rows were shown for the first time."""
        self._total = 0
        self._rows: list[Row[T]] = []
        self._widths = [0] * len(columns)
        self._cursor = 0

    @property
    def selected(self) -> T | None:
        """What the selected row is about; None if there are no rows."""
        return self._rows[self._cursor].subject if self._rows else None

    @property
    def filter_text(self) -> str:
        """The text that rows must have in one of their cells."""
        return self._filter

    @property
    def subjects(self) -> Sequence[T]:
        """What all rows are about, also those that are filtered out."""
        return self._subjects or ()

    @property
    def lines(self) -> list[str]:
        """The header and all rows as they are shown, without style."""
        return ["".join([segment.text for segment in self._line(y)]).rstrip() for y in range(len(self._rows) + 1)]

    def show(self, subjects: Sequence[T], total: int = 0) -> None:
        """Replace the rows. `total` is how many there are, if not all are given."""
        self._subjects, self._total = subjects, max(total, len(subjects))
        self._arrange()

    def set_filter(self, text: str) -> None:
        """Show only rows that have this text in one of their cells."""
        self._filter = text
        self._arrange()

    def sort_by_next(self, step: int) -> None:
        """Sort by a column further on, or before. After the last column, rows are in their own order again."""
        self._sort_by((self._order.column + 1 + step) % (len(self._columns) + 1) - 1)

    def reverse(self) -> None:
        """Reverse the order of the rows."""
        self._order = Order(self._order.column, is_reversed=not self._order.is_reversed)
        self._arrange()

    def _sort_by(self, column: int) -> None:
        """Sort by a column: numbers with the greatest first, since that is where trouble is."""
        self._order = Order(column, is_reversed=column >= 0 and self._columns[column].is_number)
        self._arrange()

    def _arrange(self) -> None:
        selected = self.selected
        self._rows = arranged(self.subjects, self._columns, self._order, self._filter)
        keys = [self._key(row.subject) for row in self._rows]
        wanted = None if selected is None else self._key(selected)
        self._cursor = keys.index(wanted) if wanted in keys else max(0, min(self._cursor, len(keys) - 1))
        self._lay_out()
        self.post_message(self.Changed())

    def _lay_out(self) -> None:
        width = self.scrollable_content_region.width
        self._widths = widths(self._columns, self._rows, max(1, width))
        lines = max(2, len(self._rows) + 1)
        if lines != self.virtual_size.height:
            self.virtual_size = Size(width, lines)
            self.refresh(layout=True)
        shown = str(len(self._rows)) if len(self._rows) == self._total else f"{len(self._rows)} of {self._total}"
        parts = [self._title if self._subjects is None else f"{self._title} {shown}"]
        if self._order.column >= 0 or self._order.is_reversed:
            by = self._columns[self._order.column].label if self._order.column >= 0 else ""
            parts.append(f"by {by}" if by else "reversed")
        if self._filter:
            parts.append(f"with “{self._filter}”")
        self.border_title = " · ".join(parts).replace("[", "\\[")
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """See `ScrollView`. The first line is the header, which does not scroll."""
        width = self.scrollable_content_region.width
        line = y + self.scroll_offset.y if y else 0
        base = self.rich_style
        if not self._rows and line == 1:
            nothing = "" if self._subjects is None else self._empty
            text = f"no row has “{self._filter}”" if self._subjects else nothing
            return Strip([Segment(text, base + self.get_component_rich_style("dim", partial=True))]).adjust_cell_length(
                width, base
            )
        if line > len(self._rows):
            return Strip.blank(width, base)
        if not line:
            base += self.get_component_rich_style("header", partial=True)
        elif line - 1 == self._cursor:
            base += self.get_component_rich_style("cursor", partial=True)
        segments = [
            Segment(segment.text, base + segment.style if segment.style else base) for segment in self._line(line)
        ]
        return Strip(segments).adjust_cell_length(width, base)

    def _line(self, line: int) -> list[Segment]:
        """A line with the styles of its cells alone. Line 0 is the header."""
        segments: list[Segment] = []
        space = " " * gap(self.scrollable_content_region.width)
        for number, (column, width) in enumerate(zip(self._columns, self._widths, strict=True)):
            if not width:
                continue
            style: Style | None = None
            if line:
                cell = self._rows[line - 1].cells[number]
                text = cell.text
                style = self.get_component_rich_style(cell.tone, partial=True) if cell.tone else None
            else:
                text = column.label + self._arrow(number)
            text = shortened(printable(text), width)
            sized = set_cell_size(text, width)
            if column.is_number:
                sized = " " * (len(sized) - len(sized.rstrip())) + text
            segments += [Segment(space)] * bool(segments)
            segments.append(Segment(sized, style))
        return segments

    def _arrow(self, column: int) -> str:
        if column != self._order.column:
            return ""
        return "↓" if self._order.is_reversed else "↑"

    def on_resize(self) -> None:
        """Fit the columns into the new width."""
        self._lay_out()

    def on_click(self, event: events.Click) -> None:
        """Select the row that was clicked, or sort by the header."""
        offset = event.get_content_offset(self)
        if offset is None:
            return
        line = offset.y + self.scroll_offset.y if offset.y else 0
        if line:
            self._select(line - 1)
            return
        left = 0
        for number, width in enumerate(self._widths):
            left += width + gap(self.scrollable_content_region.width) if width else 0
            if offset.x < left:
                if number == self._order.column:
                    self.reverse()
                else:
                    self._sort_by(number)
                return

    def action_move(self, rows: int) -> None:
        """Select a row further down, or up."""
        self._select(self._cursor + rows)

    def action_move_pages(self, pages: int) -> None:
        """Select a row a page further down, or up."""
        self._select(self._cursor + pages * max(1, self.scrollable_content_region.height - 2))

    def action_move_to_end(self, direction: int) -> None:
        """Select the last row, or the first."""
        self._select(direction * len(self._rows))

    def _select(self, row: int) -> None:
        self._cursor = max(0, min(row, len(self._rows) - 1))
        visible = max(1, self.scrollable_content_region.height - 1)  # without the header
        first = self.scroll_offset.y
        if self._cursor < first:
            self.scroll_to(y=self._cursor, animate=False)
        elif self._cursor >= first + visible:
            self.scroll_to(y=self._cursor - visible + 1, animate=False)
        self.refresh()
        self.post_message(self.Changed())

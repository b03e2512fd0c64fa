"""The small screens over the tables: a question before something is ended, and pages to read."""

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from ..ops.units import printable


class Question(ModalScreen[bool]):
    """Asks whether to do something. Only `y` does it."""

    DEFAULT_CSS = """
    Question { align: center middle; }
    Question > Vertical {
        width: 70; max-width: 90%; height: auto; padding: 1 2; border: round $warning; background: $surface;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, question: str, consequence: str) -> None:
        super().__init__()
        self.question = question
        self.consequence = consequence

    def compose(self) -> ComposeResult:
        """See `Screen`."""
        with Vertical():
            yield Static(Text(self.question, style="bold"))
            yield Static(Text(f"\n{self.consequence}\n"))
            yield Static(Text("y  yes      n  no", style="bold"))

    def action_answer(self, answer: bool) -> None:  # noqa: FBT001 - textual's
        """End the screen with an answer."""
        self.dismiss(answer)


class TextPage(ModalScreen[None]):
    """Shows lines of a word and a text."""

    DEFAULT_CSS = """
    TextPage { align: center middle; }
    TextPage > VerticalScroll {
        width: 100; max-width: 96%; height: auto; max-height: 94%; padding: 0 1; border: round $primary;
        background: $surface; border-title-style: bold; border-subtitle-color: $text-muted; scrollbar-size: 1 1;
    }
    TextPage Horizontal { height: auto; }
    TextPage .word { width: 10; text-style: bold; }
    TextPage .text { width: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,exclamation_mark", "leave", "Back")]

    def __init__(self, title: str, lines: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._title = title
        self._lines = lines

    def compose(self) -> ComposeResult:
        """See `Screen`."""
        with VerticalScroll() as box:
            box.border_title, box.border_subtitle = self._title, "Esc: back"
            for word, text in self._lines:
                with Horizontal():
                    yield Static(Text(word), classes="word")
                    yield Static(Text(printable(text)), classes="text")

    def action_leave(self) -> None:
        """Go back to the tables."""
        self.dismiss()

"""The screen with a request's answer, as it arrives. Only this screen shows content, when a person asks for it."""

import re
from contextlib import aclosing, suppress
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widgets import Footer, Static

from ..client.async_client import Client
from ..client.errors import ClientError
from ..contract.answer import Answer
from ..contract.entries import to_json, transcript_of
from ..ops.units import printable

_LONGEST = 50_000
"""The most characters of an answer that are shown: its last ones."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal would obey. Other characters that do not print, such as those that join emoji, belong to a text."""

_PAUSE = 0.1
"""Seconds between two paintings of an answer that arrives."""


class FollowScreen(Screen[None]):
    """Follows a request from its start. A leaving reader does not end the request."""

    DEFAULT_CSS = """
    FollowScreen > #state {
        height: 1; background: $primary; text-style: bold; text-wrap: nowrap; text-overflow: ellipsis;
    }
    FollowScreen > VerticalScroll { scrollbar-size: 1 1; }
    FollowScreen > VerticalScroll > Static { width: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,f", "leave", "Back"),
    ]

    def __init__(self, client: Client, request_id: str) -> None:
        super().__init__()
        self._client = client
        self._request_id = request_id
        self._answer = Answer()
        self._problem = ""
        self._painted = False

    def compose(self) -> ComposeResult:
        """See `Screen`, also below."""
        yield Static(id="state")
        with VerticalScroll():
            yield Static(id="text")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self._paint()
        self._follow()
        self.set_interval(_PAUSE, self._paint_news)

    @work
    async def _follow(self) -> None:
        try:
            async with aclosing(self._client.follow(self._request_id)) as entries:
                async for entry in entries:
                    self._answer.add(entry)
                    self._painted = False
        except ClientError as error:
            self._problem = str(error)
            self._painted = False

    def _paint_news(self) -> None:
        if not self._painted:
            with suppress(NoMatches):  # a screen that closes loses its widgets before its timers
                self._paint()

    def _paint(self) -> None:
        """Show the answer so far. A reader at its end stays there; one who has scrolled back stays at that place."""
        self._painted = True
        box = self.query_one(VerticalScroll)
        if box.scroll_offset.y >= box.max_scroll_y:
            self.call_after_refresh(box.scroll_end, animate=False)
        self.query_one("#state", Static).update(Text(printable(f"{self._request_id}  {self._state()}")))
        self.query_one("#text", Static).update(text_of(self._answer))

    def _state(self) -> str:
        answer = self._answer
        if self._problem:
            return self._problem
        if answer.outcome:
            return answer.error or answer.outcome
        if answer.started is None:
            return "waits for a worker"
        attempt = f", attempt {answer.attempt}" if answer.attempt > 1 else ""
        return f"runs at {answer.started.worker}{attempt}"

    def action_leave(self) -> None:
        """Go back to the tables."""
        self.dismiss()


def text_of(answer: Answer) -> Text:
    """The first choice of an answer: reasoning is dim. Tool calls follow once the answer is complete."""
    pieces: list[tuple[str, str]] = []
    left = _LONGEST
    for delta in reversed(answer.deltas):
        if delta.index:
            continue
        pieces.append((f"{delta.text}{delta.refusal}{transcript_of(delta.extra)}", ""))
        pieces.append((delta.reasoning, "dim"))
        left -= sum(len(piece) for piece, _ in pieces[-2:])
        if left < 0:
            pieces.append(("… (what came before is not shown)\n", "dim"))
            break
    calls = [call for choice in answer.choices[:1] for call in choice.tool_calls] if answer.end else []
    pieces[:0] = [(f"\n{to_json(call)}", "") for call in reversed(calls)]
    return Text.assemble(*[(_CONTROLS.sub("�", piece), style) for piece, style in reversed(pieces)])

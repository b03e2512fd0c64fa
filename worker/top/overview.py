"""The main screen: what is wrong, four tables, and keys that act on the selected row."""

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, ClassVar

from redis.exceptions import RedisError
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widgets import Footer, Input, Static

from ..broker.consumers import is_pseudo_consumer
from ..ops.findings import Finding
from ..ops.running import RunningRequest
from ..ops.survey_types import QueueState, WorkerState
from ..ops.units import duration, printable
from ..redisio.advice import advice_on
from ..redisio.errors import redacted_message
from ..settings import redacted_url
from .follow import FollowScreen
from .head import faults_text, names_of, sentence_of, storage_line
from .installation import Installation, Picture
from .screens import Question, TextPage
from .table import LiveTable
from .tables import HELP, QUEUES, REQUESTS, SERVERS, WORKERS

TALL = 40
"""The lines from which on a terminal has room for longer tables."""


class Overview(Screen[None]):
    """Shows an installation, with a new picture every `every` seconds, or at once after a key has changed something."""

    DEFAULT_CSS = """
    Overview > Static { height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    Overview > #head { background: $primary; }
    Overview > #faults { height: auto; }
    Overview.away > #faults { background: $error; text-style: bold; text-wrap: wrap; }
    Overview.away LiveTable, Overview.away > #redis { opacity: 45%; }
    Overview > #selection { color: $text-muted; }
    Overview > #filter { display: none; padding: 0; background: $surface-lighten-2; }
    Overview > #filter.open { display: block; }
    #overview { height: auto; }
    #queues, #servers { max-height: 4; }
    #workers { max-height: 5; }
    #requests { height: 1fr; min-height: 5; }
    #overview LiveTable:focus { max-height: 10; }
    Overview.-wide #overview {
        layout: grid; grid-size: 2; grid-columns: 2fr 3fr; grid-rows: auto; grid-gutter: 0 2;
    }
    Overview.-wide #workers { row-span: 2; }
    Overview.-tall #overview LiveTable { max-height: 12; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Find", key_display="/"),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", show=False),
        Binding("r", "reverse", show=False),
        Binding("c", "cancel", "Cancel"),
        Binding("p", "pause", "Pause"),
        Binding("d", "drain", "Drain"),
        Binding("f", "follow", "Follow"),
        Binding("exclamation_mark", "faults", "Faults", key_display="!"),
        Binding("tab", "app.focus_next", "Next", key_display="Tab"),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("q", "app.quit", "Quit"),
        Binding("escape", "show_all_rows", show=False),
    ]

    def __init__(self, installation: Installation, every: float) -> None:
        super().__init__()
        self._installation = installation
        self._every = every
        self._picture: Picture | None = None
        """The last picture for which Redis answered."""
        self._taken = 0.0
        """When it was taken, in Unix seconds of this machine."""
        self._away_since = 0.0
        """When Redis last answered, likewise, or was first queried; 0 while it answers."""
        self._faults: list[Finding] = []
        self._refresh_now = asyncio.Event()
        self._filtered: LiveTable[Any] | None = None
        """The table whose filter is being typed."""

    def compose(self) -> ComposeResult:
        """See `Screen`, also below."""
        yield Static(id="head")
        yield Static(id="redis")
        yield Static(id="faults")
        with Vertical(id="overview"):
            yield LiveTable("queues", QUEUES, lambda queue: queue.name, empty="no queue was used yet")
            nobody = "no worker runs: start one with worker run"
            yield LiveTable("workers", WORKERS, lambda worker: worker.name, empty=nobody)
            yield LiveTable("servers", SERVERS, lambda server: server.url, empty="no live worker has a server")
        yield LiveTable("requests", REQUESTS, lambda one: (one.queue, one.job), empty="no request runs")
        yield Static(id="selection")
        yield Input(
            id="filter", placeholder="Rows that have this text. Enter keeps the filter, Esc ends it", compact=True
        )
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#requests").focus()
        self._watch()
        self._paint_head()
        self.set_interval(1.0, self._paint_clock)

    # Pictures

    @work
    async def _watch(self) -> None:
        """Take pictures without end."""
        while True:
            self._refresh_now.clear()
            picture = await self._installation.read()
            with suppress(NoMatches):  # a screen that closes loses its widgets before its workers and timers
                self._show(picture)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._refresh_now.wait()

    def _show(self, picture: Picture) -> None:
        survey = picture.survey
        self._faults = [*([picture.unreadable] if picture.unreadable else []), *survey.faults]
        if survey.unread:
            what = f"this user may not read: {', '.join(survey.unread)}"
            fix = "the line `operator` of deploy/redis/users.acl has the rights"
            self._faults.append(Finding("warning", "rights", what, fix))
        if picture.redis_answers:
            self._picture, self._taken, self._away_since = picture, time.time(), 0.0
            self._table("queues").show(survey.queues)
            self._table("workers").show(survey.workers)
            self._table("servers").show(survey.servers)
            self._table("requests").show(picture.running.requests, picture.running.total)
            self._line("redis").update(Text(printable(storage_line(survey))))
            self._line("faults").update(faults_text(self._faults, time.time(), 2 if self.size.height < TALL else 6))
        elif not self._away_since:
            self._away_since = self._taken or time.time()
        self.set_class(not picture.redis_answers, "away")
        self._paint_head()

    def _paint_clock(self) -> None:
        with suppress(NoMatches):  # as above
            self._paint_head()

    def _paint_head(self) -> None:
        taken = _clock(self._taken) if self._taken else "reading …"
        where = redacted_url(self._installation.url)
        self._line("head").update(Text.assemble(("vllm-relay", "bold"), f"  {where}  {taken}"))
        if self._away_since:
            lasts = duration(time.time() - self._away_since)
            text = f"No new picture since {_clock(self._away_since)} ({lasts}). "
            text += "; ".join(sentence_of(fault, time.time()) for fault in self._faults)
            self._line("faults").update(Text(printable(text)))

    def _line(self, name: str) -> Static:
        return self.query_one(f"#{name}", Static)

    def _table(self, name: str) -> "LiveTable[Any]":
        return self.query_one(f"#{name}", LiveTable)

    # Rows

    @property
    def _current(self) -> "LiveTable[Any]":
        """The table that the keys act on."""
        return self._filtered or (self.focused if isinstance(self.focused, LiveTable) else self._table("requests"))

    @on(LiveTable.Changed)
    def _show_selection(self) -> None:
        self._line("selection").update(Text(printable(names_of(self._current.selected))))

    def action_sort(self, step: int) -> None:
        self._current.sort_by_next(step)

    def action_reverse(self) -> None:
        self._current.reverse()

    def action_filter(self) -> None:
        self._filtered = self._current
        entry = self.query_one("#filter", Input)
        entry.value = self._filtered.filter_text
        entry.add_class("open")
        entry.focus()

    @on(Input.Changed, "#filter")
    def _filter_rows(self, event: Input.Changed) -> None:
        if self._filtered:
            self._filtered.set_filter(event.value)

    @on(Input.Submitted, "#filter")
    def _leave_filter(self) -> None:
        self.query_one("#filter").remove_class("open")
        if self._filtered:
            self._filtered.focus()
            self._filtered = None

    def action_show_all_rows(self) -> None:
        """End the filter."""
        self._current.set_filter("")
        self._leave_filter()

    # Actions

    @work
    async def action_cancel(self) -> None:
        request = self._current.selected
        if not isinstance(request, RunningRequest) or not request.request_id:
            self._advise("select a running request first, one whose id is known")
        elif await self._confirm(
            f"Cancel request {request.request_id}?",
            "Its readers keep the text so far, and see that it was cancelled.",
        ):
            await self._do(self._cancel(request.request_id))

    async def _cancel(self, request_id: str) -> str:
        if await self._installation.cancel(request_id):
            return f"request {request_id} is cancelled"
        return f"request {request_id} had ended before"

    @work
    async def action_pause(self) -> None:
        row = self._current.selected
        queue = row.name if isinstance(row, QueueState) else row.queue if isinstance(row, RunningRequest) else ""
        if not queue:
            self._advise("select a queue first, or a running request of it")
        elif any(one.name == queue and one.pause for one in self._table("queues").subjects):
            await self._do(self._resume(queue))
        elif await self._confirm(
            f"Pause queue {queue}?",
            "Until it is resumed no worker takes a job of it, and new jobs wait. Running requests go on.",
        ):
            await self._do(self._pause(queue))

    async def _pause(self, queue: str) -> str:
        await self._installation.steering.pause(queue)
        self._refresh_now.set()
        unconfirmed = await self._installation.steering.wait_in_effect(queue)
        if unconfirmed:
            return f"queue {queue} is paused; workers that have not confirmed that: {', '.join(sorted(unconfirmed))}"
        return f"queue {queue} is paused: no job of it starts"

    async def _resume(self, queue: str) -> str:
        await self._installation.steering.resume(queue)
        return f"queue {queue} is resumed"

    @work
    async def action_drain(self) -> None:
        row = self._current.selected
        worker = row.name if isinstance(row, WorkerState) else row.worker if isinstance(row, RunningRequest) else ""
        if not worker or is_pseudo_consumer(worker):
            self._advise("select a worker first, or a running request of it")
        elif await self._confirm(f"Drain worker {worker}?", self._consequence_of_drain(worker)):
            await self._do(self._drain(worker))

    def _consequence_of_drain(self, worker: str) -> str:
        queues = {queue for one in self._table("workers").subjects if one.name == worker for queue in one.queues}
        alone = sorted(one.name for one in self._table("queues").subjects if one.name in queues and one.workers == 1)
        text = "Other workers continue its jobs, and its process ends."
        return f"{text} But no other worker serves {', '.join(alone)}." if alone else text

    async def _drain(self, worker: str) -> str:
        await self._installation.steering.drain(worker)
        return f"worker {worker} was asked to drain"

    def action_follow(self) -> None:
        row = self._current.selected
        if isinstance(row, RunningRequest) and row.request_id:
            self.app.push_screen(FollowScreen(self._installation.client, row.request_id))
        else:
            self._advise("select a running request first, one whose id is known")

    def action_faults(self) -> None:
        now = time.time()
        lines = [(fault.level, sentence_of(fault, now)) for fault in self._faults]
        self.app.push_screen(TextPage("What is wrong", lines or [("", "no fault is known")]))

    def action_help(self) -> None:
        self.app.push_screen(TextPage("Keys and columns", HELP))

    def _advise(self, text: str) -> None:
        self.notify(text, severity="warning", markup=False)

    async def _confirm(self, question: str, consequence: str) -> bool:
        return await self.app.push_screen_wait(Question(printable(question), printable(consequence)))

    async def _do(self, action: Awaitable[str]) -> None:
        """Do something to the installation, and show what it returns, or why it failed."""
        try:
            done = await action
        except (RedisError, OSError) as error:
            advice = advice_on(error)
            text = f"{redacted_message(error)}{f' → {advice}' if advice else ''}"
            self.notify(printable(text), title="it was not done", severity="error", markup=False, timeout=15)
        else:
            self.notify(printable(done), markup=False)
        self._refresh_now.set()


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(seconds))

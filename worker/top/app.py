"""The application of `worker top`: it starts on the main screen, and ends with a traceback that has no secret."""

import asyncio
import signal
from contextlib import suppress
from typing import ClassVar

from rich.traceback import Traceback
from textual.app import App, SuspendNotSupported
from textual.binding import Binding, BindingType

from .installation import Installation
from .overview import TALL, Overview


class TopApp(App[None]):
    """Shows an installation, with a new picture every `every` seconds."""

    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (140, "-wide")]  # noqa: RUF012 - as textual has it
    VERTICAL_BREAKPOINTS = [(0, "-short"), (TALL, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+c", "quit", show=False, priority=True)]

    def __init__(self, installation: Installation, *, every: float = 2.0) -> None:
        super().__init__()
        self._overview = Overview(installation, every)

    def on_mount(self) -> None:
        """After SIGSTOP and SIGCONT, Textual 8.2.8 would start its threads again beside the first, and never end."""

        def restart() -> None:
            with suppress(SuspendNotSupported), self.suspend():  # not in a test without a terminal
                pass

        asyncio.get_running_loop().add_signal_handler(signal.SIGCONT, restart)

    def get_default_screen(self) -> Overview:
        """See `App`."""
        return self._overview

    def _fatal_error(self) -> None:
        """End with a traceback without variables (textual 8.2 shows them): an answer or a password may be in one."""
        self.panic(Traceback(show_locals=False))

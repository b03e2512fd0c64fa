"""The application of `worker top`: it starts on the main screen, and ends with a traceback that has no secret."""

import asyncio
import signal
import sys
from contextlib import suppress
from typing import IO, Any, ClassVar

from rich.traceback import Traceback
from textual.app import App, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.driver import Driver

from .installation import Installation
from .overview import TALL, Overview


class LossyFile:
    """A terminal to write to, which drops what is written once it is gone.

    The thread of Textual 8.2.8 that writes would end with an error, and after thirty more writes the application would
    wait for it for ever: it did not end on SIGTERM.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


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

    def get_driver_class(self) -> type[Driver]:
        """See `App`."""
        usual = super().get_driver_class()

        class LossyDriver(usual):  # type: ignore[misc, valid-type]  # the class depends on the system
            """Writes to a terminal that may go away."""

            def __init__(self, *arguments: object, **options: object) -> None:
                super().__init__(*arguments, **options)
                self._file: Any = LossyFile(self._file)

        return usual if sys.platform == "win32" else LossyDriver

    def _fatal_error(self) -> None:
        """End with a traceback without variables (textual 8.2 shows them): an answer or a password may be in one."""
        self.panic(Traceback(show_locals=False))

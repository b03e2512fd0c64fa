"""What asyncio reports of tasks, futures and callbacks whose errors nobody handles."""

import asyncio
import logging

UNHANDLED = ("was never retrieved", "was never awaited", "was destroyed but it is pending", "Exception in callback")
"""Words of these reports in the log of a process."""


class AsyncioReports(logging.Handler):
    """Collects the errors that event loops of this process log. Each names its coroutine or callback."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._reports: list[str] = []
        logging.getLogger("asyncio").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        if record.exc_info and record.exc_info[0] is asyncio.CancelledError:
            return  # before 3.13, `asyncio.start_server` reports a handler that ends with its event loop
        is_plain_future = "future: <Future " in record.getMessage()
        if is_plain_future and record.exc_info and isinstance(record.exc_info[1], ConnectionError):
            return  # asyncio retrieves the end of a connection itself, unless the collector comes first
        # Without the traceback: this may run inside the parser, which cannot be entered again (see `syntax_tree`).
        self._reports.append(record.getMessage())

    def drain(self) -> list[str]:
        """The reports since the last call."""
        reports, self._reports = self._reports, []
        return reports

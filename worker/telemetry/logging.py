"""Logging: structlog, JSON lines in production and readable lines on a terminal, always on standard error.

Only names, numbers and codes are logged: never a prompt, an output, a URL with its password, or the text of a vLLM
error, which may quote the request. So tracebacks are written without the values of local variables, which structlog
would add to them.
"""

import dataclasses
import logging
import os
import re
import sys
import time
from typing import Literal

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from .events import Event, Failing, Recovered

Format = Literal["auto", "json", "console"]

SAY_AGAIN = 30.0
"""Seconds until the same trouble is logged again."""

_WORD_START = re.compile(r"(?<!^)(?=[A-Z])")


class LogReceiver:
    """Writes events to the log: trouble that lasts at first, then every half minute, and once when it is over."""

    def __init__(self) -> None:
        self._logger = structlog.get_logger()
        self._failing: dict[str, float] = {}
        """When each warning was last logged (monotonic clock, in seconds). `Recovered` is logged only after one."""

    def emit(self, event: Event) -> None:
        if event.level == "silent":
            return
        if isinstance(event, Failing):
            now = time.monotonic()
            if now - self._failing.get(event.what, float("-inf")) > SAY_AGAIN:
                self._failing[event.what] = now
                advice = {"advice": event.advice} if event.advice else {}
                self._logger.warning(event.what, error=event.error, **advice)
            return
        if isinstance(event, Recovered) and self._failing.pop(event.after, None) is None:
            return
        fields = {
            field.name: getattr(event, field.name)
            for field in dataclasses.fields(event)
            if getattr(event, field.name) != field.default
        }
        error = fields.get("error")
        if isinstance(error, BaseException):
            fields["exc_info"] = fields.pop("error")
        name = name_of(type(event))
        if event.level == "warning":
            self._failing[name] = time.monotonic()
        getattr(self._logger, event.level)(name, **fields)


def name_of(kind: type[Event]) -> str:
    """What the log calls events of a class."""
    return kind.name or _WORD_START.sub("_", kind.__name__).lower()


def configure_logging(log_format: Format = "auto", level: str = "info") -> None:
    """Set up structlog for the process. `auto` is readable on a terminal and JSON elsewhere."""
    readable = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    # Tracebacks without the values of variables, which structlog shows by default: they hold prompts and outputs.
    tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    renderers: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
        if readable
        else [tracebacks, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

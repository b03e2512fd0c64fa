"""Logs: structlog, JSON lines in production and readable lines on a terminal, always on standard error.

Only names, numbers and codes are logged: never a prompt, an output, a URL with its password, or the text of a vLLM
error, which may quote the request. Tracebacks therefore have no values of local variables, which structlog would add.
"""

import dataclasses
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import msgspec
import structlog
from structlog.tracebacks import ExceptionDictTransformer

from .events import Event, Failing, Recovered

Format = Literal["auto", "json", "console"]

REPEAT_AFTER = 30.0
"""Seconds until a failure that lasts is logged again."""

_WORD_START = re.compile(r"(?<!^)(?=[A-Z])")


class LogReceiver:
    """Writes events to the log.

    A failure that lasts is logged at first, then every `repeat_after` seconds, and once when it is over. A field that
    has its default value is omitted. An error that is an exception is logged with its traceback. Events of the classes
    in `omit` are not logged.
    """

    def __init__(self, *, repeat_after: float = REPEAT_AFTER, omit: tuple[type[Event], ...] = ()) -> None:
        self._omit = omit
        self._logger = structlog.get_logger()
        self._repeat_after = repeat_after
        self._failing: dict[str, float] = {}
        """When each warning was last logged (monotonic clock). `Recovered` is logged only after a warning."""
        self._kinds: dict[type[Event], tuple[str, list[tuple[str, object]]]] = {}
        """For each class of events, its name in the log, and its fields with their defaults."""

    def emit(self, event: Event) -> None:
        """Log an event, unless its level is silent."""
        if event.level == "silent" or isinstance(event, self._omit):
            return
        if isinstance(event, Failing):
            now = time.monotonic()
            if now - self._failing.get(event.what, float("-inf")) > self._repeat_after:
                self._failing[event.what] = now
                advice = {"advice": event.advice} if event.advice else {}
                self._logger.warning(event.what, error=event.error, **advice)
            return
        if isinstance(event, Recovered) and self._failing.pop(event.after, None) is None:
            return
        name, defaults = self._kinds.get(type(event)) or self._describe(type(event))
        fields = {field: value for field, default in defaults if (value := getattr(event, field)) != default}
        if isinstance(fields.get("error"), BaseException):
            fields["exc_info"] = fields.pop("error")
        if event.level == "warning":
            self._failing[name] = time.monotonic()
        getattr(self._logger, event.level)(name, **fields)

    def _describe(self, kind: type[Event]) -> tuple[str, list[tuple[str, object]]]:
        self._kinds[kind] = described = name_of(kind), [(each.name, each.default) for each in dataclasses.fields(kind)]
        return described


def name_of(kind: type[Event]) -> str:
    """The log's name for a class of events: its `name` or, if that is empty, the class's name in snake case."""
    return kind.name or _WORD_START.sub("_", kind.__name__).lower()


def _to_json(line: object, default: Callable[[object], object]) -> str:
    """Encode a line in a tenth of the time of `json`, which escapes what is not ASCII: it could control a terminal."""
    with suppress(TypeError, ValueError):  # such as a surrogate
        encoded = msgspec.json.encode(line, enc_hook=default)
        if encoded.isascii():
            return encoded.decode()
    return json.dumps(line, default=default)


def configure_logging(log_format: Format = "auto", level: str = "info") -> None:
    """Set up structlog for the process. `auto` is readable on a terminal and JSON elsewhere."""
    readable = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    # By default structlog adds the values of local variables to tracebacks: they hold prompts and outputs.
    tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    renderers: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
        if readable
        else [tracebacks, structlog.processors.JSONRenderer(serializer=_to_json)]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )

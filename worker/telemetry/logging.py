"""Logging: structlog, JSON lines in production and readable lines on a terminal, always on standard error.

Only names, numbers and codes are logged: never a prompt, an output, a URL with its password, or the text of a vLLM
error, which may quote the request. So tracebacks are written without the values of local variables, which structlog
would add to them.
"""

import logging
import os
import sys
from typing import Literal

import structlog
from structlog.tracebacks import ExceptionDictTransformer

Format = Literal["auto", "json", "console"]


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

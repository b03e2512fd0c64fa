"""What uvicorn logs, as events. It logs query strings, which may hold tokens, so only its errors pass."""

import asyncio
import logging

from .events import Telemetry
from .gateway_events import HttpServerFault
from .job_events import InternalError

_LOGGER = "uvicorn.error"

_EXPECTED = ("ASGI callable returned without completing response",)
"""What the gateway does on purpose: it returns early to cut a connection."""


def forward_server_log(telemetry: Telemetry) -> None:
    """Emit an event for each error that uvicorn logs from now on, and let nothing of its log pass otherwise."""
    logger = logging.getLogger(_LOGGER)
    logger.handlers = [_Forwarder(telemetry)]
    logger.setLevel(logging.ERROR)
    logger.propagate = False


class _Forwarder(logging.Handler):
    def __init__(self, telemetry: Telemetry) -> None:
        super().__init__(logging.ERROR)
        self._telemetry = telemetry

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError) or str(record.msg).startswith(_EXPECTED):
            return
        if error is not None:
            self._telemetry.emit(InternalError(error))
        else:
            self._telemetry.emit(HttpServerFault(str(record.msg)[:200]))

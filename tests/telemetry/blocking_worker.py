"""A worker whose event loop does nothing else from a SIGUSR1 on until a file exists: the argument is its path."""

import asyncio
import signal
import sys
import time
from pathlib import Path

import uvloop

from worker.engine.application import Worker
from worker.settings import load_settings
from worker.telemetry.logging import configure_logging

_HANG = 60.0
"""Seconds after which the event loop runs again though the test has failed: it waits for the end of its workers."""


async def _run(released: Path) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _block, released)
    await Worker(load_settings()).run()


def _block(released: Path) -> None:
    ends_at = time.monotonic() + _HANG
    while not released.exists() and time.monotonic() < ends_at:
        time.sleep(0.05)


if __name__ == "__main__":
    configure_logging("json", "info")
    uvloop.run(_run(Path(sys.argv[1])))

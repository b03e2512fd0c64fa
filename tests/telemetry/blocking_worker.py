"""A worker whose event loop does nothing else for some seconds after each SIGUSR1: the argument says for how many."""

import asyncio
import signal
import sys
import time

import uvloop

from worker.engine.application import Worker
from worker.settings import load_settings
from worker.telemetry.logging import configure_logging


async def _run(blocked_for: float) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, time.sleep, blocked_for)
    await Worker(load_settings()).run()


if __name__ == "__main__":
    configure_logging("json", "info")
    uvloop.run(_run(float(sys.argv[1])))

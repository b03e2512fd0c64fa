"""A worker that ends every job step by step, as in a cluster, and never by the one script for ordinary jobs."""

import asyncio

from worker.broker.endings import JobEnder
from worker.engine.application import Worker
from worker.settings import load_settings
from worker.telemetry.logging import configure_logging


async def _not_in_one_step(*_: object, **__: object) -> bool:
    return False


if __name__ == "__main__":  # in this process only
    JobEnder.end = _not_in_one_step  # type: ignore[method-assign]
    configure_logging("json", "info")
    asyncio.run(Worker(load_settings()).run())

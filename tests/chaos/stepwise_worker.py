"""A worker that ends every job step by step, as in a cluster, and never by the one script for ordinary jobs."""

import asyncio
from typing import Any

from worker.broker.ownership import LogOwnership
from worker.contract.entries import Entry
from worker.engine.application import Worker
from worker.settings import load_settings
from worker.telemetry.logging import configure_logging

_seal = LogOwnership.seal


async def seal_alone(*args: Any, **more: Any) -> tuple[Entry, bool]:  # noqa: ANN401 - handed on as they come
    """Take the place of `LogOwnership.seal`: it seals the log, and does not settle the job in the same step."""
    return await _seal(*args, **(more | {"finished_record": ()}))


if __name__ == "__main__":  # in this process only
    LogOwnership.seal = seal_alone  # type: ignore[method-assign]
    configure_logging("json", "info")
    asyncio.run(Worker(load_settings()).run())

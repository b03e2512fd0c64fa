"""A worker that dies of a request whose `user` is `poison`, as of one that makes a library crash."""

import asyncio
import os

from worker.contract.entries import Terminal
from worker.contract.job import Job
from worker.generation import Generation
from worker.service import Service
from worker.settings import load_settings
from worker.telemetry.logs import configure_logging

_healthy = Generation.end


async def _end(self: Generation) -> Terminal:
    job = self._request.job
    if isinstance(job, Job) and job.request.get("user") == "poison":
        await asyncio.sleep(0.05)  # the jobs beside it have begun by then, and have no token yet
        os._exit(1)
    return await _healthy(self)


if __name__ == "__main__":
    Generation.end = _end  # type: ignore[method-assign]  # in this process only
    configure_logging("json", "info")
    asyncio.run(Service(load_settings()).run())

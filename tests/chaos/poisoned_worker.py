"""A worker that dies at a request: its `user` names the moment. So may one that crashes a library or exhausts memory.

`unreadable`: as it is read; `poison`: before its first token; `midway`: after some deltas.
"""

import asyncio
import os

from worker.broker.log_writer import AppendBatch, LogWriter
from worker.contract.entries import Terminal
from worker.contract.job import Job, RawFields
from worker.contract.job import parse_job as _parse
from worker.engine import job_context
from worker.engine.application import Worker
from worker.engine.generation import Generation
from worker.settings import load_settings
from worker.telemetry.logging import configure_logging

_healthy = Generation.generate
_accept = LogWriter.accept
_midway: set[str] = set()


def _parse_job(fields: RawFields, max_request_bytes: int) -> Job:
    if b'"unreadable"' in fields.get(b"request", b""):
        os._exit(1)
    return _parse(fields, max_request_bytes)


async def _generate(self: Generation) -> Terminal:
    job = self._job.parsed
    user = job.request.get("user") if isinstance(job, Job) else None
    if user == "midway":
        _midway.add(self._job.id)
    if user == "poison":
        await asyncio.sleep(0.05)  # the jobs beside it have begun by then, and have no token yet
        os._exit(1)
    return await _healthy(self)


def _die_midway(self: LogWriter, batch: AppendBatch) -> bool:
    accepted = _accept(self, batch)
    if self.request_id in _midway and self.accepted.n > 8:
        os._exit(1)
    return accepted


if __name__ == "__main__":  # in this process only
    job_context.parse_job = _parse_job  # type: ignore[attr-defined,assignment]
    Generation.generate = _generate  # type: ignore[method-assign]
    LogWriter.accept = _die_midway  # type: ignore[method-assign]
    configure_logging("json", "info")
    asyncio.run(Worker(load_settings()).run())

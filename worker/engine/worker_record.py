"""The worker's record: the state of its vLLM servers in it, and its renewal as soon as the state changes."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec
from redis.exceptions import RedisError

from ..broker.worker_registry import WorkerRegistry
from ..contract.job import MAX_NAME
from ..contract.records import REFUSES_ALL, SILENT, ServerRecord, WorkerRecord
from ..settings import redacted_url
from ..vllm.servers.server import Server
from .pace import sleep_unless_set

_MAX_SERVERS = 32
_MAX_TEXT = 200
_MAX_MODELS = 100
_MAX_MODELS_TEXT = 4000
"""Limits on the size of a record, since every worker reads those of all others three times a lease."""


def server_records(servers: Sequence[Server]) -> tuple[ServerRecord, ...]:
    """The servers as the record has them, by URL. Of more than 32 servers the first are kept."""
    records = (
        ServerRecord(
            url=redacted_url(server.url)[:_MAX_TEXT],
            state="away" if server.is_away else "up" if server.is_known else "starting",
            reason=_reason_of(server),
            requests=server.in_flight,
            limit=round(server.limit.value, 2),
        )
        for server in servers
    )
    return tuple(sorted(records, key=lambda record: record.url)[:_MAX_SERVERS])


def _reason_of(server: Server) -> str:
    if server.is_away:
        return server.circuit.reason[:_MAX_TEXT]
    if server.refuses_all:
        return REFUSES_ALL
    return SILENT if server.is_silent else ""


def model_names(servers: Sequence[Server]) -> tuple[str, ...]:
    """The models of the servers as the record has them, in order, without duplicates and without those that do not fit.

    A server that is away counts: jobs for its models wait for it.
    """
    names: list[str] = []
    room = _MAX_MODELS_TEXT
    for name in sorted(frozenset().union(*(server.models for server in servers))):
        if len(name) <= MAX_NAME and len(name) <= room and len(names) < _MAX_MODELS:
            names.append(name)
            room -= len(name)
    return tuple(names)


def models_away(servers: Sequence[Server]) -> tuple[str, ...]:
    """The models in the record whose servers are all away. A server that is up and lists nothing may have any model."""
    up = [server for server in servers if not server.is_away]
    if not all(server.models for server in up):
        return ()
    there = frozenset().union(*(server.models for server in up))
    return tuple(name for name in model_names(servers) if name not in there)


class RecordRefresher:
    """Writes this worker's record soon after its state has changed, and six times a lease.

    So a worker whose record is half a lease old has missed three renewals. The heartbeat writes the record too, but
    other duties may delay the heartbeat. `check_every` is the time between two comparisons with the state that was
    written last, in seconds.
    """

    def __init__(
        self,
        registry: WorkerRegistry,
        build: Callable[[], WorkerRecord],
        *,
        lease: float,
        check_every: float = 0.5,
    ) -> None:
        self._registry = registry
        self._build = build
        self._renew_every = lease / 6
        self._check_every = check_every
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    async def run(self) -> None:
        """Write the record after each change of state, and regularly, until stopped. The heartbeat reports failures."""
        written, written_at = _state(self._build()), time.monotonic()
        while await sleep_unless_set(self._stopping, min(self._check_every, self._renew_every)):
            record = self._build()
            if _state(record) != written or time.monotonic() - written_at >= self._renew_every:
                written, written_at = _state(record), time.monotonic()  # also if the write fails: it is repeated soon
                with suppress(RedisError, OSError):
                    await self._registry.write(record)


def _state(record: WorkerRecord) -> WorkerRecord:
    """The record without what changes all the time."""
    servers = tuple(msgspec.structs.replace(server, requests=0, limit=0.0) for server in record.servers)
    return msgspec.structs.replace(
        record,
        beat=0,
        running=0,
        finished=0,
        failed=0,
        cancelled=0,
        tokens=0,
        finished_per_s=0.0,
        tokens_per_s=0.0,
        by_queue={},
        silence=0.0,
        servers=servers,
    )

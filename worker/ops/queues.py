"""The checks of the queues: how many jobs wait, and whether a worker serves the queue."""

from collections import Counter
from collections.abc import Iterable

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..broker.consumers import HANDED_OVER, consumers_by_xinfo
from ..broker.parked_jobs import ParkedLine, lines_among
from ..broker.queue_depth import waiting_in
from ..broker.worker_registry import WorkerRegistry
from ..contract.keys import DEFAULT_QUEUE, GROUP, Keys, is_queue_name
from ..engine.outline import BETWEEN_MODELS
from ..redisio.cluster import servers_of
from ..redisio.errors import is_permission_denied
from ..settings import variable
from .findings import Finding, listed

_KEYS_A_STEP = 1000
"""How many keys of Redis a step of the search for queues visits. It takes a few milliseconds of Redis's time."""


async def check_queues(redis: Redis, keys: Keys, served_here: Iterable[str], limit: int) -> tuple[list[Finding], int]:
    """Findings about the queues of the settings and every other queue in Redis, and the number of jobs to be done.

    Queues that the user may not read are left out.

    Raises:
        RedisError: when Redis does not answer.
    """
    own, findings, unfinished = list(served_here), list[Finding](), 0
    served = await _served_queues(redis, keys)
    found = await _find_queues(redis, keys)
    others = sorted({*(found or ()), *(served or ())} - set(own))
    for queue in [*own, *others]:
        try:
            finding, jobs = await _check_queue(redis, keys, queue, limit)
        except ResponseError as error:
            if not is_permission_denied(error):
                raise
            continue
        unfinished += jobs
        if not is_queue_name(queue):
            message = f"no worker can serve it: a queue's name has 1 to 64 characters of A-Za-z0-9_-; {finding.message}"
            finding = Finding("warning", f"queue {queue!r:.80}", message, "correct the name where jobs are added")
        elif jobs and served and queue not in served and finding.level == "ok":
            message = f"no worker serves it; {finding.message}"
            fix = f"start a worker with it in {variable('queues')}, or correct the name where jobs are added"
            finding = Finding("warning", finding.subject, message, fix)
        if queue in own or jobs or finding.level != "ok":
            findings.append(finding)
    if found is None and own:
        message = f"queues other than {listed(own)} were not searched for: the user has no right to +scan"
        findings.append(Finding("ok", "queues", message))
    return findings, unfinished


async def _served_queues(redis: Redis, keys: Keys) -> set[str] | None:
    """The queues that the workers' records name; None if that is not known.

    It is not known without a record, if a worker of an early version has none, or if the user may not read the records.
    """
    try:
        records = (await WorkerRegistry(redis, keys).records()).values()
    except ResponseError:  # _check_rights has reported it
        return None
    if not all(record.queues for record in records):
        return None
    return {queue for record in records for queue in record.queues} or None


async def _find_queues(redis: Redis, keys: Keys) -> set[str] | None:
    """The queues whose stream exists in Redis; None if the user has no right to search."""
    default = keys.jobs()
    found = set()
    try:
        for server in await servers_of(redis):
            async for key in server.scan_iter(match=f"{_escaped(default)}*", count=_KEYS_A_STEP, _type="stream"):
                suffix = key.decode("utf-8", "replace").removeprefix(default)
                if not suffix or suffix.startswith(":"):
                    found.add(suffix[1:] or DEFAULT_QUEUE)
    except ResponseError as error:
        if not is_permission_denied(error):
            raise
        return None
    return found


def _escaped(text: str) -> str:
    """A text as a pattern that matches only itself."""
    return "".join(f"\\{character}" if character in "*?[]\\^-" else character for character in text)


async def _check_queue(redis: Redis, keys: Keys, queue: str, limit: int) -> tuple[Finding, int]:
    """A finding about a queue, and how many of its jobs are waiting or running."""
    subject, key = f"queue {queue}", keys.jobs(queue)
    if not await redis.exists(key):
        return Finding("ok", subject, "no job has been added yet"), 0
    try:
        groups = {group["name"]: group for group in await redis.xinfo_groups(key)}
    except ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
        return Finding("error", subject, f"the key {key} is not a stream", f"choose another {variable('prefix')}"), 0
    group = groups.get(GROUP.encode())
    pending = int(group["pending"]) if group else 0
    consumers = await consumers_by_xinfo(redis, key) if pending else []
    lines = lines_among(queue, consumers)
    handed_over = sum(consumer.pending for consumer in consumers if consumer.name == HANDED_OVER)
    running = pending - handed_over - sum(line.jobs for line in lines)
    waiting = await waiting_in(redis, key)
    if limit and waiting >= limit:
        message = f"it is full: {waiting} jobs wait, and the limit is {limit}"
        fix = f"start more workers, or raise {variable('queue_limit')}"
        return Finding("warning", subject, message, fix), waiting + handed_over + running
    message = f"jobs that wait: {waiting}{_parked(lines)}; with a worker: {running}"
    if handed_over:
        message += f"; to be continued by another worker: {handed_over}"
    return Finding("ok", subject, message), waiting + handed_over + running


def _parked(lines: Iterable[ParkedLine]) -> str:
    """How many jobs are parked until a server has room for them, and for which models."""
    by_model = Counter[str]()
    for line in lines:
        model, _, _fallbacks = line.model.partition(BETWEEN_MODELS)
        by_model[model or "any model"] += line.jobs
    models = listed([f"{model} {jobs}" for model, jobs in by_model.most_common()])
    return f", of which parked until a server has room: {models}" if models else ""

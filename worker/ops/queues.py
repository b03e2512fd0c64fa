"""The queues: their jobs, whether a worker serves them, and the findings about that."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..broker.consumers import HANDED_OVER, consumers_by_xinfo
from ..broker.parked_jobs import lines_among
from ..broker.queue_depth import backlog_of
from ..contract.ids import EntryId
from ..contract.keys import DEFAULT_QUEUE, GROUP, Keys, is_queue_name
from ..contract.records import ControlEntry, WorkerRecord
from ..engine.outline import BETWEEN_MODELS
from ..redisio.cluster import servers_of
from ..redisio.errors import is_permission_denied, redacted_message
from ..settings import variable
from .findings import Finding, Level, listed
from .survey_types import QueueState
from .suspects import find_suspects, poison_findings
from .units import duration, instant

_KEYS_A_STEP = 1000
"""How many keys of Redis a step of the search for queues visits. It takes a few milliseconds of Redis's time."""

_LONG_WAIT = 5.0
"""Seconds that a job waits at least until full servers are a fault: short bursts fill them too."""

_NOT_A_NAME = "no worker can serve it: a queue's name has 1 to 64 characters of A-Za-z0-9_-"


def served_queues(records: Iterable[WorkerRecord]) -> Counter[str] | None:
    """How many workers serve each queue, by their records; None if that is not known. Draining workers take no jobs.

    It is not known if a worker of an early version has no list in its record.
    """
    counts = Counter[str]()
    for record in records:
        if not record.queues:
            return None
        counts.update(() if record.draining else record.queues)
    return counts


async def used_queues(redis: Redis, keys: Keys) -> set[str]:
    """The queues that workers and clients have used.

    Raises:
        RedisError: when Redis does not answer or denies the right to read them.
    """
    return {name.decode("utf-8", "replace") for name in cast("set[bytes]", await redis.smembers(keys.queues))}


async def find_queues(redis: Redis, keys: Keys) -> set[str] | None:
    """The queues whose stream exists in Redis; None if the user has no right to search.

    The search visits all keys. Only it finds a queue to which nobody but plain XADDs have added jobs.
    """
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


async def read_queues(
    redis: Redis,
    keys: Keys,
    names: Iterable[str],
    alive: Collection[WorkerRecord] | None,
    pauses: Mapping[str, ControlEntry],
    now: int,
) -> tuple[list[QueueState], list[str]]:
    """The states of queues, and the names of those that the user may not read.

    `alive` are the records of the live workers, None if the user may not read them. `pauses` are the paused queues, and
    `now` is Unix ms by Redis's clock.

    Raises:
        RedisError: when Redis does not answer.
    """
    states, unread = list[QueueState](), list[str]()
    served = None if alive is None else served_queues(alive)
    for name in names:
        workers = None if served is None else served.get(name, 0)
        try:
            state = await _read_queue(redis, keys, name, now)
            counts = [record.by_queue[name] for record in alive or () if name in record.by_queue]
            states.append(
                msgspec.structs.replace(
                    state,
                    workers=workers,
                    done_per_s=round(sum(one.finished_per_s for one in counts), 3),
                    failed=sum(one.failed for one in counts),
                    pause=pauses.get(name),
                )
            )
        except ResponseError as error:
            if is_permission_denied(error):
                unread.append(name)
            elif redacted_message(error).startswith("WRONGTYPE"):
                problem = f"the key {keys.jobs(name)} is not a stream"
                states.append(QueueState(name=name, workers=workers, problem=problem))
            else:
                raise
    return states, unread


async def _read_queue(redis: Redis, keys: Keys, name: str, now: int) -> QueueState:
    key = keys.jobs(name)
    backlog = await backlog_of(redis, key)
    consumers = await consumers_by_xinfo(redis, key)
    lines = lines_among(name, consumers)
    parked = Counter[str]()
    for line in lines:
        model, _, _fallbacks = line.model.partition(BETWEEN_MODELS)
        parked[model] += line.jobs
    handed_over = sum(consumer.pending for consumer in consumers if consumer.name == HANDED_OVER)
    pending = sum(consumer.pending for consumer in consumers)
    firsts = [backlog.first] if backlog.first else []
    pipe = redis.pipeline(transaction=False)
    for line in lines:
        pipe.xpending_range(key, GROUP, "-", "+", 1, line.consumer)
    if lines:
        replies = [reply for reply in await pipe.execute() if reply]
        firsts += [EntryId.parse(reply[0]["message_id"]).attempt for reply in replies]
    return QueueState(
        name=name,
        waiting=backlog.unread + parked.total(),
        oldest=max(0, now - min(firsts)) / 1000 if firsts else None,
        parked=dict(parked.most_common()),
        running=pending - handed_over - parked.total(),
        handed_over=handed_over,
        suspects=tuple(await find_suspects(redis, key)) if pending else (),
        problem="" if is_queue_name(name) else _NOT_A_NAME,
    )


def queue_findings(
    states: Iterable[QueueState],
    own: Collection[str] = (),
    *,
    lack: Level,
    limit: int = 0,
    workers_run: bool = True,
    full: Collection[str] = (),
    without_vllm: Collection[str] = (),
) -> list[Finding]:
    """Findings about queues: those of `own`, and others that have jobs or a problem.

    `lack` is the level if jobs wait that no worker takes. `limit` is the number of waiting jobs from which producers
    are refused; 0 for none. If no worker runs, that is a finding of its own. `full` are the queues of which no worker
    takes jobs, since all vLLM servers are full. `without_vllm` are those of which none does, since it reaches no
    server: the findings about the servers name that.
    """
    findings = []
    for state in states:
        is_held_back = state.name in full or (bool(state.parked) and state.name not in without_vllm)
        subject = f"queue {state.name}" if is_queue_name(state.name) else f"queue {state.name!r:.80}"
        jobs = _jobs_of(state)
        if state.pause is not None:
            findings.append(_pause_finding(state, state.pause, jobs))
        if state.problem == _NOT_A_NAME:
            message, fix = f"{state.problem}; {jobs}", "correct the name where jobs are added"
            findings.append(Finding(lack, subject, message, fix, "queue_unserved"))
        elif state.problem:
            fix = f"remove it, or choose another {variable('prefix')}"
            findings.append(Finding("error", subject, state.problem, fix, "queue_unserved"))
        elif workers_run and state.workers == 0 and state.unfinished:
            fix = f"start a worker with it in {variable('queues')}, or correct the name where jobs are added"
            level = lack if state.waiting or state.handed_over else "warning"  # else its worker drains, or has died
            findings.append(Finding(level, subject, f"no worker serves it; {jobs}", fix, "queue_unserved"))
        elif state.pause is not None:
            pass
        elif limit and state.waiting >= limit:
            message = f"it is full: {state.waiting} jobs wait, and the limit is {limit}"
            fix = f"start more workers, or raise {variable('queue_limit')}"
            findings.append(Finding("warning", subject, message, fix, "queue_full"))
        elif is_held_back and state.oldest is not None and state.oldest > _LONG_WAIT:
            message = f"the vLLM servers are full: its oldest waiting job is {duration(state.oldest)} old; {jobs}"
            fix = "add servers or workers, or wait: the jobs start as soon as a server has room"
            findings.append(Finding("warning", subject, message, fix, "vllm_full"))
        elif state.name in own or state.unfinished:
            findings.append(Finding("ok", subject, jobs))
        findings += poison_findings(state.name, state.suspects)
    return findings


def _pause_finding(state: QueueState, pause: ControlEntry, jobs: str) -> Finding:
    by = f" by {pause.by}" if pause.by else ""
    why = f" ({pause.why})" if pause.why else ""
    message = f"it is paused{by}{why}, {f'until {instant(pause.until)}' if pause.until else 'without an end'}; {jobs}"
    fix = f"worker resume {state.name} lets workers take its jobs again"
    return Finding("warning", f"queue {state.name}", message, fix, "queue_paused", pause.since)


def _jobs_of(state: QueueState) -> str:
    if not state.unfinished:
        return "no job waits or runs"
    message = f"jobs that wait: {state.waiting}"
    if state.parked:
        models = listed([f"{model or 'any model'} {jobs}" for model, jobs in state.parked.items()])
        message += f", of which parked until a server has room: {models}"
    message += f"; with a worker: {state.running}"
    return f"{message}; to be continued by another worker: {state.handed_over}" if state.handed_over else message

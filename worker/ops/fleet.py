"""The checks of the running workers, by their records: silent, paused or starting ones, and what differs among them."""

from collections.abc import Collection, Mapping
from math import inf

from ..contract.records import WorkerRecord
from ..engine.intake import NO_VLLM, REDIS_AWAY, REDIS_FULL, REDIS_LOGIN, REDIS_REFUSES, VLLM_FULL
from ..redisio.advice import MORE_ROOM
from ..settings import variable
from ..vllm.errors import UNAUTHORIZED
from .findings import Fault, Finding, Level, grouped, listed
from .servers import server_findings
from .survey_types import StateOfWorker, WorkerState

_PAUSED_FIXES = {
    NO_VLLM: "start a vLLM server that the worker can reach: its log has the reason for each server (vllm_away)",
    VLLM_FULL: "every vLLM server has as many requests as it can answer now: add servers if jobs wait too long",
    REDIS_FULL: f"Redis has no free memory: {MORE_ROOM}",
    REDIS_REFUSES: "Redis refused its writes or connections: see its log, and the findings of this check about Redis",
    REDIS_LOGIN: f"Redis refused its password or user: correct {variable('redis_url')} and restart it",
    REDIS_AWAY: "Redis did not answer the worker: check the network between them",
}
"""How to fix a worker that takes no jobs, by its reason."""

_PAUSE_FAULTS: Mapping[str, Fault] = {
    NO_VLLM: "vllm_away",
    REDIS_FULL: "redis_full",
    REDIS_REFUSES: "redis_refuses",
    REDIS_LOGIN: "redis_login",
    REDIS_AWAY: "redis_away",
    VLLM_FULL: "",  # no fault while no job waits long
}
"""The fault that such a worker has, by its reason."""

_LEAST_SILENCE = 5.0

_SLOW_START = 60
"""Seconds after which a worker that has not probed its servers is a warning."""


def silence_of(record: WorkerRecord, now: float) -> float:
    """The seconds since a worker renewed its record. `now` is in seconds by Redis's clock."""
    return now - record.beat / 1000


def is_silent(
    record: WorkerRecord, now: float, lease: float, *, is_connected: bool | None = None, renewable_for: float = inf
) -> bool:
    """Whether a worker has not renewed its record for half a lease, in which it does so three times.

    A quarter suffices if its connection to Redis is closed; `is_connected` is None if that is not known. A pause of the
    machine ends a short lease without a fault of the worker: `_LEAST_SILENCE` is allowed, up to a whole lease. `lease`
    is that of a record without one, and `renewable_for` is how long records could be renewed, both in seconds.
    """
    own = record.lease or lease
    part = 4 if is_connected is False else 2
    return min(silence_of(record, now), renewable_for) > min(own, max(own / part, _LEAST_SILENCE * 2 / part))


def worker_states(
    records: Mapping[str, WorkerRecord],
    alive: Collection[str],
    now: float,
    *,
    is_renewable: bool,
    connected: Mapping[str, bool],
) -> list[WorkerState]:
    """The states of the workers, by name. `alive` are the names of those that are not silent.

    `is_renewable` is whether Redis lets workers renew their records. The record of a silent worker, and every record
    that is not renewable, is of the past: there are no rates, and streams have been silent since then at least.
    """
    states = []
    for name, record in sorted(records.items()):
        age, is_current = silence_of(record, now), is_renewable and name in alive
        state: StateOfWorker = "silent"
        if is_current:
            state = _state_of(record)
        elif name in alive:
            state = "connected" if connected.get(name) else "unknown"
        states.append(
            WorkerState(
                name=name,
                state=state,
                reason=record.paused if is_renewable else "",
                queues=record.queues,
                running=record.running,
                slots=record.slots,
                finished=record.finished,
                failed=record.failed,
                done_per_s=record.finished_per_s if is_current else 0.0,
                tokens_per_s=record.tokens_per_s if is_current else 0.0,
                silence=record.silence if is_current else round(record.silence + age, 1),
                paused_queues=record.paused_queues,
                version=record.version,
                age=max(0.0, round(age, 1)),
                host=record.host,
                pid=record.pid,
            )
        )
    return states


def _state_of(record: WorkerRecord) -> StateOfWorker:
    if record.draining:
        return "draining"
    if record.starting:
        return "starting"
    return "paused" if record.paused else "working"


def fleet_findings(
    records: Mapping[str, WorkerRecord],
    alive: Mapping[str, WorkerRecord],
    now: float,
    *,
    lease: float,
    unfinished: int,
    connected: Mapping[str, bool],
    is_renewable: bool,
) -> list[Finding]:
    """Findings about the workers, by their records.

    `alive` are those that are not silent, and `connected` is whether a worker is connected to Redis, as far as that is
    known. `now` is in seconds by Redis's clock. `lease` is that of the settings; 0 if it is not to be compared with
    that of the workers. `unfinished` is the number of jobs to be done. The record of a killed worker remains for ten
    leases. Nothing is concluded from records that Redis lets nobody renew (`is_renewable`).
    """
    findings: list[Finding] = []
    for name, record in sorted(records.items()):
        if name not in alive:
            findings.append(_silent_finding(record, now, is_connected=connected.get(name)))
        elif is_renewable:
            findings += _check_state(name, record, now)
    slots = sum(record.slots for record in alive.values())
    running = sum(record.running for record in alive.values())
    if not alive:
        if unfinished:
            message = f"no worker runs; jobs to be done: {unfinished}"
            return [Finding("error", "workers", message, "start one: worker run", "no_worker"), *findings]
        return [Finding("ok", "workers", "no worker runs" if findings else "no worker runs yet"), *findings]
    if not is_renewable:
        return findings
    message = f"alive: {len(alive)}; of their {slots} slots in use: {running}"
    return [
        Finding("ok", "workers", message),
        *_compare_leases(alive, lease),
        *versions_finding("workers", {name: record.version for name, record in alive.items()}),
        *server_findings(alive),
        *findings,
    ]


def _silent_finding(record: WorkerRecord, now: float, *, is_connected: bool | None) -> Finding:
    """The finding about a silent worker. The kernel closes the connections of a killed process, not of a stopped one.

    `is_connected` is None if that is not known.
    """
    process = f"process {record.pid} on {record.host}" if record.host else "its process"
    message = f"it has been silent for {silence_of(record, now):.0f} s"
    fault: Fault = "worker_silent"
    fix = f"check whether it still runs ({process}); if so, its log has why it does not reach Redis (clock_failed)"
    if is_connected:
        fault, message = "worker_blocked", f"{message}, and its connection to Redis is open: it is stopped or stuck"
        fix = f"look at {process}, and kill it if it does not continue: other workers take over its jobs"
    elif is_connected is not None:
        fault, message = "worker_dead", f"{message}, and its connection to Redis is closed: it was killed or cut off"
        fix = f"find out why {process} has ended, and start it again: other workers take over its jobs"
    return Finding("warning", f"worker {record.name}", message, fix, fault, record.beat)


def _check_state(name: str, record: WorkerRecord, now: float) -> list[Finding]:
    subject = f"worker {name}"
    if record.paused:
        fix = _PAUSED_FIXES.get(record.paused, "see its log")  # a later version may have other reasons
        if record.paused == NO_VLLM and (away := _away(record)):  # the findings about the servers name the fault
            refused = any(server.reason == UNAUTHORIZED for server in record.servers)
            fix = f"correct its {variable('vllm_api_key')}" if refused else fix
            return [Finding("warning", subject, f"it takes no jobs at the moment: {NO_VLLM} ({away})", fix)]
        level: Level = "ok" if record.paused == VLLM_FULL else "warning"  # a full vLLM is no fault
        fault = _PAUSE_FAULTS.get(record.paused, "")
        return [Finding(level, subject, f"it takes no jobs at the moment: {record.paused}", fix, fault)]
    if record.starting and now - record.started / 1000 > _SLOW_START:
        slow = [server.url for server in record.servers if server.state == "starting"]
        message = f"it takes no jobs yet: it waits for an answer of {listed(slow)}"
        fix = f"start vLLM there, or correct {variable('vllm_urls')}"
        return [Finding("warning", subject, message, fix, "vllm_away", record.started)]
    if record.starting:
        return [Finding("ok", subject, "it is starting: it has not probed its vLLM servers yet")]
    return []


def _away(record: WorkerRecord) -> str:
    """Why each of a worker's servers is away; empty if that is not known."""
    return listed([f"{server.url}: {server.reason}" for server in record.servers if server.state == "away"])


def _compare_leases(alive: Mapping[str, WorkerRecord], lease: float) -> list[Finding]:
    """Unequal leases: a worker with a shorter lease takes over jobs that the others still renew in time."""
    by_lease = grouped({name: record.lease for name, record in alive.items() if record.lease})
    if len(by_lease) > 1:
        message = "; ".join(f"{value:g} s: {listed(names)}" for value, names in sorted(by_lease.items()))
        fix = (
            f"give all workers the same {variable('lease')}: those with the shorter one take running jobs of the others"
        )
        return [Finding("warning", "workers", f"their leases differ ({message})", fix, "leases_differ")]
    if by_lease and lease and lease not in by_lease:
        (other,) = by_lease
        message = f"their lease is {other:g} s, and {variable('lease')} is {lease:g} s here"
        return [
            Finding("warning", "workers", message, f"set {variable('lease')} to {other:g} for a worker beside them")
        ]
    return []


def versions_finding(subject: str, versions: Mapping[str, str]) -> list[Finding]:
    """The finding that the versions of some processes differ, by their names; none if the versions are equal."""
    by_version = grouped({name: version or "unknown" for name, version in versions.items()})
    if len(by_version) < 2:
        return []
    message = "; ".join(f"{version}: {listed(names)}" for version, names in sorted(by_version.items()))
    return [Finding("ok", subject, f"their versions differ, as during a deploy ({message})")]

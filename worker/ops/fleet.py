"""The checks of the running workers, by their records: silent, paused or starting ones, and what differs among them."""

from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from redis.asyncio import Redis

from ..broker.worker_registry import WorkerRegistry
from ..contract.keys import Keys
from ..contract.records import REFUSES_ALL, WorkerRecord
from ..engine.intake import NO_VLLM, REDIS_AWAY, REDIS_FULL, REDIS_LOGIN, REDIS_REFUSES, VLLM_FULL
from ..redisio.advice import MORE_ROOM
from ..settings import variable
from ..vllm.errors import UNAUTHORIZED
from .findings import Finding, Level, listed

_V = TypeVar("_V", str, float)

_PAUSED_FIXES = {
    NO_VLLM: "start a vLLM server that the worker can reach: its log has the reason for each server (vllm_away)",
    VLLM_FULL: "every vLLM server has as many requests as it can answer now: add servers if jobs wait too long",
    REDIS_FULL: f"Redis has no free memory: {MORE_ROOM}",
    REDIS_REFUSES: "Redis refused its writes or connections: see its log, and the findings of this check about Redis",
    REDIS_LOGIN: f"Redis refused its password or user: correct {variable('redis_url')} and restart it",
    REDIS_AWAY: "Redis did not answer the worker: check the network between them",
}
"""How to fix a worker that takes no jobs, by its reason."""

_THIS_HOST = ("localhost", "127.0.0.1", "::1", "host.docker.internal")

_SLOW_START = 60
"""Seconds after which a worker that has not probed its servers is a warning."""


async def check_fleet(redis: Redis, keys: Keys, lease: float, unfinished: int) -> list[Finding]:
    """Findings about the workers. `lease` is that of the settings, `unfinished` the number of jobs to be done.

    The record of a killed worker remains for ten leases.
    """
    seconds, _ = await redis.time()
    findings: list[Finding] = []
    alive: dict[str, WorkerRecord] = {}
    for name, record in sorted((await WorkerRegistry(redis, keys).records()).items()):
        silent = seconds - record.beat // 1000
        if silent > (record.lease or lease):
            where = f" (process {record.pid} on {record.host})" if record.host else ""
            fix = f"check whether it still runs{where}; if so, its log has why it does not reach Redis (clock_failed)"
            findings.append(Finding("warning", f"worker {name}", f"it has been silent for {silent} s", fix))
            continue
        alive[name] = record
        findings += _check_state(name, record, seconds)
    slots = sum(record.slots for record in alive.values())
    running = sum(record.running for record in alive.values())
    if not alive:
        if unfinished:
            message = f"no worker runs; jobs to be done: {unfinished}"
            return [Finding("warning", "workers", message, "start one: worker run"), *findings]
        return [Finding("ok", "workers", "no worker runs" if findings else "no worker runs yet"), *findings]
    message = f"alive: {len(alive)}; of their {slots} slots in use: {running}"
    return [
        Finding("ok", "workers", message),
        *_compare_leases(alive, lease),
        *_compare_versions(alive),
        *_compare_servers(alive),
        *findings,
    ]


def _check_state(name: str, record: WorkerRecord, now: float) -> list[Finding]:
    subject = f"worker {name}"
    if record.paused:
        fix = _PAUSED_FIXES.get(record.paused, "see its log")  # a later version may have other reasons
        if record.paused == NO_VLLM and (away := _away(record)):
            refused = any(server.reason == UNAUTHORIZED for server in record.servers)
            fix = f"correct its {variable('vllm_api_key')}" if refused else fix
            return [Finding("warning", subject, f"it takes no jobs at the moment: {NO_VLLM} ({away})", fix)]
        level: Level = "ok" if record.paused == VLLM_FULL else "warning"  # a full vLLM is no fault
        return [Finding(level, subject, f"it takes no jobs at the moment: {record.paused}", fix)]
    if record.starting and now - record.started / 1000 > _SLOW_START:
        slow = [server.url for server in record.servers if server.state == "starting"]
        message = f"it takes no jobs yet: it waits for an answer of {listed(slow)}"
        return [Finding("warning", subject, message, f"start vLLM there, or correct {variable('vllm_urls')}")]
    if record.starting:
        return [Finding("ok", subject, "it is starting: it has not probed its vLLM servers yet")]
    return []


def _away(record: WorkerRecord) -> str:
    """Why each of a worker's servers is away; empty if that is not known."""
    return listed([f"{server.url}: {server.reason}" for server in record.servers if server.state == "away"])


def _compare_leases(alive: Mapping[str, WorkerRecord], lease: float) -> list[Finding]:
    """Unequal leases: a worker with a shorter lease takes over jobs that the others still renew in time."""
    by_lease = _grouped({name: record.lease for name, record in alive.items() if record.lease})
    if len(by_lease) > 1:
        message = "; ".join(f"{value:g} s: {listed(names)}" for value, names in sorted(by_lease.items()))
        fix = (
            f"give all workers the same {variable('lease')}: those with the shorter one take running jobs of the others"
        )
        return [Finding("warning", "workers", f"their leases differ ({message})", fix)]
    if by_lease and lease not in by_lease:
        (other,) = by_lease
        message = f"their lease is {other:g} s, and {variable('lease')} is {lease:g} s here"
        return [
            Finding("warning", "workers", message, f"set {variable('lease')} to {other:g} for a worker beside them")
        ]
    return []


def _compare_versions(alive: Mapping[str, WorkerRecord]) -> list[Finding]:
    by_version = _grouped({name: record.version or "unknown" for name, record in alive.items()})
    if len(by_version) < 2:
        return []
    message = "; ".join(f"{version}: {listed(names)}" for version, names in sorted(by_version.items()))
    return [Finding("ok", "workers", f"their versions differ, as during a deploy ({message})")]


def _compare_servers(alive: Mapping[str, WorkerRecord]) -> list[Finding]:
    """What the workers see of each vLLM server: their requests and limits there, and where they do not agree."""
    seen = {
        name: {_place(server.url, record.host): server for server in record.servers}
        for name, record in alive.items()
        if record.servers
    }
    findings = []
    for url in sorted({url for servers in seen.values() for url in servers}):
        there = {name: servers[url] for name, servers in seen.items() if url in servers}
        subject = f"workers at vLLM {url}"
        message = f"requests of theirs: {sum(server.requests for server in there.values())}"
        if limit := sum(server.limit for server in there.values()):
            message += f"; their limits, learnt from the server: {limit:.0f}"
        if without := [name for name in seen if name not in there]:
            message += f"; not in {variable('vllm_urls')} of {listed(without)}"
        findings.append(Finding("ok", subject, message))
        away = {name: server.reason or "away" for name, server in there.items() if server.state == "away"}
        if up := [name for name, server in there.items() if server.state == "up"] if away else []:
            reasons = "; ".join(f"{reason}: {listed(names)}" for reason, names in sorted(_grouped(away).items()))
            fix = "check the network and the keys of the workers for which it is away"
            findings.append(
                Finding("warning", subject, f"it is up for {listed(up)}, and away for others ({reasons})", fix)
            )
        if refused := [name for name, server in there.items() if server.reason == REFUSES_ALL]:
            message = f"it has refused every request of {listed(refused)} for half a minute (429, 503); their jobs wait"
            fix = "add servers if other clients fill it; if it is a proxy, see its log: it may have no server behind it"
            findings.append(Finding("warning", subject, message, fix))
    return findings


def _place(url: str, host: str) -> str:
    """The URL of a server, with the worker's host if the URL means that host."""
    return f"{url} of {host}" if urlsplit(url).hostname in _THIS_HOST else url


def _grouped(values: Mapping[str, _V]) -> dict[_V, list[str]]:
    """The names that have each value."""
    groups: dict[_V, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups

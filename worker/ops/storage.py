"""Redis as a store: its version, mode, memory and writes, and who was refused a login; the findings about these."""

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..broker.job_queue import JobQueue
from ..contract.keys import Keys
from ..redisio.advice import MORE_ROOM, advice_on
from ..redisio.clients import OLDEST
from ..redisio.errors import is_permission_denied, redacted_message
from ..settings import variable
from .findings import Finding
from .survey_types import RedisState
from .units import size

_REFUSALS_READ = 32
_USER_SHOWN = 60
"""Characters of the name of a user that is shown. The program that tries to log in has chosen it."""
_REFUSED_LATELY = 30.0
"""Seconds for which a refused login is a fault. A worker tries again every two seconds at the latest."""

_NEARLY_FULL = 0.9


async def read_info(server: Redis) -> dict[str, object]:
    """INFO of a server; empty if the user has no right to INFO."""
    try:
        return dict(await server.info())
    except ResponseError as error:
        if is_permission_denied(error):
            return {}
        raise


def version_or_mode_finding(where: str, info: Mapping[str, object], wanted: str) -> Finding | None:
    """What is wrong with the version or the mode of a server, if something is. `wanted` is the mode."""
    version = str(info.get("redis_version", "7.0"))  # Valkey states here the version with which it is compatible
    mode = info.get("redis_mode") or info.get("server_mode") or wanted  # Valkey has only the second
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return Finding("error", where, f"version {version} is too old", "use Redis 6.2 or later")
    if mode != wanted:
        fix = f"set {variable('redis_url')} to a URL that begins with redis+{mode}://"
        return Finding("error", where, f"it runs in {mode} mode", fix)
    return None


def redis_state(where: str, info: Mapping[str, object]) -> RedisState:
    """The state of a server, by INFO."""
    valkey = info.get("valkey_version")
    return RedisState(
        name=where,
        version=f"Valkey {valkey}" if valkey else str(info.get("redis_version", "")),
        used=int(str(info.get("used_memory", 0))),
        limit=int(str(info.get("maxmemory", 0))),
    )


def is_full(state: RedisState) -> bool:
    """Whether Redis refuses writes because its memory is full."""
    return 0 < state.limit <= state.used


def storage_findings(state: RedisState, info: Mapping[str, object]) -> list[Finding]:
    """Findings about the memory and the persistence of a server; none if its INFO may not be read."""
    if not info:
        return []
    where = state.name
    version = state.version if state.version.startswith("Valkey") else f"version {state.version}"
    findings = [Finding("ok", where, f"{version} answers")]
    if is_full(state):
        message = f"it is full: {state.used} of {state.limit} bytes (maxmemory) are used, and nothing can be written"
        findings.append(Finding("error", where, message, MORE_ROOM, "redis_full"))
    elif state.limit and state.used >= _NEARLY_FULL * state.limit:
        message = f"it is nearly full: {size(state.used)} of {size(state.limit)} (maxmemory) are used"
        findings.append(Finding("warning", where, message, MORE_ROOM, "redis_full"))
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        message = f"maxmemory-policy is {policy}: Redis may drop a log that is being written"
        findings.append(Finding("warning", where, message, "set maxmemory-policy to noeviction"))
    if not info.get("aof_enabled") and info.get("role") == "master":
        message = "the append-only file is off: a restart of Redis loses waiting jobs and logs"
        findings.append(Finding("warning", where, message, "set appendonly to yes"))
    return findings


def renewable_for(infos: Iterable[Mapping[str, object]], *, refuses: bool) -> float | None:
    """For how many seconds workers could renew their records, by INFO of the servers; 0 while Redis `refuses` writes.

    None if a server is a replica: its workers are connected to its master.
    """
    infos = list(infos)
    if any(info.get("role") == "slave" for info in infos):
        return None
    # INFO has whole seconds: 0 in the first one, in which Redis takes writes as well.
    return 0.0 if refuses else 1 + min(float(str(info.get("uptime_in_seconds", inf))) for info in infos)


async def write_finding(redis: Redis, where: str, keys: Keys) -> Finding | None:
    """Try a write that changes nothing; what is wrong if Redis refuses it.

    Redis may refuse only writes, as on a replica, with a full disk, or with too few replicas.
    """
    try:
        await JobQueue(redis, redis, keys, "check", lease=1).probe_writable()
    except ResponseError as error:
        if is_permission_denied(error):
            return None
        message = f"it refuses writes: {redacted_message(error)}"
        return Finding("error", where, message, advice_on(error), "redis_refuses")
    return None


async def login_findings(server: Redis, where: str) -> list[Finding]:
    """Findings about clients whose password or user a server has refused lately, by its ACL LOG.

    Raises:
        ResponseError: when the user has no right to ACL LOG.
    """
    refused: dict[tuple[str, str], None] = {}
    for entry in cast("list[dict[str, Any]]", await server.acl_log(_REFUSALS_READ)):
        if entry["reason"] == "auth" and float(entry["age-seconds"]) < _REFUSED_LATELY:
            refused[entry["username"][:_USER_SHOWN], str(entry["client-info"]["addr"]).rpartition(":")[0]] = None
    fix = f"correct the password in {variable('redis_url')} of that process, or set it for the user: ACL SETUSER"
    return [
        Finding(
            "warning", where, f"it refused the password of user `{user}` to a client of {client}", fix, "redis_login"
        )
        for user, client in refused
    ]

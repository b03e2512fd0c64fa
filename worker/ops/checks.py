"""The checks of `worker check`: settings, Redis, workers and vLLM servers, each with a fix for what is wrong."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..contract.keys import Keys
from ..redisio.advice import advice_on, advice_on_no_answer, advice_on_silence
from ..redisio.clients import COMMAND_TIMEOUT, command_client
from ..redisio.cluster import ClusterClient, servers_of
from ..redisio.errors import redacted_message
from ..redisio.urls import database_of, parse_redis_url
from ..settings import ConfigError, Settings, load_settings, redacted_url, variable
from ..vllm.errors import UpstreamError
from ..vllm.servers.api import LateAnswer
from ..vllm.servers.pace import ServerPace
from ..vllm.servers.pool import ServerPool
from ..vllm.servers.server import Server
from ..vllm.stream.watchdog import StreamTimeouts
from .findings import Finding, Level, listed
from .fleet import fleet_findings
from .gateways import gateway_findings
from .lifecycle_groups import lifecycle_findings
from .memory_forecast import check_memory
from .queues import queue_findings
from .reading import read_installation
from .rights import Missing, find_missing
from .storage import (
    is_full,
    read_info,
    redis_state,
    renewable_for,
    storage_findings,
    version_or_mode_finding,
    write_finding,
)

_ALL_RIGHTS = "the line `worker` of deploy/redis/users.acl has all"
_SEE_SETTINGS = "worker run --help lists all settings with their meaning"


async def check(
    options: dict[str, object], *, pace: ServerPace | None = None, redis_timeout: float = COMMAND_TIMEOUT
) -> AsyncGenerator[Finding]:
    """Check everything, one finding at a time. A caller that stops early must close it (`contextlib.aclosing`).

    `pace` has the time limits for the vLLM servers, `redis_timeout` is that of a command to Redis, in seconds.
    """
    try:
        settings = load_settings(**options)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("error", "settings", problem, _SEE_SETTINGS)
        return
    yield Finding("ok", "settings", "every setting has a valid value")
    if settings.unknown:
        message = f"variables that are not settings are ignored: {', '.join(settings.unknown)}"
        yield Finding("warning", "settings", message, _SEE_SETTINGS)
    if ignored := parse_redis_url(settings.redis_url.get_secret_value()).ignored:
        message = f"options of {variable('redis_url')} without effect: {', '.join(ignored)}"
        yield Finding("warning", "settings", message, "remove them: the worker sets these itself")
    async with aclosing(_check_redis(settings, redis_timeout)) as of_redis:
        async for finding in of_redis:
            yield finding
    pool = ServerPool(
        settings.vllm_urls,
        keys=settings.api_keys(),
        limits=StreamTimeouts(connect=settings.connect_timeout),
        pace=pace,
    )
    try:
        of_servers = [await _check_vllm(pool, server) for server in pool.servers]
        one_works = any(finding.level == "ok" for finding in of_servers)
        for finding in of_servers:
            yield replace(finding, level="warning") if one_works and finding.level == "error" else finding
    finally:
        await pool.aclose()


async def _check_redis(settings: Settings, redis_timeout: float) -> AsyncGenerator[Finding]:
    url = settings.redis_url.get_secret_value()
    where = f"Redis {redacted_url(url)}"
    redis = command_client(url, timeout=redis_timeout)
    keys = Keys(settings.prefix, database_of(url))
    try:
        is_cluster = isinstance(redis, ClusterClient)
        servers, full = await servers_of(redis), False
        infos = list[dict[str, object]]()
        for number, server in enumerate(servers, 1):
            name = f"{where}, master {number} of {len(servers)}" if is_cluster else where
            info = await read_info(server)
            infos.append(info)
            if wrong := version_or_mode_finding(name, info, "cluster" if is_cluster else "standalone"):
                yield wrong
                return
            state = redis_state(name, info)
            full |= is_full(state)
            for finding in storage_findings(state, info):
                yield finding
        refusal = None if full else await write_finding(redis, where, keys)
        if refusal:
            yield refusal
        rights = [finding async for finding in _check_rights(servers, where, keys, settings)]
        for finding in rights:
            yield finding
        if not any(finding.level == "error" for finding in rights):  # else Redis would refuse the commands that follow
            renewable = renewable_for(infos, refuses=full or refusal is not None)
            for finding in await check_memory(redis, keys, where):
                yield finding
            async with aclosing(_check_queues_and_workers(redis, keys, settings, renewable)) as findings:
                async for finding in findings:
                    yield finding
    except (RedisError, OSError) as error:
        advice = advice_on(error) or await advice_on_silence(url) or advice_on_no_answer(error)
        yield Finding("error", where, redacted_message(error), advice)
    finally:
        await redis.aclose()


async def _check_rights(servers: list[Redis], where: str, keys: Keys, settings: Settings) -> AsyncGenerator[Finding]:
    """Report the rights that the user lacks, and the commands that Redis lacks."""
    found: dict[Missing, None] = {}
    kind, replicas = parse_redis_url(settings.redis_url.get_secret_value()).kind, settings.wait_replicas > 0
    for server in servers:
        missing = await find_missing(server, keys, settings.queues, cluster=kind == "cluster", replicas=replicas)
        found |= dict.fromkeys(missing)
    needed = [missing for missing in found if not missing.without]
    if needed:
        yield _missing_rights("error", where, "no job can be done", needed)
    names = {missing.name for missing in needed}
    others = [missing for missing in found if missing.name not in names]
    for without in dict.fromkeys(missing.without for missing in others):
        yield _missing_rights("warning", where, without, [one for one in others if one.without == without])


def _missing_rights(level: Level, where: str, consequence: str, found: list[Missing]) -> Finding:
    rights, commands, keys = (
        list(dict.fromkeys(missing.name for missing in found if missing.kind == kind))
        for kind in ("right", "command", "key")
    )
    causes, fixes = [], []
    if rights:
        causes.append(f"the user lacks the rights {' '.join(rights)}")
        fixes.append(f"ACL SETUSER <user> {' '.join(rights)} ({_ALL_RIGHTS})")
    if commands:
        causes.append(f"Redis does not know {', '.join(commands)}: renamed or disabled")
        fixes.append("restore the names of the commands (rename-command in Redis's configuration)")
    if keys:
        causes.append(f"other data is stored at {', '.join(keys)}")
        fixes.append(f"remove it, or choose another {variable('prefix')}")
    return Finding(level, where, f"{consequence}: {'; '.join(causes)}", "; ".join(fixes))


async def _check_queues_and_workers(
    redis: Redis, keys: Keys, settings: Settings, renewable_for: float | None
) -> AsyncGenerator[Finding]:
    """Report the queues and the workers, as far as the user may read them.

    What is wrong with other workers is a warning, and so is a lack of them: it keeps no further worker from its work.
    """
    own = list(settings.queues)
    reading = await read_installation(redis, keys, settings.lease, own, renewable_for=renewable_for)
    for finding in queue_findings(
        reading.queues,
        own,
        lack="warning",
        limit=settings.queue_limit,
        workers_run=bool(reading.alive),
        full=reading.full_queues,
        without_vllm=reading.queues_without_vllm,
    ):
        yield finding
    if reading.searched is None and own:
        message = f"queues other than {listed(own)} were not searched for: the user has no right to +scan"
        yield Finding("ok", "queues", message)
    if reading.records is not None:  # else _check_rights has reported it
        for finding in fleet_findings(
            reading.records,
            reading.alive,
            reading.now,
            lease=settings.lease,
            unfinished=sum(state.unfinished for state in reading.queues),
            connected=reading.connected,
            is_renewable=reading.is_renewable,
        ):
            yield replace(finding, level="warning") if finding.level == "error" else finding
    found = gateway_findings(reading.gateways)
    with reading.noted_if_denied("groups of the lifecycle"):
        found += await lifecycle_findings(redis, keys, reading.now)
    for finding in found:
        yield finding


async def _check_vllm(pool: ServerPool, server: Server) -> Finding:
    where = f"vLLM {redacted_url(server.url)}"
    try:
        models = await pool.list_models(server)
    except LateAnswer as late:
        return Finding("error", where, late.message, "check whether it is busy: workers give it more time to answer")
    except UpstreamError as error:
        fix = error.fix or (
            f"set {variable('vllm_api_key')} to the key that the server was started with"
            if error.code == "unauthorized"
            else f"start vLLM there, or set {variable('vllm_urls')}"
        )
        return Finding("error", where, error.message.removesuffix(f"; {error.fix}"), fix)
    return Finding("ok", where, f"serves {', '.join(models) or 'no model'}")

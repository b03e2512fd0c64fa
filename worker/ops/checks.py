"""What `worker check` looks at: settings, Redis, workers and every vLLM server, and how to mend what is wrong."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from redis.asyncio import Redis
from redis.exceptions import (
    RedisError,
    ResponseError,
)

from ..broker.job_queue import JobQueue
from ..broker.ledger import Ledger
from ..broker.queue_depth import waiting_in
from ..contract.entries import Object
from ..contract.keys import GROUP, Keys
from ..engine.intake import NO_VLLM, REDIS_AWAY, REDIS_FULL, REDIS_REFUSES
from ..redisio.advice import MORE_ROOM, advice_on, advice_on_silence
from ..redisio.clients import OLDEST, command_client
from ..redisio.cluster import ClusterClient, servers_of
from ..redisio.errors import is_permission_denied, redacted_message
from ..redisio.urls import database_of, parse_redis_url
from ..settings import ConfigError, Settings, load_settings, shown_url, variable
from ..vllm.errors import UpstreamError
from ..vllm.servers.api import Late
from ..vllm.servers.pool import Server, ServerPool
from ..vllm.stream.chat_stream import StreamTimeouts
from .rights import Missing, find_missing

_WHEN_PAUSED = {
    NO_VLLM: "start a vLLM server that it can reach: its log says what is wrong with each (vllm_away)",
    REDIS_FULL: f"Redis has no memory for more: {MORE_ROOM}",
    REDIS_REFUSES: "Redis took no writes: see what is said of it here",
    REDIS_AWAY: "Redis did not answer it: see to the network between them",
}
"""What to do about a worker that takes no jobs, by its reason."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `level` is ok, warning or error; `mend` says what to do."""

    level: str
    subject: str
    text: str
    mend: str = ""

    def as_dict(self) -> Object:
        """For `--json`."""
        return {"level": self.level, "subject": self.subject, "text": self.text, "mend": self.mend}


async def check(options: dict[str, object]) -> AsyncGenerator[Finding]:
    """Look at everything, one finding at a time; a caller that stops early closes it (`contextlib.aclosing`)."""
    try:
        settings = load_settings(**options)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("error", "settings", problem, "worker run --help lists all settings with their meaning")
        return
    yield Finding("ok", "settings", "every setting has a good value")
    if settings.unknown:
        text = f"variables that are no settings are passed over: {', '.join(settings.unknown)}"
        yield Finding("warning", "settings", text, "worker run --help lists all settings with their meaning")
    if passed_over := parse_redis_url(settings.redis_url.get_secret_value()).passed_over:
        text = f"options of {variable('redis_url')} without effect: {', '.join(passed_over)}"
        yield Finding("warning", "settings", text, "leave them out: the worker sets these by itself")
    async with aclosing(_check_redis(settings)) as of_redis:
        async for finding in of_redis:
            yield finding
    upstream = ServerPool(
        settings.vllm_urls,
        keys=settings.api_keys(),
        limits=StreamTimeouts(connect=settings.connect_timeout),
    )
    try:
        servers = [await _check_vllm(upstream, endpoint) for endpoint in upstream.servers]
        enough = any(finding.level == "ok" for finding in servers)
        for finding in servers:
            yield replace(finding, level="warning") if enough and finding.level == "error" else finding
    finally:
        await upstream.aclose()


async def _check_redis(settings: Settings) -> AsyncGenerator[Finding]:
    url = settings.redis_url.get_secret_value()
    where = f"Redis {shown_url(url)}"
    redis = command_client(url)
    keys = Keys(settings.prefix, database_of(url))
    try:
        is_cluster = isinstance(redis, ClusterClient)
        servers, is_full = await servers_of(redis), False
        for number, server in enumerate(servers, 1):
            name = f"{where}, master {number} of {len(servers)}" if is_cluster else where
            info = await _info(server)
            if wrong := _wrong_server(name, info, "cluster" if is_cluster else "standalone"):
                yield wrong
                return
            for finding in _storage_findings(name, info):
                is_full |= finding.level == "error"
                yield finding
        refusal = None if is_full else await _check_writing(redis, where, keys, settings.lease)
        if refusal:
            yield refusal
        rights = [finding async for finding in _check_rights(servers, where, keys, settings)]
        for finding in rights:
            yield finding
        if not any(finding.level == "error" for finding in rights):  # else all that comes would be refused
            # While Redis takes no writes no worker can show that it lives.
            async with aclosing(_check_state(redis, keys, settings, workers=not (is_full or refusal))) as state:
                async for finding in state:
                    yield finding
    except (RedisError, OSError) as error:
        advice = (
            advice_on(error) or await advice_on_silence(url) or f"start Redis there, or set {variable('redis_url')}"
        )
        yield Finding("error", where, redacted_message(error), advice)
    finally:
        await redis.aclose()


async def _info(server: Redis) -> dict[str, object]:
    """What a server says of itself; nothing where the user may not ask, which is told with what else is missing."""
    try:
        return dict(await server.info())
    except ResponseError as error:
        if is_permission_denied(error):
            return {}
        raise


async def _check_state(redis: Redis, keys: Keys, settings: Settings, *, workers: bool) -> AsyncGenerator[Finding]:
    """The queues and the workers, as far as the user may see them."""
    undone = 0
    for queue in settings.queues:
        try:
            finding, jobs = await _check_queue(redis, keys, queue, settings.queue_limit)
        except ResponseError as error:
            if not is_permission_denied(error):
                raise
            continue
        undone += jobs
        yield finding
    try:
        findings = await _worker_findings(redis, keys, settings.lease, undone) if workers else []
    except ResponseError as error:
        if not (is_permission_denied(error) or str(error).startswith("WRONGTYPE")):  # which is told by now
            raise
        return
    for finding in findings:
        yield finding


async def _check_writing(redis: Redis, where: str, keys: Keys, lease: float) -> Finding | None:
    """Reading works where writing does not: on a replica, without room on the disk, with too few replicas."""
    try:
        await JobQueue(redis, redis, keys, "check", lease).probe_writable()
    except ResponseError as error:
        if is_permission_denied(error):
            return None
        return Finding("error", where, f"it takes no writes: {redacted_message(error)}", advice_on(error))
    return None


async def _check_rights(servers: list[Redis], where: str, keys: Keys, settings: Settings) -> AsyncGenerator[Finding]:
    """What the user may not do, and what Redis cannot."""
    lacks: dict[Missing, None] = {}
    kind, replicas = parse_redis_url(settings.redis_url.get_secret_value()).kind, settings.wait_replicas > 0
    for server in servers:
        found = await find_missing(server, keys, settings.queues, cluster=kind == "cluster", replicas=replicas)
        lacks |= dict.fromkeys(found)
    of_worker = [lack for lack in lacks if "worker" in lack.roles]
    needed = [lack for lack in of_worker if not lack.without]
    if needed:
        yield _lacking("error", where, "no job can be done", needed)
    names = {lack.name for lack in needed}
    others = [lack for lack in of_worker if lack.name not in names]
    for without in dict.fromkeys(lack.without for lack in others):
        yield _lacking("warning", where, without, [lack for lack in others if lack.without == without])
    of_client = {lack.name: lack for lack in lacks} if not of_worker else {}
    if of_client:
        text = "the user may do what a worker does; a client (enqueue, follow, cancel, dead) needs another, or besides"
        yield Finding("ok", where, f"{text}: {' '.join(of_client)}")


def _lacking(level: str, where: str, so: str, lacks: list[Missing]) -> Finding:
    rights, commands, keys = (
        list(dict.fromkeys(lack.name for lack in lacks if lack.kind == kind)) for kind in ("right", "command", "key")
    )
    told, mends = [], []
    if rights:
        told.append(f"the user lacks the rights {' '.join(rights)}")
        mends.append(f"ACL SETUSER <user> {' '.join(rights)}")
    if commands:
        told.append(f"Redis does not know {', '.join(commands)}: renamed, or switched off")
        mends.append("give the commands their names back (rename-command in its configuration)")
    if keys:
        told.append(f"something else stands at {', '.join(keys)}")
        mends.append(f"remove it, or choose another {variable('prefix')}")
    return Finding(level, where, f"{so}: {'; '.join(told)}", "; ".join(mends))


def _wrong_server(where: str, info: dict[str, object], wanted: str) -> Finding | None:
    version, mode = str(info.get("redis_version", "7.0")), info.get("redis_mode", wanted)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return Finding("error", where, f"version {version} is too old", "use Redis 6.2 or later")
    if mode != wanted:
        mend = f"set {variable('redis_url')} to a URL that begins with redis+{mode}://"
        return Finding("error", where, f"it runs in {mode} mode", mend)
    return None


def _storage_findings(where: str, info: dict[str, object]) -> list[Finding]:
    if not info:
        return []
    findings = [Finding("ok", where, f"version {info.get('redis_version')} answers")]
    used, most = int(str(info.get("used_memory", 0))), int(str(info.get("maxmemory", 0)))
    if most and used >= most:
        findings.append(
            Finding(
                "error", where, f"it is full: {used} of {most} bytes (maxmemory) are used, and nothing can be written",
                MORE_ROOM,
            )
        )  # fmt: skip
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        findings.append(
            Finding(
                "warning", where, f"maxmemory-policy is {policy}: Redis may drop a log that is being written",
                "set maxmemory-policy to noeviction",
            )
        )  # fmt: skip
    if not info.get("aof_enabled") and info.get("role") == "master":
        findings.append(
            Finding(
                "warning", where, "the append-only file is off: a restart of Redis loses waiting jobs and logs",
                "set appendonly to yes",
            )
        )  # fmt: skip
    return findings


async def _check_queue(redis: Redis, keys: Keys, queue: str, limit: int) -> tuple[Finding, int]:
    """What there is to say of a queue, and how many jobs of it are not done with."""
    key = keys.jobs(queue)
    if not await redis.exists(key):
        return Finding("ok", f"queue {queue}", "no job has been added yet"), 0
    try:
        groups = {group["name"]: group for group in await redis.xinfo_groups(key)}
    except ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
        text = f"the key {key} is not a stream"
        return Finding("error", f"queue {queue}", text, "choose another WORKER_PREFIX"), 0
    group = groups.get(GROUP.encode())
    pending = group["pending"] if group else 0
    waiting = await waiting_in(redis, key)
    if limit and waiting >= limit:
        text = f"it is full: {waiting} jobs wait, and the limit is {limit}"
        mend = f"start more workers, or raise {variable('queue_limit')}"
        return Finding("warning", f"queue {queue}", text, mend), waiting + pending
    return Finding("ok", f"queue {queue}", f"jobs that wait: {waiting}; with a worker: {pending}"), waiting + pending


async def _worker_findings(redis: Redis, keys: Keys, lease: float, undone: int) -> list[Finding]:
    """The workers as they show themselves, each third of a lease; whoever was killed is shown for ten more."""
    seconds, _ = await redis.time()
    findings, alive = [], []
    for name, line in sorted((await Ledger(redis, keys).lines()).items()):
        silent = seconds - line.beat // 1000
        if silent > lease:
            text, mend = f"it has been silent for {silent} s", "see whether it still runs"
            findings.append(Finding("warning", f"worker {name}", text, mend))
            continue
        alive.append(line)
        if line.paused:
            text = f"it takes no jobs at the moment: {line.paused}"
            mend = _WHEN_PAUSED.get(line.paused, "its log says why")  # a later version may have further reasons
            findings.append(Finding("warning", f"worker {name}", text, mend))
    slots, running = sum(line.slots for line in alive), sum(line.running for line in alive)
    text = f"alive: {len(alive)}; of their {slots} slots in use: {running}"
    if undone and not alive:
        return [Finding("warning", "workers", f"{text}; jobs to be done: {undone}", "start one: worker run"), *findings]
    return [Finding("ok", "workers", text), *findings]


async def _check_vllm(upstream: ServerPool, endpoint: Server) -> Finding:
    where = f"vLLM {shown_url(endpoint.url)}"
    try:
        models = await upstream.list_models(endpoint)
    except Late as late:
        return Finding("error", where, late.message, "see whether it is busy: workers give it more time to answer")
    except UpstreamError as error:
        mend = error.fix or (
            f"set {variable('vllm_api_key')} to the key that the server was started with"
            if error.code == "unauthorized"
            else f"start vLLM there, or set {variable('vllm_urls')}"
        )
        return Finding("error", where, error.message.removesuffix(f"; {error.fix}"), mend)
    return Finding("ok", where, f"serves {', '.join(models) or 'no model'}")

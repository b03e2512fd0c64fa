"""Takes the picture of an installation that `worker status` shows, by reading Redis."""

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from ..broker.dead_letters import DeadLetters
from ..broker.worker_registry import WorkerRegistry
from ..contract.keys import Keys
from ..contract.records import WorkerRecord
from ..redisio.advice import advice_on, advice_on_no_answer, advice_on_silence
from ..redisio.cluster import ClusterClient, servers_of
from ..redisio.errors import is_permission_denied, redacted_message
from ..settings import redacted_url
from .findings import Finding
from .fleet import fleet_findings, is_silent, worker_states
from .queues import find_queues, queue_findings, read_queues, served_queues
from .servers import server_states
from .storage import MemoryTrend, is_full, read_info, redis_state, storage_findings, write_finding
from .survey_types import DeadLetterState, RedisState, Survey

_LEVELS = {"error": 0, "warning": 1, "ok": 2}


class Surveyor:
    """Takes pictures of one installation. Forecasts compare a picture with earlier ones of the same object.

    `url` is the URL of Redis, `lease` that of workers whose record has none, in seconds.
    """

    def __init__(self, redis: Redis, keys: Keys, url: str, *, lease: float) -> None:
        self._redis = redis
        self._keys = keys
        self._url = url
        self._where = f"Redis {redacted_url(url)}"
        self._lease = lease
        self._trends: dict[str, MemoryTrend] = {}
        self._found: set[str] | None = None

    async def survey(self) -> Survey:
        """Take a picture. If Redis does not answer, the picture has only that fault."""
        try:
            return await self._read()
        except (RedisError, OSError) as error:
            fix = advice_on(error) or await advice_on_silence(self._url) or advice_on_no_answer(error)
            return Survey(faults=(Finding("error", self._where, redacted_message(error), fix, "redis_away"),))

    async def _read(self) -> Survey:
        redis, keys = self._redis, self._keys
        unread: list[str] = []
        seconds, microseconds = await redis.time()
        now = seconds + microseconds / 1e6
        storage, findings = await self._read_storage(now, unread)
        records: dict[str, WorkerRecord] = {}
        with _noted_if_denied(unread, "workers"):
            records = await WorkerRegistry(redis, keys).records()
        alive = {name: record for name, record in records.items() if not is_silent(record, now, self._lease)}
        served = served_queues(alive.values()) if "workers" not in unread else None
        if self._found is None:
            self._found = await find_queues(redis, keys)
            if self._found is None:
                unread.append("queues that no worker serves (+scan)")
        names = sorted({*(self._found or ()), *(served or ())})
        queues, denied = await read_queues(redis, keys, names, served, int(now * 1000))
        unread += [f"queue {name}" for name in denied]
        findings += queue_findings(queues, workers_run=bool(alive))
        if not any(finding.level == "error" for finding in findings):  # else no worker can renew its record
            unfinished = sum(queue.unfinished for queue in queues)
            findings += fleet_findings(records, now, lease=self._lease, unfinished=unfinished, compare_lease=False)
        letters = DeadLetterState()
        with _noted_if_denied(unread, "dead letters"):
            count, newest, reason = await DeadLetters(redis, keys).count_and_newest()
            age = max(0.0, now - newest / 1000) if count else None
            letters = DeadLetterState(count=count, newest=age, reason=reason)
        faults = [finding for finding in findings if finding.fault]
        return Survey(
            time=int(now * 1000),
            faults=tuple(sorted(faults, key=lambda fault: _LEVELS[fault.level])),
            queues=tuple(queues),
            workers=tuple(worker_states(records, now, self._lease)),
            servers=tuple(server_states(alive)),
            redis=tuple(storage),
            dead_letters=letters,
            unread=tuple(unread),
        )

    async def _read_storage(self, now: float, unread: list[str]) -> tuple[list[RedisState], list[Finding]]:
        states, findings = list[RedisState](), list[Finding]()
        servers = await servers_of(self._redis)
        for number, server in enumerate(servers, 1):
            is_cluster = isinstance(self._redis, ClusterClient)
            name = f"{self._where}, master {number} of {len(servers)}" if is_cluster else self._where
            info = await read_info(server)
            state = redis_state(name, info)
            findings += storage_findings(state, info)
            trend = self._trends.setdefault(name, MemoryTrend())
            states.append(msgspec.structs.replace(state, full_in=trend.full_in(now, state)))
            if not info:
                unread.append("memory (+info)")
        if not any(map(is_full, states)) and (refusal := await write_finding(self._redis, self._where, self._keys)):
            findings.append(refusal)
        return states, findings


@contextmanager
def _noted_if_denied(unread: list[str], what: str) -> Iterator[None]:
    """Add `what` to the parts that the user may not read, if Redis denies it or another type is stored there."""
    try:
        yield
    except ResponseError as error:
        if not (is_permission_denied(error) or redacted_message(error).startswith("WRONGTYPE")):
            raise
        unread.append(what)

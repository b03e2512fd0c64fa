"""Takes the picture of an installation that `worker status` shows, by reading Redis."""

import time
from math import inf

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..broker.dead_letters import DeadLetters
from ..contract.keys import Keys
from ..redisio.advice import advice_on, advice_on_no_answer, advice_on_silence
from ..redisio.cluster import ClusterClient, servers_of
from ..redisio.errors import is_login_refused, is_permission_denied, redacted_message
from ..settings import redacted_url
from .findings import Fault, Finding, faults_among
from .fleet import fleet_findings, worker_states
from .gateways import gateway_findings
from .lifecycle_groups import lifecycle_findings
from .memory_forecast import MemoryForecast, forecast_memory
from .queues import queue_findings
from .reading import read_installation
from .servers import server_states
from .storage import (
    is_full,
    login_findings,
    read_info,
    redis_state,
    renewable_for,
    storage_findings,
    write_finding,
)
from .survey_types import DeadLetterState, RedisState, Survey
from .suspects import buried_poison_finding

_SEARCH_EVERY = 5.0
_SEARCH_SHARE = 20
"""The time between two searches of all keys for queues that only plain XADDs use: these seconds, or as many times the
duration of a search. A queue that nobody serves is named within seconds, unless Redis has millions of keys.
"""
_FORECAST_EVERY = 60.0
"""Seconds between two forecasts of the memory: each reads up to 10,000 entries."""
_LETTERS_READ = 16


class Surveyor:
    """Takes pictures of one installation. What takes Redis long to read is kept for some pictures.

    `url` is the URL of Redis, `lease` that of workers whose record has none, in seconds.
    """

    def __init__(self, redis: Redis, keys: Keys, url: str, *, lease: float) -> None:
        self._redis = redis
        self._keys = keys
        self._url = url
        self._where = f"Redis {redacted_url(url)}"
        self._lease = lease
        self._has_answered = False
        self._unwritable_at = -inf
        """When Redis last did not answer, or refused writes (monotonic clock)."""
        self._searched: set[str] | None = None
        self._search_at = -inf
        """When all keys are searched for queues again (monotonic clock)."""
        self._forecast: MemoryForecast | None = None
        self._forecast_at = -inf
        """When the memory is forecast again (monotonic clock)."""

    async def survey(self) -> Survey:
        """Take a picture. If Redis does not answer, the picture has only that fault."""
        try:
            return await self._read()
        except (RedisError, OSError) as error:
            self._unwritable_at = time.monotonic()
            fix = advice_on(error)
            if not fix and not self._has_answered:  # a Redis that has answered is no Redis that expects TLS
                fix = await advice_on_silence(self._url)
            fix = fix or advice_on_no_answer(error)
            return Survey(faults=(Finding("error", self._where, redacted_message(error), fix, _fault_of(error)),))

    async def _read(self) -> Survey:
        storage, findings, denied, renewable = await self._read_storage()
        began = time.monotonic()
        searches = began >= self._search_at
        searched = None if searches else self._searched
        reading = await read_installation(
            self._redis, self._keys, self._lease, searched=searched, renewable_for=renewable
        )
        if searches:
            ended = time.monotonic()
            self._searched = reading.searched
            self._search_at = ended + max(_SEARCH_EVERY, _SEARCH_SHARE * (ended - began))
        with reading.noted_if_denied("forecast of the memory (+memory|usage, +pttl)"):
            if time.monotonic() >= self._forecast_at:
                self._forecast = await forecast_memory(self._redis, self._keys)
                self._forecast_at = time.monotonic() + _FORECAST_EVERY
            storage = _with_forecast(storage, self._forecast)
        now = reading.now
        findings += queue_findings(
            reading.queues,
            lack="error",
            workers_run=bool(reading.alive),
            full=reading.full_queues,
            without_vllm=reading.queues_without_vllm,
        )
        findings += fleet_findings(
            reading.records or {},
            reading.alive,
            now,
            lease=0,
            unfinished=sum(queue.unfinished for queue in reading.queues),
            connected=reading.connected,
            is_renewable=reading.is_renewable,
        )
        findings += gateway_findings(reading.gateways)
        letters = DeadLetterState()
        with reading.noted_if_denied("dead letters"):
            count, newest = await DeadLetters(self._redis, self._keys).count_and_newest(_LETTERS_READ)
            findings += buried_poison_finding(newest, now)
            if newest:
                written, reason = newest[0]
                letters = DeadLetterState(count=count, newest=max(0.0, now - written / 1000), reason=reason)
        with reading.noted_if_denied("groups of the lifecycle"):
            findings += await lifecycle_findings(self._redis, self._keys, now)
        return Survey(
            time=int(now * 1000),
            faults=tuple(faults_among(findings)),
            queues=tuple(reading.queues),
            workers=tuple(
                worker_states(
                    reading.records or {},
                    reading.alive,
                    now,
                    is_renewable=reading.is_renewable,
                    connected=reading.connected,
                )
            ),
            gateways=reading.gateways,
            servers=tuple(server_states(reading.alive)),
            redis=tuple(storage),
            dead_letters=letters,
            unread=(*denied, *dict.fromkeys(reading.unread)),
        )

    async def _read_storage(self) -> tuple[list[RedisState], list[Finding], list[str], float | None]:
        """The states of Redis's servers, the findings about them, what the user may not read of them, and for how long
        workers could renew their records (see `renewable_for`).
        """
        states, findings, unread = list[RedisState](), list[Finding](), list[str]()
        infos = list[dict[str, object]]()
        servers = await servers_of(self._redis)
        for number, server in enumerate(servers, 1):
            is_cluster = isinstance(self._redis, ClusterClient)
            name = f"{self._where}, master {number} of {len(servers)}" if is_cluster else self._where
            info = await read_info(server)
            infos.append(info)
            self._has_answered = True
            state = redis_state(name, info)
            findings += storage_findings(state, info)
            states.append(state)
            if not info:
                unread.append("memory of Redis (+info)")
            try:
                findings += await login_findings(server, name)
            except ResponseError as error:
                if not is_permission_denied(error):
                    raise
                unread.append("refused logins (+acl|log)")
        refuses = any(map(is_full, states))
        if not refuses and (refusal := await write_finding(self._redis, self._where, self._keys)):
            findings.append(refusal)
            refuses = True
        if refuses:
            self._unwritable_at = time.monotonic()
        renewable = renewable_for(infos, refuses=refuses)
        if renewable is not None:
            renewable = min(renewable, time.monotonic() - self._unwritable_at)
        return states, findings, list(dict.fromkeys(unread)), renewable


def _with_forecast(states: list[RedisState], forecast: MemoryForecast | None) -> list[RedisState]:
    """The states with the forecast of a whole installation, in equal parts."""
    needed = round(forecast.needed / len(states)) if forecast else 0
    full_in = forecast.full_in if forecast else None
    return [msgspec.structs.replace(state, needed=needed, full_in=full_in) for state in states]


def _fault_of(error: RedisError | OSError) -> Fault:
    """The name of the fault of a Redis that does not answer, or refuses this command's user."""
    if is_login_refused(error):
        return "redis_login"
    is_silent = isinstance(error, RedisTimeoutError) and "connecting" not in str(error)
    return "redis_silent" if is_silent else "redis_away"

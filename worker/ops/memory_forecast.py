"""A forecast of the memory that Redis needs if requests go on to finish as they did in the last minutes.

Logs and tombstones expire, so the memory of finished requests grows until as many expire as finish. The forecast is
that amount: requests a second x bytes x seconds for which the bytes are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TypeAlias, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.ids import EntryId
from ..contract.keys import Keys
from ..contract.records import Lifecycle
from ..redisio.advice import MORE_ROOM
from ..redisio.cluster import servers_of
from ..redisio.errors import is_permission_denied
from .findings import Finding
from .units import duration, size

_WINDOW = 300
"""Seconds of the lifecycle that are read."""

_SHORTEST = 60
"""Seconds of load without which there is no forecast: the first requests of an installation are not its rate."""

_FEWEST = 20
"""Finished requests without which there is no forecast."""

_MOST_ENTRIES = 10_000
"""Entries of the lifecycle that are read at most. A busier installation is measured over a shorter time."""

_RawEntry: TypeAlias = tuple[bytes, dict[bytes, bytes]]

_PAGE = 1000
_SAMPLES = 32
"""Finished requests whose logs and tombstones are measured."""


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """What finished requests will take of Redis's memory, in bytes.

    `requests_per_s` is the rate over the last `window` seconds. `request_bytes` is the mean size of a log with its
    tombstone, `retention` the mean number of seconds for which logs are kept. `needed` is the memory once as many logs
    expire as begin, with that of the lifecycle and of dead letters; waiting and running requests, and the data of other
    programs, are not in it. `used` and `limit` are Redis's own figures, in a cluster those of all masters together; a
    `limit` of 0 is none.
    """

    requests_per_s: float
    window: float
    request_bytes: float
    retention: float
    needed: float
    used: int
    limit: int

    @property
    def full_in(self) -> float | None:
        """Seconds until Redis is full at this rate, if no log expires before; None if the need is below the limit."""
        if not self.limit or self.needed <= self.limit:
            return None
        return max(self.limit - self.used, 0) / (self.requests_per_s * self.request_bytes)


async def forecast_memory(redis: Redis, keys: Keys) -> MemoryForecast | None:
    """The forecast from the lifecycle and a sample of logs; None while too few requests have finished.

    It reads up to 10,000 entries of the lifecycle, and so takes Redis some milliseconds in all.

    Raises:
        RedisError: when Redis does not answer, or the user lacks a right: `+memory|usage` or `+pttl`.
    """
    seconds, _ = await redis.time()
    requests, window, is_cut = await _finished(redis, keys, int(seconds) * 1000)
    if len(requests) < _FEWEST or (window < _SHORTEST and not is_cut):
        return None
    step = max(len(requests) // _SAMPLES, 1)
    measured = await _measure(redis, keys, requests[::step], int(seconds) * 1000)
    if not measured:
        return None
    rate = len(requests) / window
    others = [await redis.memory_usage(key) or 0 for key in (keys.lifecycle, keys.dead)]
    infos = [dict(await server.info("memory")) for server in await servers_of(redis)]
    used, limit, startup = (
        [int(str(info.get(name, 0))) for info in infos] for name in ("used_memory", "maxmemory", "used_memory_startup")
    )
    return MemoryForecast(
        requests_per_s=rate,
        window=window,
        request_bytes=mean(each.bytes for each in measured),
        retention=mean(each.retention for each in measured),
        needed=rate * mean(each.byte_seconds for each in measured) + sum(others) + sum(startup),
        used=sum(used),
        limit=sum(limit) if all(limit) else 0,
    )


async def check_memory(redis: Redis, keys: Keys, where: str) -> list[Finding]:
    """The forecast as a finding about `where`; empty while too few requests have finished.

    Raises:
        RedisError: when Redis does not answer.
    """
    try:
        forecast = await forecast_memory(redis, keys)
    except ResponseError as error:
        if is_permission_denied(error):
            return [Finding("ok", where, "its memory was not forecast: the user has no right to +memory|usage, +pttl")]
        if str(error).startswith("WRONGTYPE"):  # the checks of rights and of keys report it
            return []
        raise
    if forecast is None:
        return []
    load = f"{forecast.requests_per_s:.3g} requests/s in the last {duration(forecast.window)}"
    each = f"{size(forecast.request_bytes)} each, kept for {duration(forecast.retention)}"
    message = f"finished requests need {size(forecast.needed)} at this rate ({load}, {each})"
    if forecast.full_in is not None:
        message = f"it is full in {duration(forecast.full_in)}: {message}, and maxmemory is {size(forecast.limit)}"
        return [Finding("warning", where, message, MORE_ROOM)]
    has = f"maxmemory is {size(forecast.limit)}" if forecast.limit else "maxmemory is not set"
    return [Finding("ok", where, f"{message}; {has}")]


@dataclass(frozen=True, slots=True)
class _Measured:
    """A finished request: bytes of log and tombstone, seconds for which the log is kept, bytes x seconds of both."""

    bytes: int
    retention: float
    byte_seconds: float


async def _finished(redis: Redis, keys: Keys, now: int) -> tuple[list[Lifecycle], float, bool]:
    """The requests that finished within the window, the newest first, the seconds that they cover, and whether the
    window is shorter than it should be because there were too many. `now` is Unix ms.
    """
    found, entries, last = list[Lifecycle](), 0, "+"
    oldest, is_whole = now, False
    while entries < _MOST_ENTRIES and not is_whole:
        since = str(now - _WINDOW * 1000)
        page = cast("list[_RawEntry]", await redis.xrevrange(keys.lifecycle, last, since, count=_PAGE))
        records = [Lifecycle.read(line.decode(), fields) for line, fields in page]
        found += [record for record in records if record.type == "finished"]
        entries += len(page)
        is_whole = len(page) < _PAGE
        if records:
            oldest = EntryId.parse(records[-1].line).attempt
            last = f"({records[-1].line}"
    return found, max((now - oldest) / 1000, 1.0), not is_whole


async def _measure(redis: Redis, keys: Keys, requests: Sequence[Lifecycle], now: int) -> list[_Measured]:
    """The sizes of some finished requests, without those whose log is gone or has no expiry. `now` is Unix ms."""
    pipe = redis.pipeline(transaction=False)
    for request in requests:
        for key in (keys.tokens(request.id), keys.ended(request.id)):
            pipe.memory_usage(key)
            pipe.pttl(key)
    replies = [int(reply or 0) for reply in await pipe.execute()]
    found = []
    for request, log, log_left, tombstone, tombstone_left in zip(
        requests, replies[::4], replies[1::4], replies[2::4], replies[3::4], strict=True
    ):
        if log and log_left > 0:
            age = max(now - request.time, 0)
            retention, remember = (log_left + age) / 1000, (max(tombstone_left, 0) + age) / 1000
            found.append(_Measured(log + tombstone, retention, log * retention + tombstone * remember))
    return found

"""The forecast of `worker check` and `worker status` of the memory that Redis will need."""

import re
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from worker.cli.status_view import lines_of
from worker.contract.keys import Keys
from worker.ops.findings import Finding
from worker.ops.memory_forecast import MemoryForecast, check_memory, forecast_memory
from worker.ops.survey import Surveyor
from worker.ops.survey_types import RedisState
from worker.redisio.clients import command_client
from worker.sandbox.embedded_redis import EmbeddedRedis, start_redis

KEYS = Keys()
HOUR = 3600


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedRedis]:
    """A Redis whose memory nobody else uses, and whose configuration may be changed."""
    with start_redis() as server:
        yield server


@pytest.fixture
async def own_redis(own_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    async with Redis.from_url(own_server.url, protocol=2) as redis:
        await redis.flushall()
        await redis.config_set("maxmemory", 0)
        yield redis


_FINISH = """
local lifecycle, requests, within, tokens, kept, now = KEYS[1], unpack(ARGV)
for number = 1, requests do
    local id, age = 'r' .. number, math.floor(within * 1000 * (requests - number + 1) / requests)
    local log, tombstone = 'chat:tokens:{' .. id .. '}', 'chat:ended:{' .. id .. '}'
    for step, kind in ipairs({'started', 'finished'}) do
        redis.call('XADD', lifecycle, (now - age) .. '-' .. (2 * number + step), 'type', kind, 'id', id, 'job', '1-0',
            'queue', 'default', 'attempt', '1', 'time', now - age)
    end
    for n = 1, tokens do
        redis.call('XADD', log, '1-' .. n, 'type', 'delta', 'content', ' word' .. n, 'token_ids', '[1234]')
    end
    redis.call('PEXPIRE', log, kept * 1000 - age)
    redis.call('SET', tombstone, '{"outcome":"done","time":1234567890123}', 'PX', 86400000 - age)
end
"""
"""Leaves what requests leave that finished evenly within the last seconds: lifecycle, logs and tombstones."""


async def finish(redis: Redis, requests: int, *, within: float, tokens: int = 1, kept: int = HOUR) -> None:
    seconds, _ = await redis.time()
    await redis.eval(_FINISH, 1, KEYS.lifecycle, requests, within, tokens, kept, seconds * 1000)


async def forecast_of(redis: Redis) -> MemoryForecast:
    forecast = await forecast_memory(redis, KEYS)
    assert forecast
    return forecast


async def test_the_size_of_a_request_is_what_it_takes_of_the_memory_of_redis(own_redis: Redis) -> None:
    async def used() -> int:
        return int((await own_redis.info("memory"))["used_memory_dataset"])

    before = await used()
    await finish(own_redis, 500, within=200, tokens=100)
    forecast = await forecast_of(own_redis)
    lifecycle = await own_redis.memory_usage(KEYS.lifecycle) or 0
    assert (await used() - before - lifecycle) / 500 == pytest.approx(forecast.request_bytes, rel=0.1)


async def test_the_need_is_the_rate_times_what_is_kept_for_the_time_of_retention(own_redis: Redis) -> None:
    await finish(own_redis, 300, within=100, tokens=300, kept=2 * HOUR)
    forecast = await forecast_of(own_redis)
    assert forecast.requests_per_s * forecast.window == pytest.approx(300)
    assert forecast.retention == pytest.approx(2 * HOUR, rel=0.01)
    log = await own_redis.memory_usage(KEYS.tokens("r7")) or 0
    tombstone = await own_redis.memory_usage(KEYS.ended("r7")) or 0
    assert forecast.request_bytes == pytest.approx(log + tombstone, rel=0.05)
    kept = log * 2 * HOUR + tombstone * 24 * HOUR
    assert forecast.needed == pytest.approx(forecast.requests_per_s * kept, rel=0.1)


async def test_a_load_that_will_fill_redis_is_a_warning_with_the_time_that_is_left(own_redis: Redis) -> None:
    await finish(own_redis, 300, within=100, tokens=50)
    forecast = await forecast_of(own_redis)
    await own_redis.config_set("maxmemory", forecast.used + int(3 * forecast.request_bytes * 6 * HOUR / 10))
    forecast = await forecast_of(own_redis)
    assert forecast.full_in
    at_the_end = forecast.used + forecast.full_in * forecast.requests_per_s * forecast.request_bytes
    assert at_the_end == pytest.approx(forecast.limit)
    (finding,) = await check_memory(own_redis, KEYS, "Redis")
    assert finding.level == "warning"
    assert re.match(r"it is full in \d\d min: finished requests need .* requests/s in the last ", finding.message)
    assert finding.fix == "give Redis more memory, or shorten WORKER_RETENTION"

    await own_redis.config_set("maxmemory", int(forecast.needed * 1.1))
    (finding,) = await check_memory(own_redis, KEYS, "Redis")
    assert finding.level == "ok"
    await own_redis.config_set("maxmemory", 0)
    (finding,) = await check_memory(own_redis, KEYS, "Redis")
    assert finding.level == "ok"
    assert finding.message.endswith("; maxmemory is not set")


async def test_one_picture_of_the_status_has_the_forecast(own_redis: Redis, own_server: EmbeddedRedis) -> None:
    async def status() -> tuple[RedisState, str]:
        async with command_client(own_server.url) as redis:
            found = await Surveyor(redis, KEYS, own_server.url, lease=15).survey()
        (line,) = [line for line in lines_of(found) if line.startswith("Redis ")]
        return found.redis[0], line

    assert (await status())[1].endswith("no limit  -")
    await own_redis.config_set("maxmemory", "10gb")
    assert (await status())[1].endswith("too little load")
    await finish(own_redis, 300, within=100, tokens=50)
    state, line = await status()
    assert line.endswith("not at this rate")
    assert state.needed
    await own_redis.config_set("maxmemory", (state.used + state.needed) // 2)
    state, line = await status()
    assert state.full_in == pytest.approx((await forecast_of(own_redis)).full_in, rel=0.2)
    assert line.endswith(" min")


@pytest.mark.parametrize(("requests", "within"), [(0, 1), (19, 200), (500, 1)])
async def test_few_requests_or_a_short_time_give_no_forecast(own_redis: Redis, requests: int, within: float) -> None:
    await finish(own_redis, requests, within=within)
    assert await forecast_memory(own_redis, KEYS) is None


async def test_only_the_last_minutes_count(own_redis: Redis) -> None:
    await finish(own_redis, 500, within=10_000)
    assert await forecast_memory(own_redis, KEYS) is None, "15 of them are of the last 5 minutes"
    await own_redis.flushall()
    await finish(own_redis, 500, within=1000)
    assert (await forecast_of(own_redis)).window <= 300


async def test_a_busy_installation_is_measured_over_a_shorter_time(own_redis: Redis) -> None:
    await finish(own_redis, 6000, within=20)
    forecast = await forecast_of(own_redis)
    assert forecast.requests_per_s * forecast.window == pytest.approx(5000)


async def test_a_user_without_the_right_to_sizes_learns_that_there_is_no_forecast(
    own_redis: Redis, own_server: EmbeddedRedis
) -> None:
    await finish(own_redis, 100, within=100)
    await own_redis.execute_command("ACL", "SETUSER", "some", "on", ">secret", "~*", "+@all", "-memory")  # type: ignore[no-untyped-call]
    url = own_server.url.replace("redis://", "redis://some:secret@")
    async with Redis.from_url(url, protocol=2) as redis:
        assert await check_memory(redis, KEYS, "Redis") == [
            Finding("ok", "Redis", "its memory was not forecast: the user has no right to +memory|usage, +pttl")
        ]
        surveyor = Surveyor(redis, KEYS, url, lease=15)
        for _ in range(2):
            found = await surveyor.survey()
            assert found.unread == ("forecast of the memory (+memory|usage, +pttl)",)
            assert found.redis[0].needed is None

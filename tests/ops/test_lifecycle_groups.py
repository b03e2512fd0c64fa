"""Groups of the lifecycle that are behind or have lost entries, as `worker check` and `worker status` report them."""

from contextlib import aclosing

import pytest
from lifecycle_records import KEY, LOSSES, write_records
from redis.asyncio import Redis

from worker.contract.keys import Keys
from worker.ops.checks import check
from worker.ops.findings import Finding
from worker.ops.survey import Surveyor

HOUR_MS = 3_600_000


async def faults(redis: Redis, url: str) -> list[Finding]:
    survey = await Surveyor(redis, Keys(), url, lease=15).survey()
    assert not survey.unread
    return [fault for fault in survey.faults if fault.fault == "lifecycle_behind"]


async def now_ms(redis: Redis) -> int:
    seconds, microseconds = await redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


async def test_a_group_that_keeps_up_or_has_nothing_to_read_is_no_fault(redis: Redis, redis_url: str) -> None:
    assert not await faults(redis, redis_url)
    await redis.xadd(KEY, {"type": "finished"}, id=f"{await now_ms(redis) - 5 * HOUR_MS}-0")
    await redis.xgroup_create(KEY, "log", "$")
    assert not await faults(redis, redis_url)
    await write_records(redis, 10)
    await redis.xreadgroup("log", "c", {KEY: ">"}, count=5)
    assert not await faults(redis, redis_url)


@pytest.mark.parametrize("is_delivered", [False, True], ids=["unread", "pending"])
async def test_a_group_that_is_behind_is_named_with_how_far(
    redis: Redis, redis_url: str, *, is_delivered: bool
) -> None:
    await redis.xadd(KEY, {"type": "finished"}, id=f"{await now_ms(redis) - 5 * HOUR_MS}-0")
    await redis.xgroup_create(KEY, "billing", "0")
    await write_records(redis, 10)
    if is_delivered:
        await redis.xreadgroup("billing", "c", {KEY: ">"})
    (fault,) = await faults(redis, redis_url)
    assert fault.subject == "lifecycle group billing"
    assert fault.message.startswith("it is 5 h behind")
    assert "XGROUP DESTROY chat:lifecycle billing" in fault.fix


async def test_a_group_that_has_lost_entries_is_named_with_their_number(redis: Redis, redis_url: str) -> None:
    await write_records(redis, 1)
    await redis.xgroup_create(KEY, "log", "$")
    await redis.hset(LOSSES, "log", "120")
    await redis.expire(LOSSES, 60)
    async with aclosing(check({"redis_url": redis_url, "vllm_urls": "http://127.0.0.1:1"})) as found:
        findings = [it async for it in found if it.fault == "lifecycle_behind"]
    assert [it.message.split(",")[0] for it in findings] == ["it has lost 120 entries"]
    assert findings == await faults(redis, redis_url)
    await redis.hset(LOSSES, "log", "0")
    assert not await faults(redis, redis_url)

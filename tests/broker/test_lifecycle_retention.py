"""How long the lifecycle keeps its records, for readers with and without a consumer group."""

from typing import Any, cast

import pytest
from acl import setuser
from lifecycle_records import KEY, LOSSES, MIB, pending, write_records
from redis.asyncio import Redis

from worker.broker.lifecycle_retention import LifecycleTrimmer
from worker.contract.keys import Keys
from worker.redisio.cluster import slot_of

NODE = 100
"""More records than Redis keeps in a node of a stream. It removes whole nodes."""


async def join(redis: Redis, group: str, *, read: int = 0, pending: int = 0) -> None:
    """A group that has read some of the oldest records, and acknowledged all but the last `pending` of these."""
    await redis.xgroup_create(KEY, group, "0", mkstream=True)
    if read:
        ((_, records),) = cast("Any", await redis.xreadgroup(group, "c", {KEY: ">"}, count=read))
        await redis.xack(KEY, group, *[line for line, _ in records[: len(records) - pending]])


async def bytes_used(redis: Redis) -> int:
    return int(await redis.memory_usage(KEY) or 0)


def trimmer(redis: Redis, length: int = 1000, max_bytes: int = 100 * MIB) -> LifecycleTrimmer:
    return LifecycleTrimmer(redis, Keys(), length=length, max_bytes=max_bytes)


async def unread(redis: Redis, group: str) -> int:
    """How many records the group has still to read, by reading all."""
    streams = cast("Any", await redis.xreadgroup(group, "last", {KEY: ">"}))
    return len(streams[0][1]) if streams else 0


async def test_the_newest_records_stay_for_readers_without_a_group(redis: Redis) -> None:
    await trimmer(redis).trim()
    await write_records(redis, 3000)
    await trimmer(redis).trim()
    assert 1000 <= await redis.xlen(KEY) < 1000 + NODE
    await join(redis, "has-read-all", read=3000)
    await trimmer(redis).trim()
    assert await redis.xlen(KEY) >= 1000


async def test_records_stay_until_every_group_has_acknowledged_them(redis: Redis) -> None:
    await write_records(redis, 10_000)
    await join(redis, "fast", read=10_000)
    await join(redis, "slow", read=5000, pending=1000)
    await join(redis, "new")
    await trimmer(redis).trim()
    assert await unread(redis, "new") == 10_000, "a group that has read nothing misses nothing"
    await redis.xgroup_destroy(KEY, "new")
    await trimmer(redis).trim()
    assert 6000 <= await redis.xlen(KEY) < 6000 + NODE, "a record that is read and not acknowledged stays"
    assert await unread(redis, "slow") == 5000
    assert not await redis.exists(LOSSES)


@pytest.mark.parametrize("is_full", [False, True], ids=["room", "full"])
async def test_beyond_the_limit_of_bytes_groups_lose_the_oldest_records_and_each_loss_is_counted(
    redis: Redis, *, is_full: bool
) -> None:
    await write_records(redis, 20_000)
    before = {"forgotten": 0, "slow": 3017, "busy": 19_000}
    for group, read in before.items():
        await join(redis, group, read=read)
    if is_full:
        await redis.config_set("maxmemory", 1)
    try:
        for _ in range(2):  # the second finds nothing to do
            await trimmer(redis, max_bytes=MIB // 2).trim()
    finally:
        await redis.config_set("maxmemory", 0)
    assert MIB / 4 < await bytes_used(redis) < MIB / 2
    kept = await redis.xlen(KEY)
    losses = {group.decode(): int(lost) for group, lost in cast("Any", await redis.hgetall(LOSSES)).items()}
    assert losses == {"forgotten": 20_000 - kept, "slow": 20_000 - kept - 3017}
    for group, read in before.items():
        assert await unread(redis, group) == 20_000 - read - losses.get(group, 0)
    assert await redis.ttl(LOSSES) > 0


async def test_records_that_were_delivered_are_lost_too_and_leave_no_pending_entries(redis: Redis) -> None:
    await write_records(redis, 20_000)
    await join(redis, "died", read=5000, pending=4000)
    await trimmer(redis, max_bytes=MIB // 2).trim()
    assert await redis.xlen(KEY) < 15_000
    assert int(cast("Any", await redis.hget(LOSSES, "died"))) == 20_000 - await redis.xlen(KEY) - 1000
    assert not await pending(redis, "died")


async def test_a_group_at_the_limit_loses_no_more_than_what_is_too_much(redis: Redis) -> None:
    """The script removes up to the places of groups, but never more than it must."""
    await write_records(redis, 10_000)
    await join(redis, "slow", read=10)
    await join(redis, "fast", read=9000)
    used = await bytes_used(redis)
    await trimmer(redis, max_bytes=int(used * 0.95)).trim()
    assert 8000 < await redis.xlen(KEY) < 9500


@pytest.mark.parametrize("missing", ["+memory|usage", f"~{LOSSES}", "+hincrby"])
async def test_a_user_with_the_rights_of_an_earlier_version_keeps_the_limit(
    redis: Redis, redis_url: str, missing: str
) -> None:
    await write_records(redis, 10_000)
    await join(redis, "forgotten")
    rules = ["+xlen", "+xtrim", "+xinfo|groups", "+xpending", "+eval", "+evalsha", "+hincrby", "+expire", f"~{KEY}"]
    rules += ["+xrange", "+xack", "+memory|usage", f"~{LOSSES}", "resetchannels"]
    await redis.execute_command("ACL SETUSER", *setuser("former", [rule for rule in rules if rule != missing]))  # type: ignore[no-untyped-call]
    try:
        async with Redis.from_url(redis_url.replace("redis://", "redis://former:PASSWORD@"), protocol=2) as former:
            await trimmer(former, max_bytes=MIB // 4).trim()
    finally:
        await redis.acl_deluser("former")
    assert await bytes_used(redis) < MIB // 4


def test_the_losses_are_in_the_slot_of_the_lifecycle() -> None:
    assert slot_of(LOSSES) == slot_of(KEY)
    assert LOSSES.startswith("chat:")

"""What `enqueue` writes: the log and the job in one step, or nothing."""

import pytest
from conftest import stream
from proxy import Proxy
from redis.asyncio import Redis

from worker import Client, Queued, Refused, Unavailable
from worker.contract.entries import parse

ASK: dict[str, object] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}
LOG = "chat:tokens:{r}"
YEAR = 365 * 24 * 3600


async def queued(redis: Redis) -> Queued:
    ((entry_id, fields),) = await stream(redis, LOG)
    entry = parse(entry_id, fields)
    assert isinstance(entry, Queued)
    return entry


async def test_a_job_is_added_by_one_command(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK)
    await redis.config_resetstat()
    for _ in range(3):
        await client.enqueue(ASK)
    calls = {name: of["calls"] for name, of in (await redis.info("commandstats")).items() if name != "cmdstat_config"}
    in_script = {"xrange": 3, "get": 3, "time": 3, "exists": 6, "xadd": 6, "pexpireat": 3, "sadd": 3}
    assert calls.pop("cmdstat_config|resetstat", 1) == 1
    assert calls == {"cmdstat_evalsha": 3} | {f"cmdstat_{name}": count for name, count in in_script.items()}


async def test_a_new_job_stream_has_the_group_that_an_autoscaler_reads(client: Client, redis: Redis) -> None:
    for _ in range(2):
        await client.enqueue(ASK, queue="batch")
    (group,) = await redis.xinfo_groups("chat:jobs:batch")
    assert (group["name"], group["pending"], group["last-delivered-id"]) == (b"workers", 0, b"0-0")
    assert await redis.xlen("chat:jobs:batch") == 2


async def test_a_client_without_the_right_to_create_a_group_adds_its_job(redis: Redis, redis_url: str) -> None:
    await redis.acl_setuser(
        "limited", enabled=True, passwords=["+secret"], keys=["*"], channels=["*"], commands=["+@all", "-xgroup"]
    )
    try:
        async with Client(redis_url.replace("redis://", "redis://limited:secret@")) as limited:
            await limited.enqueue(ASK, id="r")
    finally:
        await redis.acl_deluser("limited")
    assert await redis.xlen("chat:jobs") == 1
    assert await redis.exists(LOG)
    assert await redis.xinfo_groups("chat:jobs") == []


@pytest.mark.parametrize("seconds", [0.001, 1.5, YEAR])
async def test_log_and_job_have_the_same_deadline_to_the_millisecond(
    seconds: float, client: Client, redis: Redis
) -> None:
    await client.enqueue(ASK, id="r", timeout=seconds, retention=60)
    entry = await queued(redis)
    ((_, job),) = await stream(redis, "chat:jobs")
    assert int(job[b"deadline"]) == entry.deadline == entry.time + int(seconds * 1000)
    now, _ = await redis.time()
    expires_in = entry.deadline / 1000 - now + 60
    assert expires_in - 30 < await redis.pttl(LOG) / 1000 <= expires_in


async def test_without_a_timeout_only_the_log_has_a_deadline(client: Client, redis: Redis) -> None:
    await client.enqueue(ASK, id="r")
    entry = await queued(redis)
    ((_, job),) = await stream(redis, "chat:jobs")
    assert entry.deadline == entry.time + 24 * 3600 * 1000
    assert b"deadline" not in job


async def test_full_memory_refuses_log_and_job_together(client: Client, redis: Redis, redis_url: str) -> None:
    await redis.config_set("maxmemory", 1)
    try:
        async with Client(redis_url, patience=0.2) as impatient:
            with pytest.raises(Unavailable, match="used memory > 'maxmemory'"):
                await impatient.enqueue(ASK, id="r")
    finally:
        await redis.config_set("maxmemory", 0)
    assert not await redis.exists(LOG, "chat:jobs")
    await client.enqueue(ASK, id="r")
    assert await redis.xlen("chat:jobs") == 1


async def test_a_job_whose_reply_is_lost_is_added_once(client: Client, redis: Redis, redis_proxy: Proxy) -> None:
    await client.enqueue(ASK)  # Redis knows the script from now on
    lost = redis_proxy.drop_reply(rb"EVALSHA")
    async with Client(redis_proxy.redis_url) as unlucky:
        await unlucky.enqueue(ASK, id="r")
    assert lost.met.is_set()
    assert await redis.xlen("chat:jobs") == 2
    assert (await queued(redis)).queue == "default"


async def test_a_job_that_the_job_stream_refuses_has_no_log(client: Client, redis: Redis) -> None:
    await redis.set("chat:jobs", "of another program", ex=60)
    for _ in range(2):
        with pytest.raises(Refused, match="WRONGTYPE"):
            await client.enqueue(ASK, id="r")
    await redis.delete("chat:jobs")
    await client.enqueue(ASK, id="r")
    assert await redis.xlen("chat:jobs") == 1

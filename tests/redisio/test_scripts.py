"""Scripts: what they return, the kinds of their errors, and a Redis that does not know them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import pytest
from proxy import Proxy
from redis import exceptions
from redis.asyncio import Redis
from waits import eventually

from worker.redisio.batching import CommandBatcher
from worker.redisio.clients import command_client
from worker.redisio.errors import is_transient
from worker.redisio.scripts import Script

APPEND = Script("""
local added = call('XADD', KEYS[1], ARGV[1], 'a', ARGV[2])
call('EXPIRE', KEYS[1], 60)
return {added, (try('GET', KEYS[1]))}
""")

Run: TypeAlias = Callable[[Script, Sequence[str], Sequence[str]], Awaitable[Any]]


@pytest.fixture(params=["together", "alone"])
async def run(request: pytest.FixtureRequest, redis_proxy: Proxy) -> AsyncIterator[Run]:
    """Runs a script together with the commands of others, or by a command of its own."""
    async with command_client(redis_proxy.redis_url) as client:
        batcher = CommandBatcher(client)

        async def together(script: Script, keys: Sequence[str], arguments: Sequence[str]) -> object:
            return await script.run(batcher, keys, arguments)

        async def alone(script: Script, keys: Sequence[str], arguments: Sequence[str]) -> object:
            return await script.run_on(client, keys, arguments)

        yield together if request.param == "together" else alone
        await batcher.aclose()


async def error_of(run: Run, key: str = "k") -> exceptions.RedisError:
    with pytest.raises(exceptions.RedisError) as caught:
        await run(APPEND, [key], ["9-9", "x"])
    return caught.value


async def test_a_redis_that_does_not_know_a_script_is_sent_its_source_once(run: Run, redis: Redis) -> None:
    for number in (1, 2):  # the second time as after a restart in the middle
        await redis.script_flush()
        await redis.config_resetstat()
        for step in range(3):
            assert (await run(APPEND, ["k"], [f"{number}-{step}", "x"]))[0] == b"%d-%d" % (number, step)
        calls = await redis.info("commandstats")
        assert (calls["cmdstat_eval"]["calls"], calls["cmdstat_evalsha"]["calls"]) == (1, 3)


async def test_callers_that_all_meet_a_redis_without_the_script_get_their_own_replies(run: Run, redis: Redis) -> None:
    await redis.script_flush()
    replies = await asyncio.gather(*(run(APPEND, [f"k{number}"], [f"{number}-1", "é"]) for number in range(1, 50)))
    assert [reply[0] for reply in replies] == [b"%d-1" % number for number in range(1, 50)]
    assert await redis.xrange("k7") == [(b"7-1", {b"a": "é".encode()})]


async def test_an_error_that_is_part_of_a_reply_is_a_value(run: Run) -> None:
    added, error = await run(APPEND, ["k"], ["1-1", "x"])
    assert added == b"1-1"
    assert isinstance(error, exceptions.ResponseError)
    assert str(error).startswith("WRONGTYPE")


async def test_a_refused_id_has_the_text_of_the_command(run: Run) -> None:
    await run(APPEND, ["k"], ["9-9", "x"])
    assert str(await error_of(run)).startswith("The ID specified in XADD is equal or smaller")


async def test_a_key_of_another_type_keeps_its_kind(run: Run, redis: Redis) -> None:
    await redis.set("k", "text", ex=60)
    assert str(await error_of(run)).startswith("WRONGTYPE")


async def test_full_memory_refuses_a_script_as_a_whole(run: Run, redis: Redis) -> None:
    await redis.config_set("maxmemory", 1)
    try:
        assert isinstance(await error_of(run), exceptions.OutOfMemoryError)
    finally:
        await redis.config_set("maxmemory", 0)
    assert not await redis.exists("k")


async def test_too_few_replicas_keep_their_kind(run: Run, redis: Redis) -> None:
    await redis.config_set("min-replicas-to-write", 1)
    try:
        assert str(await error_of(run)).startswith("NOREPLICAS")
    finally:
        await redis.config_set("min-replicas-to-write", 0)


async def test_a_read_only_replica_keeps_its_kind(run: Run, redis: Redis) -> None:
    await redis.replicaof("127.0.0.1", 1)
    try:
        assert isinstance(await error_of(run), exceptions.ReadOnlyError)
    finally:
        await redis.replicaof("NO", "ONE")


@pytest.mark.parametrize("rights", ["~* +@all -xadd", "~other +@all", "~* +@all -evalsha", "~* +@all -eval"])
async def test_a_missing_right_keeps_its_kind(rights: str, redis: Redis, redis_proxy: Proxy) -> None:
    await redis.script_flush()
    await redis.execute_command("ACL", "SETUSER", "limited", "on", ">secret", *rights.split())  # type: ignore[no-untyped-call]
    url = redis_proxy.redis_url.replace("://", "://limited:secret@")
    try:
        async with command_client(url) as client:
            batcher = CommandBatcher(client)
            for refused in (APPEND.run(batcher, ["k"], ["1-1", "x"]), APPEND.run_on(client, ["k"], ["1-1", "x"])):
                with pytest.raises(exceptions.NoPermissionError):
                    await refused
            await batcher.aclose()
    finally:
        await redis.acl_deluser("limited")


async def test_a_redis_that_is_busy_with_another_script_keeps_its_kind(run: Run, redis: Redis) -> None:
    await redis.config_set("lua-time-limit", 1)
    endless = asyncio.ensure_future(redis.eval("while true do end", 0))

    async def is_busy() -> bool:
        try:
            await redis.ping()
        except exceptions.ResponseError as error:
            return str(error).startswith("BUSY ")
        return False

    try:
        await eventually(is_busy)
        assert str(await error_of(run)).startswith("BUSY ")
    finally:
        await redis.script_kill()
        with pytest.raises(exceptions.ResponseError):
            await endless
        await redis.config_set("lua-time-limit", 5000)


@pytest.mark.parametrize("kind", ["LOADING", "TRYAGAIN", "CLUSTERDOWN", "MISCONF"])
async def test_an_error_of_the_server_keeps_its_kind(kind: str, run: Run) -> None:
    refusing = Script(f"return redis.error_reply('{kind} 1 127.0.0.1:1')")
    with pytest.raises(exceptions.RedisError) as caught:
        await run(refusing, ["k"], [])
    assert is_transient(caught.value)

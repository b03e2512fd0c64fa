"""What counts as a passing fault of Redis, in whatever shape redis-py puts it, and what is said of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis
from redis.exceptions import ExecAbortError, RedisError, ResponseError, WatchError

from worker.broker.connection import command_client, is_transient, what_redis_said

SECRET = "what nobody else may read"


@asynccontextmanager
async def setting(redis: Redis, name: str, value: str) -> AsyncIterator[None]:
    await redis.config_set(name, value)
    try:
        yield
    finally:
        await redis.config_set(name, "0")


@pytest.mark.parametrize("transaction", [True, False])
@pytest.mark.parametrize(("name", "value"), [("min-replicas-to-write", "1"), ("maxmemory", "1")])
async def test_a_refusal_that_passes_is_known_inside_a_pipeline_too_and_told_without_the_command(
    name: str,
    value: str,
    transaction: bool,  # noqa: FBT001 - a parameter of the test
    redis: Redis,
) -> None:
    pipe = redis.pipeline(transaction=transaction)
    pipe.xadd("chat:tokens:{r}", {"type": "delta", "content": SECRET}, id="1-1")
    async with setting(redis, name, value):
        with pytest.raises(ResponseError) as refusal:
            await pipe.execute()
    assert SECRET in str(refusal.value), "redis-py quotes the command"
    assert is_transient(refusal.value)
    assert SECRET not in what_redis_said(refusal.value)
    assert what_redis_said(refusal.value).startswith(("NOREPLICAS", "command not allowed when used memory"))


async def test_a_refusal_that_comes_up_between_multi_and_exec_passes(redis: Redis) -> None:
    async with redis.client() as connection:
        for command in (("MULTI",), ("XADD", "k", "*", "a", "b")):
            await connection.execute_command(*command)  # type: ignore[no-untyped-call]
        async with setting(redis, "min-replicas-to-write", "1"):
            with pytest.raises(ExecAbortError) as refusal:
                await connection.execute_command("EXEC")  # type: ignore[no-untyped-call]
    assert is_transient(refusal.value)


@pytest.mark.parametrize("text", ["MISCONF Errors writing to the AOF file", "BUSY Redis is busy running a script."])
def test_trouble_of_the_server_itself_passes(text: str) -> None:
    assert is_transient(ResponseError(text))


@pytest.mark.parametrize("error", [ResponseError("WRONGTYPE Operation against a key"), RedisError("odd")])
def test_what_stays_wrong_is_not_repeated(error: RedisError) -> None:
    assert not is_transient(error)


async def test_a_connection_that_is_lost_while_it_watches_passes(redis_url: str, redis: Redis) -> None:
    """redis-py calls this a WatchError, at the next command already and not only at EXEC."""
    commands = command_client(redis_url)
    async with commands.pipeline() as pipe:
        await pipe.watch("k")
        await redis.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(WatchError) as loss:
            await pipe.get("k")
    assert is_transient(loss.value)
    await commands.aclose()

"""Commands that are sent together: each caller gets its own replies, and its own error."""

import asyncio

import pytest
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from worker.redisio.batching import CommandBatcher
from worker.redisio.clients import command_client
from worker.redisio.pipelined import Callback, PipelinedConnection, pack


async def test_each_caller_gets_its_own_replies_on_one_connection(redis: Redis, redis_url: str) -> None:
    await redis.set("text", "x", ex=60)
    before = len(await redis.client_list())
    async with command_client(redis_url, connections=1) as client:
        batcher = CommandBatcher(client)

        async def execute(number: int) -> list[object]:
            if number % 50 == 7:
                return await batcher.execute("text", pack(b"LPUSH", b"text", b"x"), 1)
            value = b"%d" % number
            return await batcher.execute("k", pack(b"ECHO", value) + pack(b"ECHO", b"and " + value), 2)

        calls = [asyncio.ensure_future(execute(number)) for number in range(500)]
        await asyncio.sleep(0)
        calls[3].cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for number, answer in enumerate(answers):
            if number == 3:
                assert isinstance(answer, asyncio.CancelledError)
            elif number % 50 == 7:
                assert isinstance(answer, ResponseError)
            else:
                assert answer == [b"%d" % number, b"and %d" % number]
        assert len(await redis.client_list()) == before + 1
        await batcher.aclose()


async def test_commands_after_a_lost_connection_go_on_a_new_one(redis_proxy: Proxy) -> None:
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        held = redis_proxy.hold(b"ECHO")
        calls = [asyncio.ensure_future(batcher.execute("k", pack(b"ECHO", b"x"), 1)) for _ in range(3)]
        await held.met.wait()
        await redis_proxy.cut()
        assert all(isinstance(answer, RedisError) for answer in await asyncio.gather(*calls, return_exceptions=True))
        assert await batcher.execute("k", pack(b"ECHO", b"y"), 1) == [b"y"]
        await batcher.aclose()
        with pytest.raises(RedisConnectionError):
            await batcher.execute("k", pack(b"ECHO", b"z"), 1)


async def test_commands_after_an_error_of_a_former_master_go_on_a_new_connection(redis_proxy: Proxy) -> None:
    refuse = b"""return redis.error_reply("READONLY You can't write against a read only replica.")"""
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        with pytest.raises(ReadOnlyError):
            await batcher.execute("k", pack(b"EVAL", refuse, b"0"), 1)
        assert await batcher.execute("k", pack(b"ECHO", b"x"), 1) == [b"x"]
        await batcher.aclose()
    assert redis_proxy.accepted == 2


async def test_closing_fails_the_callers_that_wait(redis_proxy: Proxy) -> None:
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        held = redis_proxy.hold(b"ECHO")
        calls = asyncio.ensure_future(batcher.execute("k", pack(b"ECHO", b"x"), 1))
        await held.met.wait()
        await batcher.aclose()
        with pytest.raises(RedisConnectionError):
            await calls


async def test_closing_while_it_connects_fails_the_callers_that_wait(redis_proxy: Proxy) -> None:
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        calls = [asyncio.ensure_future(batcher.execute("k", pack(b"ECHO", b"x"), 1)) for _ in range(2)]
        await asyncio.sleep(0)  # the callers begin, and the batch is sent in the step after that
        await asyncio.sleep(0)
        await batcher.aclose()
        assert all(
            isinstance(answer, RedisConnectionError) for answer in await asyncio.gather(*calls, return_exceptions=True)
        )
        assert redis_proxy.accepted == 1


async def test_callers_that_were_just_answered_share_the_next_batch(redis_url: str) -> None:
    """The commands of all jobs that are at the same step are one write."""
    writes: list[int] = []

    class Counted(PipelinedConnection):
        def send(self, packed: bytes, count: int, callback: Callback) -> None:
            writes.append(count)
            super().send(packed, count, callback)

    async with command_client(redis_url, connections=1) as client:
        batcher = CommandBatcher(client, Counted)

        async def call_twice() -> None:
            for _ in range(2):
                await batcher.execute("k", pack(b"PING"), 1)

        await asyncio.gather(*(call_twice() for _ in range(3)))
        assert writes == [3, 3]
        await batcher.aclose()


async def test_commands_of_cancelled_callers_are_not_sent(redis_proxy: Proxy) -> None:
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        assert await batcher.execute("k", pack(b"ECHO", b"x"), 1) == [b"x"]
        calls = asyncio.ensure_future(batcher.execute("k", pack(b"ECHO", b"y"), 1))
        await asyncio.sleep(0)
        calls.cancel()
        assert await batcher.execute("k", pack(b"ECHO", b"z"), 1) == [b"z"]
        await batcher.aclose()
    assert redis_proxy.accepted == 1


async def test_a_timeout_makes_the_next_batches_smaller(redis_proxy: Proxy) -> None:
    """One call that is not answered in time then fails fewer others."""
    async with command_client(redis_proxy.redis_url, connections=1, timeout=2.5) as client:
        batcher = CommandBatcher(client)
        assert await batcher.execute("k", pack(b"PING"), 1) == [b"PONG"]
        failed = []
        for _ in range(2):
            redis_proxy.hold(b"ECHO bad")
            values = [b"bad", *(b"%d" % number for number in range(127))]
            calls = (batcher.execute("k", pack(b"ECHO", value), 1) for value in values)
            answers = await asyncio.gather(*calls, return_exceptions=True)
            failed.append(sum(isinstance(answer, RedisTimeoutError) for answer in answers))
            await redis_proxy.heal()
        assert failed == [128, 32]
        await batcher.aclose()

"""Questions that go together: each caller gets its own answer, and its own error."""

import asyncio

import pytest
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from worker.redisio.batching import CommandBatcher
from worker.redisio.clients import command_client
from worker.redisio.pipelined import pack


async def test_each_gets_its_own_answer_on_one_connection(redis: Redis, redis_url: str) -> None:
    await redis.set("text", "x", ex=60)
    before = len(await redis.client_list())
    async with command_client(redis_url, connections=1) as client:
        batcher = CommandBatcher(client)

        async def ask(number: int) -> list[object]:
            if number % 50 == 7:
                return await batcher.execute("text", pack(b"LPUSH", b"text", b"x"), 1)
            value = b"%d" % number
            return await batcher.execute("k", pack(b"ECHO", value) + pack(b"ECHO", b"and " + value), 2)

        asked = [asyncio.ensure_future(ask(number)) for number in range(500)]
        await asyncio.sleep(0)
        asked[3].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for number, answer in enumerate(answers):
            if number == 3:
                assert isinstance(answer, asyncio.CancelledError)
            elif number % 50 == 7:
                assert isinstance(answer, ResponseError)
            else:
                assert answer == [b"%d" % number, b"and %d" % number]
        assert len(await redis.client_list()) == before + 1
        await batcher.aclose()


async def test_after_a_lost_connection_the_next_question_has_a_new_one(redis_proxy: Proxy) -> None:
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        held = redis_proxy.hold(b"ECHO")
        asked = [asyncio.ensure_future(batcher.execute("k", pack(b"ECHO", b"x"), 1)) for _ in range(3)]
        await held.met.wait()
        await redis_proxy.cut()
        assert all(isinstance(it, RedisError) for it in await asyncio.gather(*asked, return_exceptions=True))
        assert await batcher.execute("k", pack(b"ECHO", b"y"), 1) == [b"y"]
        await batcher.aclose()
        with pytest.raises(RedisConnectionError):
            await batcher.execute("k", pack(b"ECHO", b"z"), 1)


async def test_a_server_that_is_no_master_any_more_is_asked_on_a_new_connection(redis_proxy: Proxy) -> None:
    refuse = b"""return redis.error_reply("READONLY You can't write against a read only replica.")"""
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        with pytest.raises(ReadOnlyError):
            await batcher.execute("k", pack(b"EVAL", refuse, b"0"), 1)
        assert await batcher.execute("k", pack(b"ECHO", b"x"), 1) == [b"x"]
        await batcher.aclose()
    assert redis_proxy.accepted == 2


async def test_closing_answers_whoever_waits(redis_proxy: Proxy) -> None:
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        held = redis_proxy.hold(b"ECHO")
        asked = asyncio.ensure_future(batcher.execute("k", pack(b"ECHO", b"x"), 1))
        await held.met.wait()
        await batcher.aclose()
        with pytest.raises(RedisConnectionError):
            await asked


async def test_questions_that_nobody_waits_for_any_more_are_not_asked(redis_proxy: Proxy) -> None:
    async with command_client(redis_proxy.redis_url, connections=1) as client:
        batcher = CommandBatcher(client)
        assert await batcher.execute("k", pack(b"ECHO", b"x"), 1) == [b"x"]
        asked = asyncio.ensure_future(batcher.execute("k", pack(b"ECHO", b"y"), 1))
        await asyncio.sleep(0)
        asked.cancel()
        assert await batcher.execute("k", pack(b"ECHO", b"z"), 1) == [b"z"]
        await batcher.aclose()
    assert redis_proxy.accepted == 1


async def test_d3_after_a_timeout_fewer_questions_go_as_one(redis_proxy: Proxy) -> None:
    """One question that is not answered in time then keeps fewer others from theirs."""
    async with command_client(redis_proxy.redis_url, connections=1, timeout=0.3) as client:
        batcher = CommandBatcher(client)
        assert await batcher.execute("k", pack(b"PING"), 1) == [b"PONG"]
        failed = []
        for _ in range(2):
            redis_proxy.hold(b"ECHO bad")
            values = [b"bad", *(b"%d" % number for number in range(127))]
            asked = (batcher.execute("k", pack(b"ECHO", value), 1) for value in values)
            answers = await asyncio.gather(*asked, return_exceptions=True)
            failed.append(sum(isinstance(answer, RedisTimeoutError) for answer in answers))
            await redis_proxy.heal()
        assert failed == [128, 32]
        await batcher.aclose()

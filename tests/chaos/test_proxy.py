"""The fault proxy does what it is ordered, and nothing else: the other tests of failures stand on it."""

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest
from proxy import Proxy, end_of
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from worker.redisio.clients import command_client
from worker.sandbox.simulator.server import Simulator


@pytest.fixture
async def through(redis_proxy: Proxy) -> AsyncIterator[Redis]:
    """A client behind the proxy that does not retry."""
    client = command_client(redis_proxy.redis_url)
    yield client
    await client.aclose()


async def transaction(client: Redis, *values: str) -> list[object]:
    pipe = client.pipeline(transaction=True)
    for value in values:
        pipe.rpush("list", value)
    pipe.expire("list", 60)
    return await pipe.execute()


async def held(redis: Redis) -> list[bytes]:
    return cast("list[bytes]", await redis.lrange("list", 0, -1))


def test_the_end_of_a_value_is_found_at_its_last_byte_only() -> None:
    for value in (
        b"+OK\r\n",
        b":12\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"$4\r\na\r\nb\r\n",
        b"*2\r\n*1\r\n:1\r\n$0\r\n\r\n",
    ):
        assert [end_of(value[:size]) for size in range(len(value))] == [None] * len(value)
        assert end_of(value + b"+more\r\n") == len(value)


async def test_without_orders_everything_passes(through: Redis) -> None:
    assert await transaction(through, *map(str, range(500))) == [*range(1, 501), True]
    assert len(await held(through)) == 500


async def test_the_command_whose_reply_is_dropped_was_executed(
    redis: Redis, redis_proxy: Proxy, through: Redis
) -> None:
    order = redis_proxy.drop_reply(rb"RPUSH list lost")
    await transaction(through, "first")
    with pytest.raises(RedisConnectionError):
        await transaction(through, "lost")
    assert order.done.is_set()
    assert await held(redis) == [b"first", b"lost"], "when the client learns of it, it is there"
    await transaction(through, "next")
    assert await held(redis) == [b"first", b"lost", b"next"]


async def test_a_reply_that_is_held_back_arrives_when_it_is_released(
    redis: Redis, redis_proxy: Proxy, through: Redis
) -> None:
    order = redis_proxy.hold_reply(b"RPUSH", reply=b":2")
    await transaction(through, "first")
    waiting = asyncio.create_task(transaction(through, "second"))
    await order.done.wait()
    assert await held(redis) == [b"first", b"second"], "the command was executed"
    assert not waiting.done()
    order.release()
    assert await waiting == [2, True]


async def test_replies_before_the_dropped_one_arrive(redis_proxy: Proxy) -> None:
    redis_proxy.drop_reply(rb"ECHO two")
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_proxy.port)
    for byte in b"*2\r\n$4\r\nECHO\r\n$3\r\none\r\n*2\r\n$4\r\nECHO\r\n$3\r\ntwo\r\n":
        writer.write(bytes([byte]))
        await writer.drain()
    assert await reader.readexactly(9) == b"$3\r\none\r\n"
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()


async def test_only_the_reply_that_matches_is_dropped(redis_proxy: Proxy, through: Redis) -> None:
    order = redis_proxy.drop_reply(rb"^GET", reply=rb"secret")
    assert await through.get("a") is None
    await through.set("a", "secret", ex=60)
    with pytest.raises(RedisConnectionError):
        await through.get("a")
    assert order.done.is_set()
    assert await through.get("a") == b"secret"


async def test_the_command_before_which_is_cut_is_not_executed(
    redis: Redis, redis_proxy: Proxy, through: Redis
) -> None:
    redis_proxy.cut_before(rb"\nEXEC$", times=2)
    for _ in range(2):
        with pytest.raises(RedisConnectionError):
            await transaction(through, "never")
    await transaction(through, "well")
    assert await held(redis) == [b"well"]


async def test_a_held_command_waits_and_others_pass(redis: Redis, redis_proxy: Proxy, through: Redis) -> None:
    order = redis_proxy.hold(rb"RPUSH list held")
    waiting = asyncio.create_task(transaction(through, "held"))
    await order.met.wait()
    await transaction(through, "other")
    assert await held(redis) == [b"other"]
    order.release()
    await waiting
    assert await held(redis) == [b"other", b"held"]


async def test_half_open_connections_stay_silent_until_they_are_healed(redis_proxy: Proxy) -> None:
    async with Redis.from_url(redis_proxy.redis_url, protocol=2) as client:
        await client.ping()
        redis_proxy.half_open()
        waiting = asyncio.ensure_future(client.ping())
        with pytest.raises((RedisTimeoutError, TimeoutError)):
            await asyncio.wait_for(asyncio.shield(waiting), 0.05)
        await redis_proxy.heal()
        assert await waiting


async def test_connections_are_cut_and_refused(redis_proxy: Proxy, through: Redis) -> None:
    await through.ping()
    redis_proxy.refuse()
    assert await through.ping(), "what is there goes on"
    await redis_proxy.cut()
    for _ in range(2):
        with pytest.raises(RedisConnectionError):
            await through.ping()
    await redis_proxy.heal()
    assert await through.ping()


async def test_a_delay_applies_to_each_direction(redis_proxy: Proxy, through: Redis) -> None:
    loop = asyncio.get_running_loop()
    await through.ping()
    redis_proxy.up, redis_proxy.down = 0.03, 0.05
    began = loop.time()
    await through.ping()
    assert loop.time() - began >= 0.08


async def test_a_stream_of_vllm_passes_through_and_can_be_cut(simulator: Simulator) -> None:
    async def exchange(proxy: Proxy) -> bytes:
        body = b'{"messages": [{"role": "user", "content": "Who are you?"}], "stream": true}'
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(body) + body)
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async with Proxy.before(simulator.url) as proxy:
        assert b"[DONE]" in await exchange(proxy)
        order = proxy.drop_reply(rb"POST")
        assert not await exchange(proxy)
        assert order.done.is_set()
        assert len(simulator.served) == 2

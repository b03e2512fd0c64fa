"""Connections that one caller at a time has to itself: what is watched, and what becomes of those that are lost."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from conftest import eventually
from proxy import Proxy
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError, WatchError

from worker.redisio import transactions as lines_module
from worker.redisio.clients import command_client
from worker.redisio.pipelined import pack
from worker.redisio.transactions import Transactions

SET, GET = pack(b"SET", b"k", b"ours", b"EX", b"60"), pack(b"GET", b"k")


@pytest.fixture
async def lines(redis_proxy: Proxy) -> AsyncIterator[Transactions]:
    async with command_client(redis_proxy.redis_url) as client:
        yield Transactions(client)


async def test_nothing_is_done_where_what_is_watched_was_touched(lines: Transactions, redis: Redis) -> None:
    async with lines.to("k") as line:
        assert await line.watch(["k"], GET) == [None]
        await redis.set("k", "theirs", ex=60)
        with pytest.raises(WatchError):
            await line.execute(SET)
        assert await line.watch(["k"], GET) == [b"theirs"]
        assert await line.execute(SET) == [b"OK"]


async def test_what_somebody_watched_before_is_nothing_to_the_next(lines: Transactions, redis: Redis) -> None:
    async with lines.to("k") as line:
        await line.watch(["k"], GET)
    await redis.set("k", "theirs", ex=60)
    async with lines.to("k") as line:
        await line.watch(["other"], GET)
        assert await line.execute(SET) == [b"OK"]


async def test_the_first_refusal_is_raised_and_the_connection_serves_again(
    lines: Transactions, redis_proxy: Proxy
) -> None:
    async with lines.to("k") as line:
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await line.ask(SET, pack(b"XLEN", b"k"))
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await line.execute(SET, pack(b"XLEN", b"k"))
        assert await line.ask(GET) == [b"ours"]
    assert await lines.ask("k", GET) == b"ours"
    assert redis_proxy.accepted == 1


async def test_a_connection_that_was_lost_while_nobody_had_it_is_made_again(
    lines: Transactions, redis_proxy: Proxy
) -> None:
    await lines.ask("k", SET)
    await redis_proxy.cut()

    async def is_seen() -> bool:
        return not any(wire.is_open for place in lines._places.values() for wire in place.free)

    await eventually(is_seen)
    assert await lines.ask("k", GET) == b"ours"


@pytest.mark.parametrize("how", ["lost", "no master any more"])
async def test_one_connection_that_meets_a_server_that_is_gone_takes_the_others_along(
    how: str, lines: Transactions, redis_proxy: Proxy
) -> None:
    async with lines.to("k") as one, lines.to("k") as two:
        await one.ask(SET)
        await two.ask(SET)
    assert redis_proxy.accepted == 2
    if how == "lost":
        redis_proxy.cut_before(rb"^GET")
        with pytest.raises(RedisConnectionError):
            await lines.ask("k", GET)
    else:
        with pytest.raises(ReadOnlyError):
            async with lines.to("k"):
                raise ReadOnlyError("You can't write against a read only replica.")
    assert await lines.ask("k", GET) == b"ours"
    assert redis_proxy.accepted == 3


async def test_who_comes_when_all_are_taken_waits_and_leaves_the_rest_of_the_pool_alone(
    lines: Transactions, redis_proxy: Proxy
) -> None:
    await lines.ask("k", SET)
    held = redis_proxy.hold(rb"^GET")
    asking = [asyncio.create_task(lines.ask("k", GET)) for _ in range(3 * lines_module._MOST)]
    await held.met.wait()
    assert await lines.redis.get("other") is None
    held.release()
    assert await asyncio.gather(*asking) == [b"ours"] * len(asking)
    assert redis_proxy.accepted <= lines_module._MOST + 1

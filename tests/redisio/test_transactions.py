"""Connections that one caller at a time has to itself: what is watched, and what becomes of those that are lost."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from conftest import eventually
from proxy import Proxy
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError, WatchError

from worker.redisio.clients import command_client
from worker.redisio.pipelined import PipelinedConnection, pack
from worker.redisio.transactions import MAX_CONNECTIONS, Transactions

SET, GET = pack(b"SET", b"k", b"ours", b"EX", b"60"), pack(b"GET", b"k")


@pytest.fixture
async def transactions(redis_proxy: Proxy) -> AsyncIterator[Transactions]:
    async with command_client(redis_proxy.redis_url) as client:
        yield Transactions(client)


async def test_nothing_is_done_where_what_is_watched_was_touched(transactions: Transactions, redis: Redis) -> None:
    async with transactions.begin("k") as transaction:
        assert await transaction.watch(["k"], GET) == [None]
        await redis.set("k", "theirs", ex=60)
        with pytest.raises(WatchError):
            await transaction.execute(SET)
        assert await transaction.watch(["k"], GET) == [b"theirs"]
        assert await transaction.execute(SET) == [b"OK"]


async def test_what_somebody_watched_before_is_nothing_to_the_next(transactions: Transactions, redis: Redis) -> None:
    async with transactions.begin("k") as transaction:
        await transaction.watch(["k"], GET)
    await redis.set("k", "theirs", ex=60)
    async with transactions.begin("k") as transaction:
        await transaction.watch(["other"], GET)
        assert await transaction.execute(SET) == [b"OK"]


async def test_the_first_refusal_is_raised_and_the_connection_serves_again(
    transactions: Transactions, redis_proxy: Proxy
) -> None:
    async with transactions.begin("k") as transaction:
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await transaction.query(SET, pack(b"XLEN", b"k"))
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await transaction.execute(SET, pack(b"XLEN", b"k"))
        assert await transaction.query(GET) == [b"ours"]
    assert await transactions.execute("k", GET) == b"ours"
    assert redis_proxy.accepted == 1


async def test_a_connection_that_was_lost_while_nobody_had_it_is_made_again(
    redis_proxy: Proxy,
) -> None:
    opened: list[PipelinedConnection] = []

    class Recorded(PipelinedConnection):
        def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
            super().__init__(pool, connection)
            opened.append(self)

    async def is_lost() -> bool:
        return not opened[0].is_open

    async with command_client(redis_proxy.redis_url) as client:
        transactions = Transactions(client, Recorded)
        await transactions.execute("k", SET)
        await redis_proxy.cut()
        await eventually(is_lost)
        assert await transactions.execute("k", GET) == b"ours"


@pytest.mark.parametrize("how", ["lost", "no master any more"])
async def test_one_connection_that_meets_a_server_that_is_gone_takes_the_others_along(
    how: str, transactions: Transactions, redis_proxy: Proxy
) -> None:
    async with transactions.begin("k") as one, transactions.begin("k") as two:
        await one.query(SET)
        await two.query(SET)
    assert redis_proxy.accepted == 2
    if how == "lost":
        redis_proxy.cut_before(rb"^GET")
        with pytest.raises(RedisConnectionError):
            await transactions.execute("k", GET)
    else:
        with pytest.raises(ReadOnlyError):
            async with transactions.begin("k"):
                raise ReadOnlyError("You can't write against a read only replica.")
    assert await transactions.execute("k", GET) == b"ours"
    assert redis_proxy.accepted == 3


async def test_who_comes_when_all_are_taken_waits_and_leaves_the_rest_of_the_pool_alone(
    transactions: Transactions, redis_proxy: Proxy
) -> None:
    await transactions.execute("k", SET)
    held = redis_proxy.hold(rb"^GET")
    asking = [asyncio.create_task(transactions.execute("k", GET)) for _ in range(3 * MAX_CONNECTIONS)]
    await held.met.wait()
    assert await transactions.redis.get("other") is None
    held.release()
    assert await asyncio.gather(*asking) == [b"ours"] * len(asking)
    assert redis_proxy.accepted <= MAX_CONNECTIONS + 1

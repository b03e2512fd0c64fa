"""Transactions: what is watched, and what happens to lost connections."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from proxy import Proxy
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError, WatchError
from waits import eventually

from worker.redisio.clients import command_client
from worker.redisio.pipelined import PipelinedConnection, pack
from worker.redisio.transactions import MAX_CONNECTIONS, Transactions

SET, GET = pack(b"SET", b"k", b"ours", b"EX", b"60"), pack(b"GET", b"k")


@pytest.fixture
async def transactions(redis_proxy: Proxy) -> AsyncIterator[Transactions]:
    async with command_client(redis_proxy.redis_url) as client:
        yield Transactions(client)


async def query(transactions: Transactions, command: bytes) -> object:
    async with transactions.begin("k") as transaction:
        (reply,) = await transaction.query(command)
    return reply


async def test_nothing_is_executed_when_a_watched_key_changed(transactions: Transactions, redis: Redis) -> None:
    async with transactions.begin("k") as transaction:
        assert await transaction.watch(["k"], GET) == [None]
        await redis.set("k", "theirs", ex=60)
        with pytest.raises(WatchError):
            await transaction.execute(SET)
        assert await transaction.watch(["k"], GET) == [b"theirs"]
        assert await transaction.execute(SET) == [b"OK"]


async def test_the_next_caller_watches_no_keys_of_an_earlier_one(transactions: Transactions, redis: Redis) -> None:
    async with transactions.begin("k") as transaction:
        await transaction.watch(["k"], GET)
    await redis.set("k", "theirs", ex=60)
    async with transactions.begin("k") as transaction:
        await transaction.watch(["other"], GET)
        assert await transaction.execute(SET) == [b"OK"]


async def test_the_first_refusal_is_raised_and_the_connection_stays_usable(
    transactions: Transactions, redis_proxy: Proxy
) -> None:
    async with transactions.begin("k") as transaction:
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await transaction.query(SET, pack(b"XLEN", b"k"))
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await transaction.execute(SET, pack(b"XLEN", b"k"))
        assert await transaction.query(GET) == [b"ours"]
    assert await query(transactions, GET) == b"ours"
    assert redis_proxy.accepted == 1


async def test_a_connection_lost_while_idle_is_replaced(redis_proxy: Proxy) -> None:
    opened: list[PipelinedConnection] = []

    class Recorded(PipelinedConnection):
        def __init__(self, pool: ConnectionPool, connection: AbstractConnection) -> None:
            super().__init__(pool, connection)
            opened.append(self)

    async def is_lost() -> bool:
        return not opened[0].is_open

    async with command_client(redis_proxy.redis_url) as client:
        transactions = Transactions(client, Recorded)
        await query(transactions, SET)
        await redis_proxy.cut()
        await eventually(is_lost)
        assert await query(transactions, GET) == b"ours"


@pytest.mark.parametrize("how", ["lost", "former master"])
async def test_a_connection_that_meets_a_lost_server_drops_the_idle_ones_too(
    how: str, transactions: Transactions, redis_proxy: Proxy
) -> None:
    async with transactions.begin("k") as one, transactions.begin("k") as two:
        await one.query(SET)
        await two.query(SET)
    assert redis_proxy.accepted == 2
    if how == "lost":
        redis_proxy.cut_before(rb"^GET")
        with pytest.raises(RedisConnectionError):
            await query(transactions, GET)
    else:
        with pytest.raises(ReadOnlyError):
            async with transactions.begin("k"):
                raise ReadOnlyError("You can't write against a read only replica.")
    assert await query(transactions, GET) == b"ours"
    assert redis_proxy.accepted == 3


async def test_a_caller_waits_when_all_connections_are_taken_and_the_pool_serves_other_commands(
    transactions: Transactions, redis_proxy: Proxy
) -> None:
    await query(transactions, SET)
    held = redis_proxy.hold(rb"^GET")
    queries = [asyncio.create_task(query(transactions, GET)) for _ in range(3 * MAX_CONNECTIONS)]
    await held.met.wait()
    assert await transactions.redis.get("other") is None
    held.release()
    assert await asyncio.gather(*queries) == [b"ours"] * len(queries)
    assert redis_proxy.accepted <= MAX_CONNECTIONS + 1

"""A follower that is cancelled stops, whatever the Redis client makes of the cancellation."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from written_log import START, WrittenLog, user_without_channels

from worker import Client
from worker.client.errors import MappedRetry
from worker.client.following.followers import Followers
from worker.client.log_reader import LogReader
from worker.client.timings import Timings
from worker.contract.ids import BEFORE_ALL
from worker.contract.keys import Keys
from worker.redisio.clients import command_client


class LosingRedis(Redis):
    """Loses a cancellation while it reads, as redis-py 8.1 may: it gives an answer, or fails."""

    reading: asyncio.Event
    fails: bool

    async def xread(self, *_: object, **__: object) -> Any:  # noqa: ANN401 - as redis-py has it
        self.reading.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if self.fails:
                raise RedisConnectionError("closed while sending") from None
        return [(b"log", [(b"1-0", {b"type": b"started"})])]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_that_redis_py_loses_still_ends_the_follower(
    *, fails: bool, redis: Redis, redis_url: str
) -> None:
    keys = Keys("chat")
    await WrittenLog(redis).write(START)
    async with user_without_channels(redis, redis_url) as deaf_url:
        blocking = LosingRedis()
        blocking.reading, blocking.fails = asyncio.Event(), fails
        commands = command_client(deaf_url)
        logs = LogReader(commands, blocking, keys, MappedRetry(5), Timings())
        async with aclosing(Followers(commands, keys, logs)) as followers:
            follower = followers.follow("r", BEFORE_ALL)
            pouring = asyncio.ensure_future(follower.pour(lambda _: None))
            await blocking.reading.wait()
            pouring.cancel()
            done, _ = await asyncio.wait({pouring}, timeout=5)
            assert done
            assert pouring.cancelled()
            await follower.leave()


async def test_after_a_cancellation_the_client_can_still_be_used(client: Client) -> None:
    enqueued = asyncio.Event()

    async def follow_and_cancel() -> str:
        request_id = await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})
        enqueued.set()
        try:
            await client.result(request_id)
        except asyncio.CancelledError:
            return (await client.cancel(request_id)).state.value
        return ""

    follower = asyncio.ensure_future(follow_and_cancel())

    await enqueued.wait()
    follower.cancel()
    assert await follower == "queued"

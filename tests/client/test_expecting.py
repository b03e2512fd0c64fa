"""A client that expects a request before it is enqueued gets the first entries from the feed."""

import asyncio

from conftest import StartWorker
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.contract.keys import Keys
from worker.sandbox.simulator.server import Simulator

ASK: dict[str, object] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}


async def subscribers(redis: Redis, request_id: str) -> int:
    ((_, count),) = await redis.pubsub_numsub(Keys().feed(request_id))
    return int(count)


async def test_a_feed_has_a_subscriber_before_the_log_exists_and_until_the_last_follower_leaves(
    client: Client, redis: Redis, simulator: Simulator, start_worker: StartWorker
) -> None:
    release = client.expect("r")

    async def is_subscribed() -> bool:
        return await subscribers(redis, "r") == 1

    await eventually(is_subscribed)
    await client.enqueue(ASK, id="r")
    following = asyncio.create_task(client.result("r"))
    await start_worker(simulator)
    assert (await following).outcome == "done"
    assert await subscribers(redis, "r") == 1
    release()
    release()

    async def is_left() -> bool:
        return await subscribers(redis, "r") == 0

    await eventually(is_left)

"""A follower that is cancelled stops, whatever the Redis client makes of the cancellation."""

import asyncio

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from worker import Client
from worker.redisio.subscriptions import Listener


@pytest.mark.parametrize("how", ["answers", "fails"])
async def test_a_cancellation_that_redis_py_loses_still_ends_the_follower(
    how: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = asyncio.Event()

    async def xread(*_: object, **__: object) -> object:
        reading.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if how == "fails":
                raise RedisConnectionError("closed while sending") from None
        return [(b"log", [(b"1-0", {b"type": b"started"})])]

    def refuse(_: str, listener: Listener) -> None:
        listener.on_refused(RedisError())

    monkeypatch.setattr(client._following.logs._reader, "xread", xread)
    monkeypatch.setattr(client._following.subscriptions, "subscribe", refuse)
    await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]}, id="any")
    follower = asyncio.ensure_future(client.result("any"))
    await reading.wait()
    follower.cancel()
    done, _ = await asyncio.wait({follower}, timeout=5)
    assert done
    assert follower.cancelled()


async def test_after_a_cancellation_the_client_can_still_be_used(client: Client) -> None:
    async def follow_and_cancel() -> str:
        request_id = await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]})
        try:
            await client.result(request_id)
        except asyncio.CancelledError:
            return (await client.cancel(request_id)).state.value
        return ""

    follower = asyncio.ensure_future(follow_and_cancel())

    async def waits() -> bool:
        return bool(await client._redis.keys("chat:tokens:*"))

    async with asyncio.timeout(5):
        while not await waits():  # noqa: ASYNC110 - what is waited for is in Redis
            await asyncio.sleep(0.01)
    follower.cancel()
    assert await follower == "queued"

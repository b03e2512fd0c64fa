"""What the records of the lifecycle stream hold."""

from conftest import stream
from redis.asyncio import Redis

from worker.broker.lifecycle import LifecycleWriter
from worker.contract.keys import Keys
from worker.contract.records import Lifecycle
from worker.redisio.batching import CommandBatcher


async def test_a_lifecycle_record_leaves_out_empty_fields(redis: Redis) -> None:
    lifecycle = LifecycleWriter(CommandBatcher(redis), Keys())
    await lifecycle.write(Lifecycle(type="started", id="r", job="5-1", queue="default", attempt=1, time=9))
    ((_, fields),) = await stream(redis, "chat:lifecycle")
    assert fields == {
        b"type": b"started", b"id": b"r", b"job": b"5-1", b"queue": b"default", b"attempt": b"1", b"time": b"9",
    }  # fmt: skip

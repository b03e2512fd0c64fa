"""Jobs that are pending with a worker which does not exist, with the records and logs that it would have written."""

from collections.abc import Iterator
from itertools import count
from typing import cast

from redis.asyncio import Redis

from worker.contract.keys import GROUP

_numbers: Iterator[int] = count()


async def pend(redis: Redis, consumer: str, *, started: bool = True) -> str:
    """Add a job and deliver it to a consumer, as a worker that starts it does. Returns the request id."""
    request_id = f"request-{next(_numbers)}"
    job = cast("bytes", await redis.xadd("chat:jobs", {"id": request_id, "request": "{}"})).decode()
    await redis.xreadgroup(GROUP, consumer, {"chat:jobs": ">"}, count=1)
    if started:
        await record(redis, "started", request_id, job)
    return request_id


async def record(redis: Redis, kind: str, request_id: str, job: str) -> None:
    seconds, _ = await redis.time()
    await redis.xadd(
        "chat:lifecycle",
        {"type": kind, "id": request_id, "job": job, "queue": "default", "attempt": "1", "time": str(seconds * 1000)},
    )


async def append(redis: Redis, request_id: str, *ids: str) -> None:
    for entry_id in ids:
        await redis.xadd(f"chat:tokens:{{{request_id}}}", {"type": "delta", "content": "secret"}, id=entry_id)
    await redis.expire(f"chat:tokens:{{{request_id}}}", 60)

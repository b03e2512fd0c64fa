"""A log that a test writes and publishes by hand."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from redis.asyncio import Redis

from worker import Delta, Entry
from worker.broker.client_seals import GRACE
from worker.broker.log_pages import RawEntry
from worker.client.errors import MappedRetry
from worker.client.following.followers import Followers
from worker.client.timings import Timings
from worker.contract.entries import Done, Fields, Started, to_fields, to_json
from worker.contract.ids import SEAL, EntryId
from worker.contract.keys import Keys
from worker.redisio.urls import database_of


def delta(attempt: int, n: int) -> Delta:
    return Delta(id=EntryId(attempt, n), content=f"{attempt}-{n} ", token_ids=[n])


def connect(url: str, timings: Timings | None = None, patience: float = 5.0) -> Followers:
    """Return what a client follows with."""
    return Followers.connect(url, Keys("chat", database_of(url)), MappedRetry(patience), timings or Timings())


async def let_deadline_pass(redis: Redis, request_id: str, after: float = -0.1) -> None:
    """Change a request that waits so that clients end it in so many seconds."""
    key = f"chat:tokens:{{{request_id}}}"
    ((_, fields),) = cast("list[RawEntry]", await redis.xrange(key))
    left = await redis.pttl(key)
    fields[b"deadline"] = str(int((time.time() + after - GRACE) * 1000)).encode()
    await redis.delete(key)
    await redis.xadd(key, fields, id="0-1")  # type: ignore[arg-type]  # dict is invariant
    await redis.pexpire(key, left)


@asynccontextmanager
async def user_without_channels(redis: Redis, url: str) -> AsyncIterator[str]:
    """The URL of a user to whom Redis refuses every subscription."""
    await redis.acl_setuser(
        "deaf", enabled=True, passwords="+pw", keys=["chat:*"], categories=["+@all"], reset_channels=True
    )
    yield url.replace("//", "//deaf:pw@")
    await redis.acl_deluser("deaf")


class WrittenLog:
    """A log, written and published to its feed by hand."""

    def __init__(self, redis: Redis, request_id: str = "r", channel: str = "") -> None:
        self.id = request_id
        self.key, self.channel = f"chat:tokens:{{{request_id}}}", channel or f"chat:feed:{{{request_id}}}"
        self.written: list[Entry] = []
        self._redis = redis

    async def write(self, *entries: Entry) -> None:
        """Add entries to the log without a message on the feed."""
        pipe = self._redis.pipeline(transaction=False)
        for entry in entries:
            fields: Fields = to_fields(entry)
            pipe.xadd(self.key, fields, id=str(entry.id))  # type: ignore[arg-type]  # dict is invariant
            self.written.append(entry)
        pipe.expire(self.key, 600)
        await pipe.execute()

    async def publish(self, *entries: Entry) -> None:
        """Publish a message of these entries on the feed."""
        await self._redis.publish(self.channel, to_json([[str(entry.id), to_fields(entry)] for entry in entries]))

    async def append(self, *entries: Entry) -> None:
        """Write and publish one entry after another."""
        for entry in entries:
            await self.write(entry)
            await self.publish(entry)

    async def subscribers(self) -> int:
        """The number of subscribers of the feed."""
        ((_, count),) = await self._redis.pubsub_numsub(self.channel)
        return int(count)


START, END = Started(id=EntryId(1, 0)), Done(id=SEAL, attempt=1)

"""Readers of logs for tests: followers in tasks, which record the entries that they get."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

import pytest
from redis.asyncio import Redis
from waits import eventually
from written_log import START, WrittenLog, connect

from worker import Entry
from worker.client.following.followers import Followers
from worker.client.timings import Timings
from worker.contract.ids import BEFORE_ALL, EntryId


@pytest.fixture
async def log(redis: Redis) -> WrittenLog:
    await redis.config_resetstat()
    return WrittenLog(redis)


NOBODY_POLLS = pytest.mark.parametrize("timings", [Timings(tick=1000.0)], ids=["nobody polls"])
"""No silence is too long."""


IMPATIENT = pytest.mark.parametrize("timings", [Timings(tick=0.01)], ids=["impatient"])
"""Silence is too long very soon."""


@pytest.fixture
def timings() -> Timings:
    return Timings()


@pytest.fixture
async def followers(redis_url: str, timings: Timings) -> AsyncIterator[Followers]:
    async with aclosing(connect(redis_url, timings)) as followers:
        yield followers


@pytest.fixture(params=["follow", "pour"])
def pours(request: pytest.FixtureRequest) -> bool:
    """Followers pour, or wait and drain: tests do both."""
    return bool(request.param == "pour")


POURS = pytest.mark.parametrize("pours", [True])


class Reader:
    """Follows a request in a task, and notes what it sees."""

    def __init__(
        self,
        followers: Followers,
        request_id: str = "r",
        after: EntryId | None = None,
        into: Callable[[Entry], None] | None = None,
        *,
        pours: bool,
    ) -> None:
        self.seen: list[Entry] = []
        self._into = into or self.seen.append
        self._followers = followers
        self._id = request_id
        self._pours = pours
        self.task = asyncio.create_task(self._read(after))

    async def _read(self, after: EntryId | None) -> None:
        follower = self._followers.follow(self._id, after or BEFORE_ALL)
        try:
            if self._pours:
                await follower.pour(self._into)
            while not follower.is_over:
                await follower.wait_ready()
                for entry in follower.drain():
                    self._into(entry)
        finally:
            await follower.leave()

    async def has(self, *entries: Entry) -> None:
        """Wait until these are the last entries that it has seen."""

        async def seen() -> bool:
            if self.task.done():
                self.task.result()
            return self.seen[-len(entries) :] == list(entries)

        await eventually(seen)

    async def listens(self) -> None:
        """Wait until it reads nothing but what the feed leaves out."""

        async def is_noticed() -> bool:
            request = self._followers.requests.get(self._id)
            return (
                request is not None
                and request.feed.is_noticed
                and all(follower.is_waiting for follower in request.followers)
            )

        await eventually(is_noticed)


StartReader = Callable[..., Reader]


@pytest.fixture
def start_reader(followers: Followers, *, pours: bool) -> StartReader:
    return partial(Reader, followers, pours=pours)


StartListener = Callable[[], Awaitable[Reader]]


@pytest.fixture
def start_listener(start_reader: StartReader, log: WrittenLog) -> StartListener:
    """Starts a reader of a request that has begun, and waits until it listens."""

    async def start() -> Reader:
        await log.write(START)
        reader = start_reader()
        await reader.listens()
        return reader

    return start


async def calls(redis: Redis, command: str) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))

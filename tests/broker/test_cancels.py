"""The listener for hints of cancels: what it has verified when, and what it reports while it is refused or lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis
from waits import eventually

from worker.broker.cancels import CancelListener
from worker.redisio.clients import blocking_client
from worker.telemetry.events import CancelHintsRefused, Event, Failing, Recovered


class Recorder:
    """A publisher and a telemetry that note what they get."""

    def __init__(self) -> None:
        self.verified: list[str] = []
        self.events: list[Event] = []

    def verify(self, request_id: str) -> None:
        self.verified.append(request_id)

    def verify_all(self) -> None:
        self.verified.append("all")

    def emit(self, event: Event) -> None:
        self.events.append(event)

    async def has_verified(self, *what: str) -> None:
        """Wait until exactly these were verified."""

        async def verified() -> bool:
            return self.verified == list(what)

        await eventually(verified)


@asynccontextmanager
async def listening(url: str, recorder: Recorder) -> AsyncIterator[None]:
    async with blocking_client(url, 1.0) as redis:
        listener = CancelListener(
            redis, "chat:cancel", "chat:feed:worker:one", recorder, recorder, retry_refused_after=0.02
        )
        running = asyncio.create_task(listener.run())
        yield
        listener.stop()
        await running


async def test_a_hint_has_one_log_verified_and_a_new_subscription_has_all(redis: Redis, redis_url: str) -> None:
    recorder = Recorder()
    async with listening(redis_url, recorder):
        await recorder.has_verified("all")
        assert await redis.publish("chat:cancel", "r") == 1
        await recorder.has_verified("all", "r")
        await redis.publish("chat:cancel", b"\xff")
        await recorder.has_verified("all", "r", "�")
    assert not recorder.events

    async def is_left() -> bool:
        return await redis.pubsub_numsub("chat:cancel") == [(b"chat:cancel", 0)]

    await eventually(is_left)  # Redis sees the closed connection a moment later


async def test_a_lost_connection_is_reported_and_made_again(redis: Redis, redis_url: str) -> None:
    recorder = Recorder()
    async with listening(redis_url, recorder):
        await recorder.has_verified("all")
        await redis.client_kill_filter(_type="pubsub")
        await recorder.has_verified("all", "all")
    assert [type(event) for event in recorder.events] == [Failing, Recovered]
    assert isinstance(lost := recorder.events[0], Failing)
    assert lost.what == "cancel_hints_lost"
    assert recorder.events[1] == Recovered("cancel_hints_lost")


@pytest.mark.parametrize("refused", ["the channel", "the password"])
async def test_a_refused_subscription_is_requested_again_and_reported_once(
    refused: str, redis: Redis, redis_url: str
) -> None:
    """A right may be given later, and a password that was changed may be changed back."""
    await redis.acl_setuser("mute", enabled=True, passwords="+pw", categories=["+@all"], reset_channels=True)
    if refused == "the password":
        await redis.acl_setuser("mute", enabled=True, passwords=["-pw", "+other"], channels=["chat:*"])
    recorder = Recorder()

    async def times_refused() -> int:
        return sum([int(str(entry["count"])) for entry in await redis.acl_log()])

    async def refused_again() -> bool:
        return await times_refused() > 2

    await redis.acl_log_reset()
    try:
        async with listening(redis_url.replace("//", "//mute:pw@"), recorder):
            await eventually(refused_again)
            assert [type(event) for event in recorder.events] == [CancelHintsRefused]
            await redis.acl_setuser("mute", enabled=True, passwords="+pw", channels=["chat:*"])
            await recorder.has_verified("all")
            assert recorder.events[1:] == [Recovered("cancel_hints_refused")]
            await redis.publish("chat:cancel", "r")
            await recorder.has_verified("all", "r")
    finally:
        await redis.acl_deluser("mute")

"""Subscriptions: made together, made again after a lost connection, and dropped or requested again after a refusal."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker.redisio.clients import command_client
from worker.redisio.subscriptions import Subscriptions


class Recorder:
    """A listener that notes its calls."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.times_subscribed = self.times_interrupted = self.times_refused = 0

    def on_message(self, payload: bytes) -> None:
        self.messages.append(payload)

    def on_subscribed(self) -> None:
        self.times_subscribed += 1

    def on_interrupted(self) -> None:
        self.times_interrupted += 1

    def on_refused(self, error: Exception) -> None:
        assert "permission" in str(error) or "password" in str(error)
        self.times_refused += 1


@pytest.fixture
async def subscriptions(redis_proxy: Proxy) -> AsyncIterator[Subscriptions]:
    async with command_client(redis_proxy.redis_url, connections=1) as redis:
        subscriptions = Subscriptions(redis, silence=2.5)  # for which a busy machine may not run Redis
        yield subscriptions
        await subscriptions.aclose()


@pytest.fixture
async def mute_url(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The URL of a user without a right to any channel."""
    await redis.acl_setuser("mute", enabled=True, passwords="+pw", categories=["+@all"], reset_channels=True)
    yield redis_url.replace("//", "//mute:pw@")
    await redis.acl_deluser("mute")


async def until(*listeners: Recorder, subscribed: int = 1) -> None:
    async def all_are() -> bool:
        return all(listener.times_subscribed >= subscribed for listener in listeners)

    await eventually(all_are)


async def has_received(listener: Recorder, *messages: bytes) -> None:
    async def received() -> bool:
        return listener.messages == list(messages)

    await eventually(received)


async def test_each_listener_gets_the_messages_of_its_channel_until_it_unsubscribes(
    subscriptions: Subscriptions, redis: Redis
) -> None:
    listeners = {f"c{number}": Recorder() for number in range(50)}
    for channel, listener in listeners.items():
        subscriptions.subscribe(channel, listener)
    await until(*listeners.values())
    subscriptions.unsubscribe("c0")
    subscriptions.unsubscribe("c1")
    again = Recorder()
    subscriptions.subscribe("c1", again)
    await until(again)
    for channel in listeners:
        assert await redis.publish(channel, channel) == (channel != "c0")
    await has_received(listeners["c49"], b"c49")
    expected = [[], [], *([channel.encode()] for channel in list(listeners)[2:])]
    assert [listener.messages for listener in listeners.values()] == expected
    assert again.messages == [b"c1"]


async def test_a_channel_that_is_left_before_it_was_subscribed_to_is_not_subscribed_to(
    subscriptions: Subscriptions, redis: Redis
) -> None:
    left, stays = Recorder(), Recorder()
    subscriptions.subscribe("left", left)
    subscriptions.unsubscribe("left")
    subscriptions.subscribe("stays", stays)
    await until(stays)
    assert await redis.publish("left", "x") == 0


@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_a_lost_connection_is_made_again_with_every_channel(
    how: str, subscriptions: Subscriptions, redis: Redis, redis_proxy: Proxy
) -> None:
    listeners = [Recorder() for _ in range(3)]
    for number, listener in enumerate(listeners):
        subscriptions.subscribe(f"c{number}", listener)
    await until(*listeners)
    if how == "cut":
        await redis_proxy.cut()
    else:
        redis_proxy.half_open()

        async def interrupted() -> bool:
            return all(listener.times_interrupted for listener in listeners)

        await eventually(interrupted)
        await redis_proxy.cut()
        redis_proxy.open.set()
    await until(*listeners, subscribed=2)
    assert [listener.times_interrupted for listener in listeners] >= [1, 1, 1]
    await redis.publish("c2", "x")  # Redis may still have the lost connection among the subscribers
    await has_received(listeners[2], b"x")


async def test_a_silent_connection_that_answers_a_ping_is_kept(subscriptions: Subscriptions, redis: Redis) -> None:
    async def pings() -> int:
        statistics = await redis.info("commandstats")
        return int(statistics.get("cmdstat_ping", {}).get("calls", 0))

    listener = Recorder()
    subscriptions.subscribe("c", listener)
    await until(listener)
    before = await pings()

    async def has_answered_twice() -> bool:
        return await pings() >= before + 2  # the second is sent only after a whole silence with an answer

    await eventually(has_answered_twice)
    assert (listener.times_subscribed, listener.times_interrupted) == (1, 0)


async def test_a_refusal_is_reported_to_every_listener_also_to_later_ones(mute_url: str) -> None:
    async with command_client(mute_url, connections=1) as redis:
        subscriptions = Subscriptions(redis)
        for channel in ("c1", "c2"):
            listener = Recorder()
            subscriptions.subscribe(channel, listener)

            async def refused(listener: Recorder = listener) -> bool:
                return listener.times_refused == 1

            await eventually(refused)
        await subscriptions.aclose()


async def test_a_refused_subscription_is_requested_again_unless_it_was_ended(redis: Redis, mute_url: str) -> None:
    stays, left = Recorder(), Recorder()
    async with command_client(mute_url, connections=1) as client:
        subscriptions = Subscriptions(client, retry_refused_after=0.02)
        subscriptions.subscribe("stays", stays)
        subscriptions.subscribe("left", left)

        async def refused_again() -> bool:
            return min(stays.times_refused, left.times_refused) > 1

        await eventually(refused_again)
        subscriptions.unsubscribe("left")
        await redis.acl_setuser("mute", enabled=True, channels=["*"])
        await until(stays)
        assert await redis.publish("left", "x") == 0
        assert await redis.publish("stays", "x") == 1
        await has_received(stays, b"x")
        await subscriptions.aclose()


async def test_refused_channels_are_requested_again_also_if_the_one_that_was_requested_is_left_meanwhile(
    redis: Redis, mute_url: str, redis_proxy: Proxy
) -> None:
    left, stays = Recorder(), Recorder()
    url = mute_url.replace(str(redis_proxy.upstream), str(redis_proxy.port))
    async with command_client(url, connections=1) as client:
        subscriptions = Subscriptions(client, retry_refused_after=0.02)
        held = redis_proxy.hold(b"SUBSCRIBE left")
        subscriptions.subscribe("stays", stays)

        async def refused() -> bool:
            return stays.times_refused > 0

        await eventually(refused)
        subscriptions.subscribe("left", left)
        await held.met.wait()
        subscriptions.unsubscribe("left")
        await redis.acl_setuser("mute", enabled=True, channels=["*"])
        held.release()
        await until(stays)
        await subscriptions.aclose()


async def test_after_a_password_was_restored_every_channel_is_subscribed_to_again(redis: Redis, redis_url: str) -> None:
    async def set_password(password: str) -> None:
        await redis.acl_setuser(
            "user", enabled=True, reset_passwords=True, passwords=f"+{password}", categories=["+@all"], channels=["*"]
        )

    await set_password("right")
    listeners = [Recorder() for _ in range(3)]
    async with command_client(redis_url.replace("//", "//user:right@"), connections=1) as client:
        subscriptions = Subscriptions(client, retry_refused_after=0.02)
        for number, listener in enumerate(listeners):
            subscriptions.subscribe(f"c{number}", listener)
        await until(*listeners)
        await set_password("changed")
        await redis.client_kill_filter(_type="pubsub")

        async def refused() -> bool:
            return all(listener.times_refused for listener in listeners)

        await eventually(refused)
        await set_password("right")
        await until(*listeners, subscribed=2)
        assert [await redis.publish(f"c{number}", "x") for number in range(3)] == [1, 1, 1]
        await subscriptions.aclose()
    await redis.acl_deluser("user")


async def test_a_refusal_costs_one_request_a_pause_for_any_number_of_channels(redis: Redis, mute_url: str) -> None:
    async def requests() -> int:
        statistics = await redis.info("commandstats")
        return int(statistics["cmdstat_subscribe"].get("rejected_calls", 0))

    listeners = [Recorder() for _ in range(50)]
    async with command_client(mute_url, connections=1) as client:
        subscriptions = Subscriptions(client, retry_refused_after=0.02)
        for number, listener in enumerate(listeners):
            subscriptions.subscribe(f"c{number}", listener)

        async def all_refused() -> bool:
            return all(listener.times_refused for listener in listeners)

        await eventually(all_refused)
        before, tries_before = await requests(), sum(listener.times_refused for listener in listeners)

        async def requested_again() -> bool:
            return sum(listener.times_refused for listener in listeners) >= tries_before + 10

        await eventually(requested_again)
        assert await requests() - before < 20
        await redis.acl_setuser("mute", enabled=True, channels=["*"])
        await until(*listeners)
        subscriptions.unsubscribe("c0")
        assert await redis.publish("c49", "x") == 1
        await subscriptions.aclose()


async def test_closing_while_it_connects_leaves_nothing(redis_proxy: Proxy) -> None:
    redis_proxy.half_open()
    async with command_client(redis_proxy.redis_url, connections=1) as redis:
        subscriptions = Subscriptions(redis)
        subscriptions.subscribe("c", Recorder())
        for _ in range(5):
            await asyncio.sleep(0)
        await subscriptions.aclose()
    assert not [task for task in asyncio.all_tasks() if "Subscriptions" in repr(task.get_coro())]

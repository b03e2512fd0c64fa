"""Subscriptions: made together, made again after a loss, and given up where Redis refuses them."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from conftest import eventually
from proxy import Proxy
from redis.asyncio import Redis

from worker.redisio.clients import command_client
from worker.redisio.subscriptions import Subscriptions


class Ear:
    """Notes what a listener is told."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.times_subscribed = self.times_interrupted = self.times_refused = 0

    def hear(self, payload: bytes) -> None:
        self.heard.append(payload)

    def subscribed(self) -> None:
        self.times_subscribed += 1

    def interrupted(self) -> None:
        self.times_interrupted += 1

    def refused(self) -> None:
        self.times_refused += 1


@pytest.fixture
async def subscriptions(redis_proxy: Proxy) -> AsyncIterator[Subscriptions]:
    async with command_client(redis_proxy.redis_url, connections=1) as redis:
        subscriptions = Subscriptions(redis)
        yield subscriptions
        await subscriptions.aclose()


async def until(*ears: Ear, subscribed: int = 1) -> None:
    async def all_are() -> bool:
        return all(ear.times_subscribed >= subscribed for ear in ears)

    await eventually(all_are)


async def test_each_hears_its_own_channel_until_it_leaves(subscriptions: Subscriptions, redis: Redis) -> None:
    ears = {f"c{number}": Ear() for number in range(50)}
    for channel, ear in ears.items():
        subscriptions.subscribe(channel, ear)
    await until(*ears.values())
    subscriptions.unsubscribe("c0")
    subscriptions.unsubscribe("c1")
    again = Ear()
    subscriptions.subscribe("c1", again)
    await until(again)
    for channel in ears:
        assert await redis.publish(channel, channel) == (channel != "c0")

    async def heard() -> bool:
        return ears["c49"].heard == [b"c49"]

    await eventually(heard)
    assert [ear.heard for ear in ears.values()] == [[], [], *([channel.encode()] for channel in list(ears)[2:])]
    assert again.heard == [b"c1"]


async def test_a_channel_that_is_left_before_it_was_subscribed_to_is_none(
    subscriptions: Subscriptions, redis: Redis
) -> None:
    left, stays = Ear(), Ear()
    subscriptions.subscribe("left", left)
    subscriptions.unsubscribe("left")
    subscriptions.subscribe("stays", stays)
    await until(stays)
    assert await redis.publish("left", "x") == 0


@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_a_lost_connection_is_made_again_with_all_that_is_heard(
    how: str, subscriptions: Subscriptions, redis: Redis, redis_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.redisio.subscriptions._SILENCE", 0.1)
    ears = [Ear() for _ in range(3)]
    for number, ear in enumerate(ears):
        subscriptions.subscribe(f"c{number}", ear)
    await until(*ears)
    if how == "cut":
        await redis_proxy.cut()
    else:
        redis_proxy.half_open()

        async def interrupted() -> bool:
            return all(ear.times_interrupted for ear in ears)

        await eventually(interrupted)
        await redis_proxy.cut()
        redis_proxy.open.set()
    await until(*ears, subscribed=2)
    assert [ear.times_interrupted for ear in ears] >= [1, 1, 1]
    assert await redis.publish("c2", "x") == 1

    async def heard() -> bool:
        return ears[2].heard == [b"x"]

    await eventually(heard)


async def test_who_may_not_listen_is_told_and_so_are_those_who_come_later(redis: Redis, redis_url: str) -> None:
    await redis.acl_setuser("deaf", enabled=True, passwords="+pw", categories=["+@all"], reset_channels=True)
    try:
        async with command_client(redis_url.replace("//", "//deaf:pw@"), connections=1) as client:
            subscriptions = Subscriptions(client)
            for channel in ("c1", "c2"):
                ear = Ear()
                subscriptions.subscribe(channel, ear)

                async def refused(ear: Ear = ear) -> bool:
                    return ear.times_refused == 1

                await eventually(refused)
            await subscriptions.aclose()
    finally:
        await redis.acl_deluser("deaf")


async def test_closing_while_it_connects_leaves_nothing(redis_proxy: Proxy) -> None:
    redis_proxy.half_open()
    async with command_client(redis_proxy.redis_url, connections=1) as redis:
        subscriptions = Subscriptions(redis)
        subscriptions.subscribe("c", Ear())
        for _ in range(5):
            await asyncio.sleep(0)
        await subscriptions.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task(), *redis_proxy._connections}

"""When a client may be used: until it is closed, in the event loop and the process that are its own."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from conftest import eventually
from proxy import Proxy
from redis.asyncio import Redis

from worker import Client, Misused, Unavailable

ASK: dict[str, Any] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}]}

Call = Callable[[Client], Coroutine[Any, Any, object]]


async def follow(client: Client) -> list[object]:
    return [entry async for entry in client.follow("r")]


CALLS: dict[str, Call] = {
    "ping": lambda client: client.ping(),
    "enqueue": lambda client: client.enqueue(ASK, id="r"),
    "follow": follow,
    "pour": lambda client: client.pour("r", lambda _: None),
    "result": lambda client: client.result("r"),
    "status": lambda client: client.status("r"),
    "cancel": lambda client: client.cancel("r"),
}


async def connections(redis: Redis) -> int:
    return len(await redis.client_list())


async def gone(redis: Redis, before: int) -> None:
    """Wait until there are no more connections than before."""

    async def as_before() -> bool:
        return await connections(redis) <= before

    await eventually(as_before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_b6_a_closed_client_says_so_and_does_not_connect_again(call: Call, redis: Redis, redis_url: str) -> None:
    before = await connections(redis)
    client = Client(redis_url)
    await client.enqueue(ASK, id="r")
    following = asyncio.create_task(client.result("r"))
    await asyncio.wait({following}, timeout=0.05)
    await client.aclose()
    await client.aclose()
    with pytest.raises(Unavailable, match="the client is closed"):
        await following
    with pytest.raises(Unavailable, match="the client is closed"):
        await call(client)
    await gone(redis, before)


@pytest.mark.parametrize("name", ["enqueue", "status", "cancel"])
async def test_b6_who_waits_for_an_answer_while_the_client_is_closed_gets_one(
    name: str, redis: Redis, redis_proxy: Proxy, client: Client
) -> None:
    if name != "enqueue":
        await client.enqueue(ASK, id="r")
    before = await connections(redis)
    closing = Client(redis_proxy.redis_url)
    held = redis_proxy.hold(rb"XREVRANGE" if name == "status" else rb"XADD")
    asking = asyncio.create_task(CALLS[name](closing))
    await held.met.wait()
    await closing.aclose()
    with pytest.raises(Unavailable, match="the client is closed"):
        await asking
    held.release()
    await gone(redis, before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_c5_a_client_belongs_to_one_event_loop(call: Call, redis_url: str) -> None:
    async def first() -> Client:
        client = Client(redis_url)
        await client.enqueue(ASK, id="r")
        return client

    with asyncio.Runner() as one, asyncio.Runner() as other:
        client = one.run(first())
        with pytest.raises(Misused, match="this Client belongs to another event loop"):
            other.run(call(client))
        with pytest.raises(Misused):
            other.run(client.aclose())
        one.run(client.aclose())

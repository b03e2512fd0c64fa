"""When a client may be used: until it is closed, in its own event loop and its own process."""

import asyncio
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from command import environment
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker import Client, InvalidArgument, Misused, SyncClient, Unavailable

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
async def test_a_closed_client_raises_unavailable_and_does_not_connect_again(
    call: Call, redis: Redis, redis_url: str
) -> None:
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
async def test_a_call_that_waits_while_the_client_is_closed_raises_unavailable(
    name: str, redis: Redis, redis_proxy: Proxy, client: Client
) -> None:
    if name != "enqueue":
        await client.enqueue(ASK, id="r")
    before = await connections(redis)
    closing = Client(redis_proxy.redis_url)
    held = redis_proxy.hold(rb"XREVRANGE" if name == "status" else rb"EVALSHA")
    calling = asyncio.create_task(CALLS[name](closing))
    await held.met.wait()
    await closing.aclose()
    with pytest.raises(Unavailable, match="the client is closed"):
        await calling
    held.release()
    await gone(redis, before)


async def read_lifecycle(client: Client) -> list[object]:
    return [record async for record in client.lifecycle()]


@pytest.mark.parametrize("call", [*CALLS.values(), read_lifecycle], ids=[*CALLS, "lifecycle"])
async def test_a_client_that_is_closed_while_a_call_connects_leaves_no_connection(
    call: Call, redis: Redis, redis_url: str
) -> None:
    before = await connections(redis)
    for steps in range(1, 12):
        client = Client(redis_url)
        calling = asyncio.create_task(call(client))
        for _ in range(steps):
            await asyncio.sleep(0)
        await client.aclose()
        await asyncio.gather(calling, return_exceptions=True)
        await gone(redis, before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_client_belongs_to_one_event_loop(call: Call, redis_url: str) -> None:
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


SYNC_CALLS: dict[str, Callable[[SyncClient], object]] = {
    "enqueue": lambda client: client.enqueue(ASK, id="r"),
    "follow": lambda client: list(client.follow("r")),
    "generate": lambda client: list(client.generate(ASK, id="r")),
    "result": lambda client: client.result("r"),
    "status": lambda client: client.status("r"),
    "cancel": lambda client: client.cancel("r"),
}


def test_an_invalid_url_leaves_no_thread() -> None:
    before = threading.enumerate()
    with pytest.raises(InvalidArgument):
        SyncClient("nonsense://x")
    assert threading.enumerate() == before


@pytest.mark.parametrize("call", SYNC_CALLS.values(), ids=SYNC_CALLS)
def test_a_closed_blocking_client_raises_unavailable(call: Callable[[SyncClient], object], redis_url: str) -> None:
    before = threading.enumerate()
    client = SyncClient(redis_url)
    client.enqueue(ASK, id="r")
    client.close()
    client.close()
    assert threading.enumerate() == before
    with pytest.raises(Unavailable, match="the client is closed"):
        call(client)


@pytest.mark.parametrize("name", ["follow", "result"])
def test_a_call_in_another_thread_raises_unavailable_when_the_blocking_client_is_closed(
    name: str, redis_url: str
) -> None:
    client = SyncClient(redis_url)
    client.enqueue(ASK, id="r")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(SYNC_CALLS[name], client)
        wait([waiting], timeout=0.1)
        client.close()
        with pytest.raises(Unavailable, match="the client is closed"):
            waiting.result(timeout=60)


def test_a_generator_that_was_not_finished_does_not_hinder_closing(redis_url: str) -> None:
    client = SyncClient(redis_url)
    client.enqueue(ASK, id="r")
    entries = client.follow("r")
    assert next(entries).type == "queued"
    client.close()
    del entries


PROGRAM = """
import os
from worker import ClientError, Misused, SyncClient
client = SyncClient({url!r})
print(client.status("r").state.value, flush=True)
"""

FORK = """
child = os.fork()
if child == 0:
    with client:
        try:
            client.status("r")
        except Misused as error:
            print(error, flush=True)
else:
    assert os.waitpid(child, 0)[1] == 0
    print(client.status("r").state.value, flush=True)
    client.close()
"""


@pytest.mark.parametrize(
    ("more", "printed"),
    [
        ("", "unknown\n"),
        (
            FORK,
            (
                "unknown\n"
                "this SyncClient was created before a fork, by another process: create one in each process\n"
                "unknown\n"
            ),
        ),
    ],
    ids=["b3 it is not closed", "d13 it is used after a fork"],
)
async def test_an_interpreter_ends_with_a_blocking_client_in_any_state(more: str, printed: str, redis_url: str) -> None:
    program = PROGRAM.format(url=redis_url) + more
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, env=environment(), stdout=PIPE)
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert (process.returncode, out.decode()) == (0, printed)

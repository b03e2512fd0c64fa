"""Who left: a plain call of OpenAI's API ends with its client, unless somebody else follows it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from conftest import StartSimulator
from gateway_fixtures import Served, StartGateway
from raw_posts import RawPost
from redis.asyncio import Redis
from serving import EventReader
from waits import eventually

from worker import Client, State
from worker.contract.keys import Keys
from worker.sandbox.simulator.server import Options, Scenario, Simulator

BODY: dict[str, Any] = {"model": "reciter", "messages": [{"role": "user", "content": "Go on"}], "stream": True}
EITHER_WAY = pytest.mark.parametrize("body", [BODY, BODY | {"stream": False}], ids=["stream", "whole"])
SLOW = Options(scenario=Scenario(rate=10, tokens=2_000))


@pytest.fixture
async def simulator(start_simulator: StartSimulator) -> Simulator:
    """It answers for longer than a test takes."""
    return await start_simulator(SLOW)


@pytest.fixture
async def hasty(start_gateway: StartGateway) -> Served:
    """A gateway that soon cancels what nobody follows."""
    return await start_gateway(leave_after=0.3)


@pytest.fixture(autouse=True)
async def _no_answer_left(redis: Redis, client: Client) -> AsyncIterator[None]:
    """Cancel what goes on, so that the worker can stop."""
    yield
    for request_id in await requests(redis):
        await client.cancel(request_id)


async def asked(simulator: Simulator) -> None:
    """Wait until the simulator answers, and the gateway knows the request."""

    async def is_running() -> bool:
        return bool(simulator.served) and simulator.served[-1].chunks > 1

    await eventually(is_running)


async def requests(redis: Redis) -> list[str]:
    """The ids of all requests."""
    keys = cast("list[bytes]", await redis.keys("chat:tokens:*"))
    return [key.decode().partition("{")[2].rstrip("}") for key in keys]


async def request_of(redis: Redis) -> str:
    """The id of the only request."""
    (request_id,) = await requests(redis)
    return request_id


async def wait_followed(redis: Redis, request_id: str, count: int) -> None:
    async def is_followed() -> bool:
        ((_, found),) = await redis.pubsub_numsub(Keys().feed(request_id))
        return int(found) == count

    await eventually(is_followed)


async def wait_outcome(client: Client, request_id: str) -> str:
    async def has_ended() -> bool:
        return (await client.status(request_id)).state is State.ENDED

    await eventually(has_ended)
    return (await client.status(request_id)).outcome


@EITHER_WAY
@pytest.mark.usefixtures("worker")
async def test_an_answer_is_cancelled_soon_after_its_client_has_left(
    body: dict[str, Any], hasty: Served, redis: Redis, client: Client, simulator: Simulator
) -> None:
    post = await RawPost.send(hasty.port, body)
    await asked(simulator)
    request_id = await request_of(redis)
    post.close()
    assert await wait_outcome(client, request_id) == "cancelled"


async def test_a_job_that_waits_is_cancelled_too(hasty: Served, redis: Redis, client: Client) -> None:
    post = await RawPost.send(hasty.port, BODY)
    assert await post.read_head() == 200
    post.close()
    assert await wait_outcome(client, await request_of(redis)) == "cancelled"


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        ({"idempotency_key": "k"}, ""),
        ({"relay_on_disconnect": "continue"}, ""),
        ({"idempotency_key": "k", "relay_on_disconnect": "cancel"}, "cancelled"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("worker")
async def test_a_key_or_a_header_decides_whether_an_answer_goes_on(
    headers: dict[str, Any], outcome: str, hasty: Served, client: Client, simulator: Simulator
) -> None:
    post = await RawPost.send(hasty.port, BODY, **headers)
    assert await post.read_head() == 200
    await asked(simulator)
    post.close()
    if outcome:
        assert await wait_outcome(client, post.request_id) == outcome
        return
    # A request that is cancelled after the same time has ended: the other one has not.
    other = await RawPost.send(hasty.port, BODY)
    assert await other.read_head() == 200
    other.close()
    assert await wait_outcome(client, other.request_id) == "cancelled"
    assert (await client.status(post.request_id)).state is State.RUNNING


@pytest.mark.parametrize("headers", [{}, {"relay_on_disconnect": "cancel"}], ids=["plain", "header"])
@pytest.mark.usefixtures("worker")
async def test_a_native_request_goes_on_after_its_reader_has_left(
    headers: dict[str, Any], hasty: Served, redis: Redis, client: Client, simulator: Simulator
) -> None:
    """Whatever the header says, which is for chat completions."""
    native = await RawPost.send(hasty.port, BODY, path="/requests", **headers)
    assert await native.read_head() == 202
    native.close()
    reader = await EventReader.open(hasty.port, f"/requests/{native.request_id}/events")
    await wait_followed(redis, native.request_id, 1)
    await asked(simulator)
    reader.close()
    await wait_followed(redis, native.request_id, 0)
    # A chat completion that is left later is cancelled after the same time: the native request is not.
    chat = await RawPost.send(hasty.port, BODY)
    assert await chat.read_head() == 200
    chat.close()
    assert await wait_outcome(client, chat.request_id) == "cancelled"
    assert (await client.status(native.request_id)).state is State.RUNNING


@pytest.mark.usefixtures("worker")
async def test_an_answer_that_another_replica_follows_goes_on_until_that_one_leaves(
    hasty: Served, redis: Redis, client: Client, simulator: Simulator
) -> None:
    post = await RawPost.send(hasty.port, BODY)
    assert await post.read_head() == 200
    await asked(simulator)
    other = asyncio.create_task(_follow_for_ever(client, post.request_id))
    await wait_followed(redis, post.request_id, 2)
    post.close()
    await wait_followed(redis, post.request_id, 1)
    short_lived = await RawPost.send(hasty.port, BODY)
    assert await short_lived.read_head() == 200
    short_lived.close()
    assert await wait_outcome(client, short_lived.request_id) == "cancelled"
    assert (await client.status(post.request_id)).state is State.RUNNING
    other.cancel()
    await asyncio.wait([other])
    assert await wait_outcome(client, post.request_id) == "cancelled"


async def _follow_for_ever(client: Client, request_id: str) -> None:
    async for _ in client.follow(request_id):
        pass


@pytest.mark.usefixtures("worker")
async def test_an_answer_to_which_a_retry_attaches_in_time_goes_on(
    start_gateway: StartGateway, redis: Redis, client: Client, simulator: Simulator
) -> None:
    gateway = await start_gateway(leave_after=3.0)
    attached: list[RawPost] = []

    async def is_in_time() -> bool:  # a busy machine takes longer than three seconds
        first = await RawPost.send(gateway.port, BODY)
        assert await first.read_head() == 200
        await asked(simulator)
        first.reset()
        await wait_followed(redis, first.request_id, 0)
        retry = await RawPost.send(gateway.port, BODY, x_stainless_retry_count="1")
        assert await retry.read_head() == 200
        if retry.request_id == first.request_id:
            attached.append(retry)
        else:
            assert await wait_outcome(client, first.request_id) == "cancelled"
            retry.close()
        return bool(attached)

    await eventually(is_in_time)
    (retry,) = attached
    # The request that left last is the last to be cancelled.
    other = await RawPost.send(gateway.port, BODY)
    assert await other.read_head() == 200
    other.close()
    assert await wait_outcome(client, other.request_id) == "cancelled"
    assert (await client.status(retry.request_id)).state is State.RUNNING
    retry.close()


@EITHER_WAY
@pytest.mark.usefixtures("worker")
async def test_a_gateway_that_stops_cancels_nothing(
    body: dict[str, Any], start_gateway: StartGateway, redis: Redis, client: Client, simulator: Simulator
) -> None:
    """Neither what it streams, nor what a client has left shortly before."""
    gateway = await start_gateway(leave_after=0.2, drain_timeout=0)
    left = await RawPost.send(gateway.port, body)
    await asked(simulator)
    first = await request_of(redis)
    open_ = await RawPost.send(gateway.port, body | {"seed": 1})

    async def both_are_known() -> bool:
        return len(await requests(redis)) == 2

    await eventually(both_are_known)
    left.close()
    gateway.gateway.stop()

    async def has_ended() -> bool:
        return not len(gateway.gateway.services.streams)

    await eventually(has_ended)
    other = await start_gateway(leave_after=0.3)
    post = await RawPost.send(other.port, BODY | {"seed": 2})
    assert await post.read_head() == 200
    post.close()
    assert await wait_outcome(client, post.request_id) == "cancelled"
    for request_id in await requests(redis):
        if request_id != post.request_id:
            assert (await client.status(request_id)).state is State.RUNNING
    assert (await client.status(first)).state is State.RUNNING
    open_.close()

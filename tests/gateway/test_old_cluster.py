"""A cluster of Redis 6.2, which cannot count followers: what the gateway promises there, and no more."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import topology
from conftest import StartSimulator, StartWorker
from gateway_fixtures import Served, StartGateway
from raw_posts import RawPost
from redis.asyncio import Redis
from redis.exceptions import RedisError
from waits import eventually

from worker import Client, State
from worker.contract.keys import Keys
from worker.gateway.repeats import Presence
from worker.redisio.batching import CommandBatcher
from worker.redisio.clients import command_client
from worker.sandbox.embedded_redis import find_servers, version_of

BODY: dict[str, Any] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}], "stream": True}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[topology.Node]]:
    """Three masters of Redis 6.2."""
    old = [server for server in find_servers() if version_of(server).startswith("6.")]
    if not old:
        pytest.skip("no redis-server 6.2 at hand")
    with topology.cluster(Path(old[0]), tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def cluster_url(nodes: list[topology.Node]) -> str:
    for node in nodes:
        node.client.flushall()
    return f"redis+cluster://127.0.0.1:{nodes[0].port}"


@pytest.fixture
async def redis(cluster_url: str) -> AsyncIterator[Redis]:
    async with command_client(cluster_url) as client:
        yield client


@pytest.fixture
async def gateway(cluster_url: str, start_gateway: StartGateway) -> Served:
    return await start_gateway(redis_url=cluster_url, leave_after=0.1)


StartPost = Callable[..., Awaitable[RawPost]]


@pytest.fixture
async def post(gateway: Served) -> AsyncIterator[StartPost]:
    """Begins chat completions. Keyword arguments are headers."""
    started: list[RawPost] = []

    async def start(**headers: Any) -> RawPost:  # noqa: ANN401 - of a request
        started.append(await RawPost.send(gateway.port, BODY, **headers))
        assert await started[-1].read_head() == 200
        return started[-1]

    yield start
    for one in started:
        one.close()


async def test_answers_arrive(
    post: StartPost, cluster_url: str, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    await start_worker(await start_simulator(), redis_url=cluster_url)
    events = await (await post()).read_events()
    assert len(events) > 10
    assert not [event for event in events if '"error"' in event]


async def test_only_a_key_attaches(post: StartPost, redis: Redis) -> None:
    """The retry of an SDK without one is a second job."""
    first = await post()
    first.reset()
    retry = await post(x_stainless_retry_count="1")
    assert retry.request_id != first.request_id
    assert await redis.xlen("chat:jobs") == 2
    keyed = [await post(idempotency_key="k") for _ in range(2)]
    assert keyed[0].request_id == keyed[1].request_id


async def test_who_left_is_not_cancelled(post: StartPost, cluster_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    original = Presence.is_followed

    async def is_followed(self: Presence, request_id: str) -> bool:
        try:
            return await original(self, request_id)
        except RedisError:
            refused.append(request_id)
            raise

    monkeypatch.setattr(Presence, "is_followed", is_followed)
    left = await post()
    left.close()

    async def is_considered() -> bool:
        return left.request_id in refused

    await eventually(is_considered)
    async with Client(cluster_url) as client:
        assert (await client.status(left.request_id)).state is State.QUEUED
        await client.cancel(left.request_id)


async def test_followers_cannot_be_counted(redis: Redis) -> None:
    async with aclosing(CommandBatcher(redis)) as commands:
        with pytest.raises(RedisError):
            await Presence(commands, Keys()).is_followed("r")

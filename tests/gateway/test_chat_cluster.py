"""Repetitions, leaving and places in the queue on a Redis cluster, where the feed has sharded channels."""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
import topology
from gateway_fixtures import StartGateway
from raw_posts import RawPost
from redis.asyncio import Redis
from redis.exceptions import RedisError
from waits import eventually

from worker import Client, State
from worker.contract.keys import Keys
from worker.gateway.queue_positions import QueuePositions
from worker.gateway.repeats import Presence
from worker.redisio.batching import CommandBatcher
from worker.redisio.clients import command_client

BODY: dict[str, Any] = {"model": "reciter", "messages": [{"role": "user", "content": "Who are you?"}], "stream": True}


@pytest.fixture(scope="module")
def nodes(redis_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[topology.Node]]:
    """Three masters."""
    with topology.cluster(redis_binary, tmp_path_factory.mktemp("cluster")) as nodes:
        if nodes[0].client.info("server")["redis_version"].startswith("6."):
            pytest.skip("a cluster before Redis 7 has no sharded channels, so it does not count followers")
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


async def test_a_repetition_attaches_and_who_left_is_cancelled(
    cluster_url: str, redis: Redis, start_gateway: StartGateway
) -> None:
    lasting, hasty = [await start_gateway(redis_url=cluster_url, leave_after=after) for after in (600, 0.3)]
    commands = CommandBatcher(redis)
    presence = Presence(commands, Keys())
    async with Client(cluster_url) as client, aclosing(commands):
        first = await RawPost.send(lasting.port, BODY)
        assert await first.read_head() == 200
        second = await RawPost.send(hasty.port, BODY)
        assert await second.read_head() == 200
        assert second.request_id != first.request_id

        async def are_followed() -> bool:
            with suppress(RedisError):  # on a busy machine, to connect takes longer than it may
                return await presence.followed([first.request_id, second.request_id]) == {
                    first.request_id: True, second.request_id: True,
                }  # fmt: skip
            return False

        await eventually(are_followed)
        assert await QueuePositions(redis, Keys()).position(second.request_id) in {0, 1}
        first.reset()

        async def is_left() -> bool:
            return not await presence.is_followed(first.request_id)

        await eventually(is_left)
        retry = await RawPost.send(hasty.port, BODY, x_stainless_retry_count="1")
        assert await retry.read_head() == 200
        assert retry.request_id == first.request_id
        assert await redis.xlen("chat:jobs") == 2
        retry.close()
        second.close()

        async def are_cancelled() -> bool:
            found = [await client.status(request_id) for request_id in (first.request_id, second.request_id)]
            return all(status.state is State.ENDED and status.outcome == "cancelled" for status in found)

        await eventually(are_cancelled)

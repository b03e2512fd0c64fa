"""How many replicas KEDA would ask for with the shipped ScaledObjects, by its documented rules on a real Redis.

Of a trigger with `lagCount` KEDA reads the group's lag (XINFO GROUPS), and of one with `pendingEntriesCount` the number
of its pending entries (XPENDING). A missing group is an error. The autoscaler divides each by the trigger's number,
rounds up, takes the largest, and stays between the two limits.
"""

import math

import pytest
from conftest import stream
from manifests import resource
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from worker import Client
from worker.broker.consumers import WAITING

CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "Who are you?"}]}


async def replicas(redis: Redis, name: str) -> int:
    """The number of replicas that KEDA asks for.

    Raises:
        ResponseError: when a trigger cannot be read, so that KEDA does not scale.
    """
    spec = resource("ScaledObject", name)["spec"]
    wanted = [await _wanted(redis, trigger["metadata"]) for trigger in spec["triggers"]]
    return int(min(max(*wanted, spec["minReplicaCount"]), spec["maxReplicaCount"]))


async def _wanted(redis: Redis, trigger: dict[str, str]) -> int:
    jobs, group = trigger["stream"], trigger["consumerGroup"]
    if "lagCount" in trigger:
        assert "activationLagCount" in trigger, "KEDA requires it beside lagCount"
        (found,) = [each for each in await redis.xinfo_groups(jobs) if each["name"].decode() == group]
        return math.ceil(int(found["lag"]) / int(trigger["lagCount"]))
    pending = int((await redis.xpending(jobs, group))["pending"])
    return math.ceil(pending / int(trigger["pendingEntriesCount"]))


@pytest.fixture
async def scaled(redis: Redis) -> Redis:
    if int((await redis.info("server"))["redis_version"].split(".")[0]) < 7:
        pytest.skip("Redis before 7.0 does not report the lag of a group")
    return redis


async def test_the_first_job_of_a_fresh_installation_can_be_scaled_on(scaled: Redis, client: Client) -> None:
    with pytest.raises(ResponseError):
        await replicas(scaled, "vllm-relay-worker")
    await client.enqueue(CHAT)
    assert await replicas(scaled, "vllm-relay-worker") == 2
    assert await replicas(scaled, "vllm") == 1


async def test_unread_jobs_ask_for_more_workers_and_servers(scaled: Redis, client: Client) -> None:
    for _ in range(130):
        await client.enqueue(CHAT)
    assert await replicas(scaled, "vllm-relay-worker") == 3
    assert await replicas(scaled, "vllm") == 2


@pytest.mark.parametrize("consumer", ["worker", f"{WAITING}-:model"], ids=["running", "parked"])
async def test_jobs_that_run_or_are_parked_ask_for_as_many_until_they_are_done(
    consumer: str, scaled: Redis, client: Client
) -> None:
    for _ in range(300):
        await client.enqueue(CHAT)
    assert await replicas(scaled, "vllm-relay-worker") == 6
    await scaled.xreadgroup("workers", consumer, {"chat:jobs": ">"}, count=1000)
    assert await replicas(scaled, "vllm-relay-worker") == 3
    assert await replicas(scaled, "vllm") == 3
    await scaled.xack("chat:jobs", "workers", *[job for job, _ in await stream(scaled, "chat:jobs")])
    assert await replicas(scaled, "vllm-relay-worker") == 2
    assert await replicas(scaled, "vllm") == 1


async def test_the_number_stays_within_its_limits(scaled: Redis) -> None:
    await scaled.xgroup_create("chat:jobs", "workers", id="0", mkstream=True)
    assert await replicas(scaled, "vllm-relay-worker") == 2
    pipe = scaled.pipeline(transaction=False)
    for number in range(5000):
        pipe.xadd("chat:jobs", {"id": str(number)})
    await pipe.execute()
    assert await replicas(scaled, "vllm-relay-worker") == 20
    assert await replicas(scaled, "vllm") == 8

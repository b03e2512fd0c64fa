"""Connections that Redis refuses: the pause has the reason, and the worker continues once an operator has fixed it."""

from collections.abc import AsyncIterator

import pytest
from conftest import StartWorker, metric
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.engine.application import Worker
from worker.engine.intake import REDIS_AWAY, REDIS_LOGIN, REDIS_REFUSES
from worker.sandbox.simulator.server import Simulator

USER = "refused"


async def set_password(redis: Redis, password: str) -> None:
    """Change the password of the worker's user, and close its connections."""
    await redis.acl_setuser(
        USER, enabled=True, reset_passwords=True, passwords=f"+{password}", categories=["+@all"],
        keys=["*"], channels=["*"],
    )  # fmt: skip
    await close_connections(redis)


async def close_connections(redis: Redis) -> None:
    for kind in ("normal", "pubsub"):
        await redis.client_kill_filter(_type=kind, user=USER, skipme=True)


@pytest.fixture
async def user_url(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    await set_password(redis, "right")
    yield redis_url.replace("//", f"//{USER}:right@")
    await redis.acl_deluser(USER)


async def paused(worker: Worker, reason: str) -> None:
    async def is_paused() -> bool:
        return metric(worker, "claims_paused", reason=reason) == 1

    await eventually(is_paused)


async def takes_jobs_and_hints(worker: Worker, redis: Redis, client: Client) -> None:
    answer = await client.result(await client.enqueue({"messages": [{"role": "user", "content": "Who are you?"}]}))
    assert answer.outcome == "done"

    async def hears() -> bool:
        return (await redis.pubsub_numsub("chat:cancel"))[0][1] == 1

    await eventually(hears)
    assert not any(metric(worker, "claims_paused", reason=reason) for reason in (REDIS_LOGIN, REDIS_REFUSES))


async def test_a_password_that_was_changed_is_a_reason_of_its_own_until_it_is_restored(
    client: Client, redis: Redis, user_url: str, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, redis_url=user_url)
    await takes_jobs_and_hints(worker, redis, client)
    await set_password(redis, "changed")
    await paused(worker, REDIS_LOGIN)
    assert metric(worker, "claims_paused", reason=REDIS_AWAY) == 0
    await set_password(redis, "right")
    await takes_jobs_and_hints(worker, redis, client)


async def test_at_maxclients_redis_refuses_and_is_not_away(
    client: Client, redis: Redis, user_url: str, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, redis_url=user_url)
    await takes_jobs_and_hints(worker, redis, client)
    before = str((await redis.config_get("maxclients"))["maxclients"])
    await redis.config_set("maxclients", 1)
    try:
        await close_connections(redis)
        await paused(worker, REDIS_REFUSES)
    finally:
        await redis.config_set("maxclients", before)
    await takes_jobs_and_hints(worker, redis, client)


async def test_a_right_that_was_taken_back_is_a_pause_until_it_is_granted_again(
    client: Client, redis: Redis, user_url: str, start_worker: StartWorker, simulator: Simulator
) -> None:
    worker = await start_worker(simulator, redis_url=user_url)
    await takes_jobs_and_hints(worker, redis, client)
    await redis.acl_setuser(USER, enabled=True, commands=["-xreadgroup"])
    await paused(worker, REDIS_REFUSES)
    await redis.acl_setuser(USER, enabled=True, commands=["+xreadgroup"])
    await takes_jobs_and_hints(worker, redis, client)

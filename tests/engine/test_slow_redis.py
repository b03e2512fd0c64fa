"""Large jobs on a slow connection to Redis: fewer are read at once, until each arrives within its lease."""

import asyncio

from conftest import StartWorker
from proxy import Proxy

from worker import Client
from worker.sandbox.simulator.server import Simulator


async def test_large_jobs_on_a_slow_connection_are_done(
    redis_proxy: Proxy, client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    """16 of them take longer than a lease to arrive, so other workers would take them over again and again."""
    chat_request = {"messages": [{"role": "user", "content": "Who are you?"}], "user": "x" * 60_000}
    ids = [await client.enqueue(chat_request) for _ in range(48)]
    redis_proxy.down = 0.05  # for each piece of 64 KiB: 1.3 MB a second
    for _ in range(3):
        await start_worker(simulator, redis_url=redis_proxy.redis_url, lease=0.5)
    answers = await asyncio.gather(*map(client.result, ids))
    await redis_proxy.heal()
    assert {answer.outcome for answer in answers} == {"done"}

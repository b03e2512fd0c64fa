"""Large jobs on a slow way to Redis: fewer are read at once, until each comes while its lease lasts."""

import asyncio

from conftest import StartWorker
from proxy import Proxy

from worker import Client
from worker.sandbox.simulator.server import Simulator


async def test_large_jobs_on_a_slow_way_are_done(
    redis_proxy: Proxy, client: Client, start_worker: StartWorker, simulator: Simulator
) -> None:
    """16 of them come in more than a lease, so that each would be taken from whoever reads them, for ever."""
    ask = {"messages": [{"role": "user", "content": "Who are you?"}], "user": "x" * 60_000}
    ids = [await client.enqueue(ask) for _ in range(48)]
    redis_proxy.down = 0.05  # for each piece of 64 KiB: 1.3 MB a second
    for _ in range(3):
        await start_worker(simulator, redis_url=redis_proxy.redis_url, lease=0.5)
    answers = await asyncio.gather(*map(client.result, ids))
    await redis_proxy.heal()
    assert {answer.outcome for answer in answers} == {"done"}

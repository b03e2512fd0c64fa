"""What a request takes of Redis's memory: while it waits, and once it has ended.

.venv/bin/python tests/benchmarks/memory.py --tokens 300 --prompt 2000
"""
# ruff: noqa: E402 - where the project is not installed, the imports below need the changed sys.path

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import click
from redis.asyncio import Redis

from worker import Client
from worker.contract.keys import Keys
from worker.engine.application import Worker
from worker.sandbox.embedded_redis import start_redis
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.settings import Settings, load_settings
from worker.telemetry.logging import configure_logging

_KEYS = Keys()


async def measure(requests: int, tokens: int, prompt: int) -> dict[str, float]:
    """Bytes for each request, by what takes them."""
    with start_redis() as server:
        async with (
            Redis.from_url(server.url, protocol=2) as redis,
            Client(server.url) as client,
            Simulator(Options(scenario=Scenario(tokens=tokens), max_model_len=2**20)) as simulator,
        ):
            body = {"model": "reciter", "messages": [{"role": "user", "content": "x" * prompt}]}
            settings = load_settings(redis_url=server.url, vllm_urls=simulator.url)

            async def used() -> int:
                await redis.memory_purge()
                return int((await redis.info("memory"))["used_memory"])

            async def size_of(keys: Callable[[str], str]) -> float:
                sizes = [await redis.memory_usage(keys(request_id), samples=0) or 0 for request_id in ids]
                return sum(sizes) / len(sizes)

            await _answer(settings, client, [await client.enqueue(body)])  # tables and buffers exist
            before = await used()
            ids = [await client.enqueue(body) for _ in range(requests)]
            waiting = (await used() - before) / requests
            await _answer(settings, client, ids)
            lifecycle = await redis.memory_usage(_KEYS.lifecycle, samples=0) or 0
            return {
                "waits: job and log": waiting,
                "has ended: log": await size_of(_KEYS.tokens),
                "has ended: tombstone": await size_of(_KEYS.ended),
                "has ended: two entries of the lifecycle": lifecycle / (requests + 1),
                "has ended: all, by used_memory": (await used() - before) / requests,
            }


async def _answer(settings: Settings, client: Client, ids: list[str]) -> None:
    """Run a worker until these requests have ended."""
    worker = Worker(settings)
    running = asyncio.create_task(worker.run())
    for request_id in ids:
        await client.result(request_id)
    worker.stop()
    await running


@click.command()
@click.option("--requests", default=500, show_default=True)
@click.option("--tokens", default=300, show_default=True, help="Of each answer.")
@click.option("--prompt", default=2000, show_default=True, help="Characters of each prompt.")
def main(requests: int, tokens: int, prompt: int) -> None:
    """Measure what requests take of Redis's memory."""
    configure_logging("json", "error")
    for name, size in asyncio.run(measure(requests, tokens, prompt)).items():
        click.echo(f"{name:42}{size:10,.0f} bytes a request")


if __name__ == "__main__":
    main()

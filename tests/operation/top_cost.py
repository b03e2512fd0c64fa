"""Measures what `worker top` costs Redis.

    .venv/bin/python tests/operation/top_cost.py

The CPU time that Redis spends on a picture is compared with the time for the tokens that the same requests write
between two pictures. These are plain XADDs in long pipelines: a worker's tokens cost more.
"""
# ruff: noqa: E402, T201 - the imports below need the changed sys.path

import argparse
import asyncio
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from pending_jobs import pend, record
from redis.asyncio import Redis

from worker.contract.keys import GROUP
from worker.sandbox.embedded_redis import find_servers, start_redis
from worker.top.installation import Installation

_PICTURES = 10
_TOKENS = 60
"""The tokens of a request between two pictures: 30 a second."""


async def measure(url: str, requests: int) -> None:
    """Take pictures of running requests, while others start and end as well."""
    async with Redis.from_url(url, protocol=2) as redis, Installation(url, "chat", lease=15) as installation:

        async def spent() -> float:
            cpu = await redis.info("cpu")
            return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])

        await redis.xgroup_create("chat:jobs", GROUP, mkstream=True)
        running = [await pend(redis, f"pod-{number % 20}") for number in range(requests)]
        pictures, tokens, listed = list[float](), list[float](), 0
        for number in range(_PICTURES):
            pipe = redis.pipeline(transaction=False)
            for n in range(_TOKENS):
                for request_id in running:
                    pipe.xadd(
                        f"chat:tokens:{{{request_id}}}", {"type": "delta", "content": " word"}, f"{number + 1}-{n}"
                    )
            begun = await spent()
            await pipe.execute()
            tokens.append(await spent() - begun)
            for other in range(200):  # started and ended since the picture before
                await record(redis, ("started", "finished")[other % 2], f"other-{number}-{other}", f"{number}-{other}")
            running[number] = await pend(redis, "pod-0")
            begun = await spent()
            picture = await installation.read()
            pictures.append(await spent() - begun)
            listed = sum(bool(request.request_id) for request in picture.running.requests)
    picture_ms, tokens_ms = statistics.median(pictures) * 1000, statistics.median(tokens) * 1000
    print(f"running requests listed: {listed}")
    print(f"Redis: {picture_ms:.1f} ms a picture, {tokens_ms:.0f} ms for the tokens: {picture_ms / tokens_ms:.0%}")


def main() -> None:
    """Run the measurement on a Redis of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=990, help="running requests; a picture has at most 1,000")
    arguments = parser.parse_args()
    with start_redis(find_servers()[0]) as redis:
        asyncio.run(measure(redis.url, arguments.requests))


if __name__ == "__main__":
    main()

"""The worker that a good tutorial would give: httpx line by line, `json.loads`, one awaited `xadd` for each delta.

    straightforward.py <URL of vLLM> <URL of Redis>

It has what a competent first version has: uvloop, hiredis, pools that are large enough, a consumer group, and an
acknowledgement after the end. It has no leases, no ids of its own and nothing for what goes wrong, and keeps no token
ids: all of which would only make it slower.
"""

import asyncio
import json
import sys
from typing import TypeAlias, cast

import httpx
import uvloop
from redis.asyncio import Redis

_Read: TypeAlias = list[tuple[bytes, list[tuple[str, dict[bytes, bytes]]]]]
_MANY = 10_000


async def relay(client: httpx.AsyncClient, redis: Redis, url: str, job: str, fields: dict[bytes, bytes]) -> None:
    """Have one job answered into its log."""
    key = f"chat:tokens:{{{fields[b'id'].decode()}}}"
    body = {**json.loads(fields[b"request"]), "stream": True}
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line[6:])["choices"]:
                if text := choice["delta"].get("content"):
                    await redis.xadd(key, {"type": "delta", "content": text})
    await redis.xadd(key, {"type": "done"})
    await redis.xack("chat:jobs", "workers", job)


async def serve(vllm_url: str, redis_url: str) -> None:
    """Take jobs, each in a task of its own."""
    redis = Redis.from_url(redis_url, max_connections=_MANY, socket_timeout=None, protocol=2)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:  # noqa: S113 - as long as it runs
        await redis.xgroup_create("chat:jobs", "workers", "0", mkstream=True)
        async with asyncio.TaskGroup() as group:
            while True:
                read = await redis.xreadgroup("workers", "one", {"chat:jobs": ">"}, count=100, block=1000)
                for _, jobs in cast("_Read", read):
                    for job, fields in jobs:
                        group.create_task(relay(client, redis, vllm_url, job, fields))


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:]))

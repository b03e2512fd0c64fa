"""A client of any version of the package: it adds the requests that come on standard input, and prints their answers.

It uses only what every version has. Lines in: `[id, request]`. Lines out: `[id, null]` once the request is added, and
`[id, [outcome, texts of the choices]]` once it has ended.
"""
# ruff: noqa: T201 - it prints for its parent

import asyncio
import json
import sys

from worker import Client


async def serve(redis_url: str) -> None:
    """Serve until standard input ends."""
    running = set()
    async with Client(redis_url, patience=60) as client:

        async def one(request_id: str, request: dict[str, object]) -> None:
            await client.enqueue(request, id=request_id)
            print(json.dumps([request_id, None]), flush=True)
            answer = await client.result(request_id)
            outcome = answer.outcome
            print(json.dumps([request_id, [outcome, [choice.content for choice in answer.choices]]]), flush=True)

        while line := await asyncio.to_thread(sys.stdin.readline):
            running.add(asyncio.create_task(one(*json.loads(line))))
        await asyncio.gather(*running)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))

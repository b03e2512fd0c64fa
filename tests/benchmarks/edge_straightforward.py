"""The server of events that most people write first: Starlette's StreamingResponse over one XREAD for each follower.

    edge_straightforward.py <port of Redis>

It prints its port, and ends with its standard input.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import TypeAlias, cast

import uvicorn
import uvloop
from measure import many_files
from reader import key_of
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

_Entries: TypeAlias = list[tuple[str, dict[str, str]]]


def application(redis: Redis) -> Starlette:
    """One route: the entries of a log as server-sent events."""

    async def follow(request_id: str) -> AsyncIterator[str]:
        key, last = key_of(0).replace("r0", request_id), "0"
        while True:
            news = cast("list[tuple[str, _Entries]]", await redis.xread({key: last}, block=15_000))
            for _, entries in news:
                for entry_id, fields in entries:
                    last = entry_id
                    yield f"id: {entry_id}\ndata: [{json.dumps({'id': entry_id, **fields}, separators=(',', ':'))}]\n\n"

    async def events(request: Request) -> StreamingResponse:
        return StreamingResponse(follow(request.path_params["id"]), media_type="text/event-stream")

    return Starlette(routes=[Route("/requests/{id}/events", events)])


async def serve(port: int) -> None:
    """Serve until standard input ends."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    redis = Redis(port=port, decode_responses=True, max_connections=1 << 16, protocol=2)
    config = uvicorn.Config(application(redis), log_level="error", lifespan="off", backlog=4096)
    server = uvicorn.Server(config)
    asyncio.get_running_loop().add_reader(0, lambda: os._exit(0))
    print(listening.getsockname()[1], flush=True)  # noqa: T201 - the process that started this one waits for it
    await server.serve([listening])


if __name__ == "__main__":
    many_files()
    uvloop.run(serve(int(sys.argv[1])))

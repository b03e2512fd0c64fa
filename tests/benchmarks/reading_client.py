"""A process that follows many requests with the library's own `Client`, as a gateway does.

    reading_client.py <board> <port of Redis> <logs> <1 for `Client.pour`, 0 for `Client.follow`>

It notes each delta as reader.py does, and ends with its standard input.
"""

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from board import Board, Count
from chunks import WORDS

from worker import Client
from worker.contract.entries import Delta, Entry


def taker(board: Board, number: int, begun: asyncio.Future[None]) -> Callable[[Entry], None]:
    """Records the entries of one request."""
    seen, times, ring = 0, board.times, board.ring
    first = number * ring

    def take(entry: Entry) -> None:
        nonlocal seen
        if not isinstance(entry, Delta):
            begun.set_result(None)  # `started`
            return
        now = time.monotonic_ns()
        if entry.content != WORDS[seen % len(WORDS)]:
            board.counters[Count.STRAY] += 1
        board.add(now, now - times[first + seen % ring])
        seen += 1

    return take


async def follow(client: Client, request_id: str, take: Callable[[Entry], None]) -> None:
    """Follow one request for as long as it is written."""
    async for entry in client.follow(request_id):
        take(entry)


async def follow_all(board: Board, port: int, logs: int, *, pours: bool) -> None:
    """Follow all of them until standard input ends."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(0, ended.cancel)
    async with Client(f"redis://127.0.0.1:{port}/0") as client:
        begun: list[asyncio.Future[None]] = [asyncio.get_running_loop().create_future() for _ in range(logs)]
        takers = [taker(board, number, each) for number, each in enumerate(begun)]
        way = client.pour if pours else partial(follow, client)
        followers = [asyncio.create_task(way(f"r{number}", take)) for number, take in enumerate(takers)]
        events: set[asyncio.Future[Any]] = {ended, asyncio.gather(*begun), *followers}
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        # The worker does this too, and a gateway would. The objects so far stay, and collecting them again and again
        # would be most of the latency. A library leaves that to the process that it runs in.
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 100, 10)
        await asyncio.wait([ended, *followers], return_when=asyncio.FIRST_COMPLETED)
        for follower in followers:
            if follower.done():
                follower.result()
            follower.cancel()


if __name__ == "__main__":
    port, logs, pours = map(int, sys.argv[2:])
    uvloop.run(follow_all(Board.attach(Path(sys.argv[1])), port, logs, pours=bool(pours)))

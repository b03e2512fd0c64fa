"""The least that a server of the part `edge` can do: a uvloop socket for each follower, and bytes written to it.

    edge_floor.py <logs>

It prints its port. It reads no Redis: it makes up the bytes that the gateway would write, once for each delta, and
writes them to every follower of the log. It reads `pace <deltas/s of all logs>` from standard input, and ends with it.
"""

import asyncio
import gc
import sys
import time
from typing import cast

import uvloop
from measure import many_files

_TICK = 0.0007
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache, no-transform\r\n"
    b"x-accel-buffering: no\r\ntransfer-encoding: chunked\r\n\r\n"
)


class FloorFollower(asyncio.Protocol):
    """A connection. It gets the head of a response, and then what the server writes."""

    def __init__(self, followers: list[list[asyncio.Transport]]) -> None:
        self._followers = followers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        log = int(data.split(b"/requests/r", 1)[1].split(b"/", 1)[0])
        self._transport.write(_HEAD + _framed(0, "started"))
        self._log = self._followers[log]
        self._log.append(self._transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._log.remove(self._transport)


async def serve(logs: int) -> None:
    """Serve until standard input ends."""
    followers: list[list[asyncio.Transport]] = [[] for _ in range(logs)]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: FloorFollower(followers), "127.0.0.1", 0, backlog=4096)
    ended = asyncio.Event()
    rate, began, written, due_before = 0.0, 0, 0, 0
    timer: asyncio.TimerHandle | None = None

    def read() -> None:
        nonlocal rate, began, due_before
        line = sys.stdin.readline()
        if not line:
            loop.remove_reader(0)
            ended.set()
            return
        rate, began, due_before = float(line.split()[1]), time.monotonic_ns(), written
        gc.collect()
        gc.freeze()
        if timer is not None:
            timer.cancel()
        write()
        print("did", flush=True)  # noqa: T201 - the process that started this one waits for it

    def write() -> None:
        nonlocal written, timer
        now = time.monotonic_ns()
        upto = int((now - began) * rate / 1e9) + due_before
        for delta in range(written, upto):
            number, log = divmod(delta, logs)
            frame = _framed(number + 1, f"{now:020d}")
            for transport in followers[log]:
                transport.write(frame)
        written = max(upto, written)
        timer = loop.call_later(_TICK, write) if rate else None

    loop.add_reader(0, read)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - the process that started this one waits for it
    await ended.wait()


def _framed(number: int, content: str) -> bytes:
    event = f'id: 1-{number}\ndata: [{{"type":"delta","id":"1-{number}","content":"{content}"}}]\n\n'.encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


if __name__ == "__main__":
    many_files()
    uvloop.run(serve(int(sys.argv[1])))

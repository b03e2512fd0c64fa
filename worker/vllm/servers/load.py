"""Reads the load of vLLM servers from their /metrics: how many requests run there, and how many wait.

All workers read the same figures, so each of them learns how full a server is. Facts of vLLM 0.32.0: the page has 56 KB
for one model and one engine, and grows with both. It has a series for each engine and model:

    vllm:num_requests_running{engine="0",model_name="reciter"} 4.0
    vllm:num_requests_waiting{engine="0",model_name="reciter"} 0.0
    vllm:num_requests_waiting_by_reason{engine="0",model_name="reciter",reason="capacity"} 0.0

The last one repeats the figure of the second one. A server under load may take seconds to send the page.
"""

import math
import re
import time
from dataclasses import dataclass

from ..errors import UpstreamError
from .api import LateAnswer, VllmApi
from .pace import ServerPace
from .server import Server

MOST_BYTES = 4 * 1024 * 1024
"""A larger page is not read: it does not come from one vLLM server."""
_GAUGE = re.compile(rb"^vllm:num_requests_(running|waiting)(?:\{[^\n]*\})?[ \t]+([^ \t\r\n]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of all clients at one server: those that run, and those that wait to run."""

    running: int
    waiting: int


def load_in(page: bytes) -> Load | None:
    """The load that a page of metrics shows, summed over engines and models; None if it shows none."""
    sums = {b"running": 0.0, b"waiting": 0.0}
    found = set[bytes]()
    for name, value in _GAUGE.findall(page):
        try:
            number = float(value)
        except ValueError:
            return None
        if not math.isfinite(number) or number < 0:
            return None
        sums[name] += number
        found.add(name)
    return Load(int(sums[b"running"]), int(sums[b"waiting"])) if len(found) == len(sums) else None


class LoadReader:
    """Reads the load of one server, and passes it to the server's limit.

    Where the load cannot be read, the limit learns from the waits of this worker's own requests instead.
    """

    def __init__(self, api: VllmApi, server: Server, pace: ServerPace) -> None:
        self._api = api
        self._server = server
        self._pace = pace
        self._next_at = float("-inf")

    async def read(self) -> None:
        """Read the load, unless the server did not publish it a short time ago."""
        server = self._server
        load = None
        if time.monotonic() >= self._next_at:
            try:
                load = load_in(await self._api.metrics(server, self._pace.probe_limit, MOST_BYTES))
            except LateAnswer:
                pass  # the server is busy, and will answer again
            except UpstreamError:
                self._next_at = time.monotonic() + self._pace.load_again_after
            else:
                if load is None:
                    self._next_at = time.monotonic() + self._pace.load_again_after
        if load is not None:
            server.limit.on_load(load.running, load.waiting, server.in_flight)
        elif server.in_flight and not server.unanswered:
            server.limit.on_quiet(server.in_flight)

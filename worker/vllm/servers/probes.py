"""Probes of the vLLM servers: whether each server answers, and which models it lists.

A busy vLLM may take 40 s to answer, and a router queries all of its servers first. A server that answers late gets more
time for the next probe, up to a minute, and does not count as away.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..errors import UNAUTHORIZED, NoConnection, UpstreamError
from .api import LateAnswer, VllmApi
from .circuit import Caller
from .pace import ServerPace
from .server import Server

_T = TypeVar("_T")


class Probes:
    """Sends probes, and records their results in the servers and in their circuits."""

    def __init__(self, api: VllmApi, servers: Sequence[Server], pace: ServerPace) -> None:
        self._api = api
        self._servers = servers
        self._pace = pace
        self._health_limits: dict[Server, float] = {}
        """The time limit of the next probe in seconds, for each server whose last answer was late."""
        self._list_limits: dict[Server, float] = {}
        self._listing = asyncio.Lock()
        self._last_round_began = self._last_whole_round_began = float("-inf")

    async def probe(self, server: Server) -> None:
        """Probe a server, and record the result in its circuit."""
        try:
            trouble = await self._trouble_of(server)
        except LateAnswer:
            server.circuit.on_late_probe()
        else:
            server.circuit.on_probe(trouble)

    async def probe_silent(self, server: Server) -> None:
        """Probe a server whose streams are silent. If it is shutting down, they end before their time limit."""
        request = server.circuit.request_of(Caller())
        try:
            await self._api.health(server, self._pace.probe_limit)
        except NoConnection as error:
            server.record_failure(request, error)
        except UpstreamError:
            pass  # a server that answers late may continue its streams

    async def fetch_models(self, server: Server) -> UpstreamError | None:
        """Fetch a server's list of models. Returns an error that may be temporary; the former list is then kept."""
        return await self._record_list(
            server, lambda: self._with_longer_limit(self._list_limits, server, self._api.models)
        )

    async def fetch_all_models(self) -> bool:
        """Fetch the lists of all servers that are not away, at most once in `list_again_after` seconds.

        Returns whether every server has answered. A server that does not answer within a minute counts as answered.
        """
        wanted_at = time.monotonic()
        async with self._listing:
            if self._last_whole_round_began >= wanted_at:  # another caller fetched them while this one waited
                return True
            await asyncio.sleep(self._last_round_began + self._pace.list_again_after - time.monotonic())
            self._last_round_began = began = time.monotonic()
            there = [server for server in self._servers if not server.is_away]
            if any(map(self._may_list_more, await asyncio.gather(*map(self.fetch_models, there)))):
                return False
            self._last_whole_round_began = began
            return True

    async def _trouble_of(self, server: Server) -> str:
        """Why a server is away; empty if it is not. Its list of models is then recorded, unless the list is late.

        Raises:
            LateAnswer: when the server does not answer in time.
        """
        try:
            health = await self._with_longer_limit(self._health_limits, server, self._api.health)
        except LateAnswer:
            raise
        except UpstreamError as error:
            server.fix = error.fix
            return error.code
        if health >= 500:
            return f"health_{health}"
        if health != 404:
            problem = await self._record_list(server, lambda: self._api.models(server, self._pace.probe_limit))
        elif isinstance(problem := await self.fetch_models(server), LateAnswer):  # the list is the probe
            raise problem
        if problem is None or isinstance(problem, LateAnswer):
            return ""
        if not problem.status:  # the connection was lost meanwhile
            return problem.code
        if problem.code == UNAUTHORIZED and server.refuses_key:  # the server is away until its list accepts a key
            return problem.code
        return problem.code if health == 404 and problem.status >= 500 else ""  # a refused key is an answer too

    async def _record_list(self, server: Server, fetch: Callable[[], Awaitable[list[str]]]) -> UpstreamError | None:
        server.listed_at = time.monotonic()
        try:
            server.record_models(await fetch())
        except UpstreamError as error:
            if not error.retryable or (error.status == 403 and not server.models):
                server.record_models([])
                return None
            if isinstance(error, LateAnswer) and error.limit < self._pace.longest_probe_limit:
                server.listed_at = float("-inf")  # fetch it again soon, while requests continue
            return error
        return None

    async def _with_longer_limit(
        self, limits: dict[Server, float], server: Server, send: Callable[[Server, float], Awaitable[_T]]
    ) -> _T:
        """Send a probe. If the answer is late, the limit of the server's next probe is doubled."""
        limit = limits.pop(server, self._pace.probe_limit)
        try:
            return await send(server, limit)
        except LateAnswer:
            limits[server] = min(2 * limit, self._pace.longest_probe_limit)
            raise

    def _may_list_more(self, problem: UpstreamError | None) -> bool:
        if isinstance(problem, LateAnswer):
            return problem.limit < self._pace.longest_probe_limit
        return problem is not None and problem.code != UNAUTHORIZED

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

_LIST_SHARE = 3
"""The time between two lists of an idle server is at least this many times the duration of the last one."""


class Probes:
    """Sends probes, and records their results in the servers and in their circuits."""

    def __init__(self, api: VllmApi, servers: Sequence[Server], pace: ServerPace) -> None:
        self._api = api
        self._servers = servers
        self._pace = pace
        self._health_limits: dict[Server, float] = {}
        """The time limit of the next probe in seconds, for each server whose last answer was late."""
        self._list_limits: dict[Server, float] = {}
        self._list_took: dict[Server, float] = {}
        """Seconds until the last list of each server came, or was given up."""
        self._without_health: set[Server] = set()
        """The servers without `/health` (404): their list of models is the probe."""
        self._listing = asyncio.Lock()
        self._last_round_began = self._last_whole_round_began = float("-inf")

    async def probe(self, server: Server) -> None:
        """Probe a server, its health and then its list of models, and record the result in its circuit."""

        async def trouble_of(server: Server) -> str:
            return await self._health_trouble(server) or await self._list_trouble(server)

        await self._probe(server, trouble_of)

    async def probe_idle(self, server: Server) -> None:
        """Probe a server that has no requests: in turns its health and its list of models.

        A router may take long for its list. If the list is late, the health decides.
        """

        async def trouble_of(server: Server) -> str:
            trouble = await self._list_trouble(server) if self._should_list(server) else ""
            return trouble or (await self._health_trouble(server) if server.awaits_response else "")

        await self._probe(server, trouble_of)

    def _should_list(self, server: Server) -> bool:
        since = time.monotonic() - server.listed_at  # infinite while `fetch_models` is to be called at once
        every = max(self._pace.idle_list_every, _LIST_SHARE * self._list_took.get(server, 0.0))
        return server in self._without_health or every < since < float("inf")

    async def _probe(self, server: Server, trouble_of: Callable[[Server], Awaitable[str]]) -> None:
        server.note_probe()
        try:
            trouble = await trouble_of(server)
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

    async def _health_trouble(self, server: Server) -> str:
        """Why a server is away, by its health; empty if it is not, or has no `/health`.

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
        server.note_response()
        if health == 404:
            self._without_health.add(server)
        else:
            self._without_health.discard(server)
        return f"health_{health}" if health >= 500 else ""

    async def _list_trouble(self, server: Server) -> str:
        """Why a server is away, by its list of models; empty if it is not. The list is recorded, unless it is late.

        Raises:
            LateAnswer: when a server without `/health` does not answer in time.
        """
        is_probe = server in self._without_health
        if not is_probe:
            problem = await self._record_list(server, lambda: self._api.models(server, self._pace.probe_limit))
        elif isinstance(problem := await self.fetch_models(server), LateAnswer):
            raise problem
        if problem is None or isinstance(problem, LateAnswer):
            return ""
        if not problem.status:  # the connection was lost meanwhile
            return problem.code
        # A server that has sent its list refuses a changed key. Once away, it is so until its list accepts a key.
        if problem.code == UNAUTHORIZED and (server.models or server.refuses_key):
            return problem.code
        return problem.code if is_probe and problem.status >= 500 else ""  # a refused key is an answer too

    async def _record_list(self, server: Server, fetch: Callable[[], Awaitable[list[str]]]) -> UpstreamError | None:
        server.listed_at = began = time.monotonic()
        try:
            server.record_models(await fetch())
        except UpstreamError as error:
            if error.status:
                server.note_response()
            server.refuses_list = error.status == 401 and not server.models
            if not error.retryable or (error.status == 403 and not server.models):
                server.record_models([])
                return None
            if isinstance(error, LateAnswer) and error.limit < self._pace.longest_probe_limit:
                server.listed_at = float("-inf")  # fetch it again soon, while requests continue
            return error
        else:
            server.note_response()
            server.refuses_list = False
        finally:
            self._list_took[server] = time.monotonic() - began
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

"""What servers say of themselves when they are asked: whether they are there, and what they serve.

A busy vLLM may take 40 s to answer, and a router asks all of its servers first: who answers late is asked with more
time, up to a minute, and is not held to be away.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..errors import UNAUTHORIZED, NoConnection, UpstreamError
from .api import Late, VllmApi
from .circuit import Caller
from .server import Server

_T = TypeVar("_T")
FIRST_LIMIT, LONGEST_LIMIT = 3.0, 60.0
"""Seconds for an answer; each is twice as long as the one before that was late."""
LIST_AGAIN = 2.0
"""Seconds between two lists that are asked for because a model is missing in the last."""


class Probes:
    """Asks servers, and takes down what they serve."""

    def __init__(self, api: VllmApi, endpoints: Sequence[Server]) -> None:
        self._api = api
        self._endpoints = endpoints
        self._health_limits: dict[Server, float] = {}
        self._list_limits: dict[Server, float] = {}
        self._listing = asyncio.Lock()
        self._all_asked = self._all_listed = float("-inf")

    async def probe(self, endpoint: Server) -> None:
        """Ask a server whether it is there, and tell its circuit."""
        try:
            trouble = await self._trouble(endpoint)
        except Late:
            endpoint.circuit.on_late_probe()
        else:
            endpoint.circuit.on_probe(trouble)

    async def still_there(self, endpoint: Server) -> None:
        """Ask a server whose streams are silent: else all of them wait for their limit when it is going down."""
        run = endpoint.circuit.request_of(Caller())
        try:
            await self._api.health(endpoint, FIRST_LIMIT)
        except NoConnection as error:
            endpoint.record_failure(run, error)
        except UpstreamError:
            pass  # a server that answers late may well send on

    async def ask_list(self, endpoint: Server) -> UpstreamError | None:
        """Ask a server what it serves. An error that may pass is given back, and what it said before holds."""
        return await self._list(endpoint, lambda: self._longer(self._list_limits, endpoint, self._api.models))

    async def list_again(self) -> bool:
        """Ask all servers that are there what they serve, at most once in two seconds; whether all have said it.

        One that says nothing in a minute has said it.
        """
        missed = time.monotonic()
        async with self._listing:
            if self._all_listed >= missed:  # meanwhile, for another request
                return True
            await asyncio.sleep(self._all_asked + LIST_AGAIN - time.monotonic())
            self._all_asked = began = time.monotonic()
            there = [endpoint for endpoint in self._endpoints if not endpoint.is_away]
            if any(map(_may_say_more, await asyncio.gather(*map(self.ask_list, there)))):
                return False
            self._all_listed = began
            return True

    async def _trouble(self, endpoint: Server) -> str:
        """Why a server takes no requests; empty when it does. It has said what it serves then, if it does in time.

        Raises:
            Late: when it does not say.
        """
        try:
            health = await self._longer(self._health_limits, endpoint, self._api.health)
        except Late:
            raise
        except UpstreamError as error:
            endpoint.fix = error.fix
            return error.code
        if health >= 500:
            return f"health_{health}"
        if health != 404:
            problem = await self._list(endpoint, lambda: self._api.models(endpoint, FIRST_LIMIT))
        elif isinstance(problem := await self.ask_list(endpoint), Late):  # without /health the list is the probe
            raise problem
        if problem is None or isinstance(problem, Late):
            return ""
        if not problem.status:  # no connection after all
            return problem.code
        if problem.code == UNAUTHORIZED and endpoint.refuses_key:  # once a request was refused, the list tells of it
            return problem.code
        return problem.code if health == 404 and problem.status >= 500 else ""  # one that asks for a key is there

    async def _list(self, endpoint: Server, ask: Callable[[], Awaitable[list[str]]]) -> UpstreamError | None:
        endpoint.listed_at = time.monotonic()
        try:
            endpoint.record_models(await ask())
        except UpstreamError as error:
            if not error.retryable or (error.status == 403 and not endpoint.models):
                endpoint.record_models([])
                return None
            if isinstance(error, Late) and error.within < LONGEST_LIMIT:
                endpoint.listed_at = float("-inf")  # soon again, beside the requests
            return error
        return None

    async def _longer(
        self, limits: dict[Server, float], endpoint: Server, ask: Callable[[Server, float], Awaitable[_T]]
    ) -> _T:
        """Ask with more time than the last that was late."""
        limit = limits.pop(endpoint, FIRST_LIMIT)
        try:
            return await ask(endpoint, limit)
        except Late:
            limits[endpoint] = min(2 * limit, LONGEST_LIMIT)
            raise


def _may_say_more(problem: UpstreamError | None) -> bool:
    if isinstance(problem, Late):
        return problem.within < LONGEST_LIMIT
    return problem is not None and problem.code != UNAUTHORIZED

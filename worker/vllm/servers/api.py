"""What vLLM servers are asked over HTTP, each with a key that it takes."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx
import msgspec

from ...contract.entries import Object, to_json
from ..errors import UNAUTHORIZED, UpstreamError, from_response, unreachable, web_page, without_user
from ..http.credentials import ApiKeys
from ..http.target import Target
from ..http.transport import HttpResponse, Transport
from ..stream.chat_stream import StreamTimeouts, StreamWatchdog, open_response
from .server import Server

_T = TypeVar("_T")


_TO_CONNECT = 0.9
"""Part of the time for an answer in which there must be a connection: one that is missing is not late."""


class Late(UpstreamError):
    """A server took the connection and did not answer `within` so many seconds: it may be busy."""

    def __init__(self, url: str, within: float) -> None:
        super().__init__(
            "upstream_unreachable", f"{without_user(url)} did not answer within {within:g} s", retryable=True
        )
        self.within = within


class VllmApi:
    """The HTTP client of all servers: one transport, with no limit on connections but the worker's slots."""

    def __init__(self, keys: ApiKeys, *, connect: float) -> None:
        self._keys = keys
        self._connect = connect
        self._transport = Transport()
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=connect), transport=self._transport)
        self._targets: dict[tuple[str, str], Target] = {}

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def open(
        self, endpoint: Server, route: str, body: Object, limits: StreamTimeouts, watchdog: StreamWatchdog
    ) -> HttpResponse:
        """Post a completion and give its answer, which the caller closes.

        Raises:
            UpstreamError: when there is none.
        """
        url = endpoint.url + route
        return await self._with_key(
            endpoint, lambda key: open_response(self._transport, self._target(url, key), body, limits, watchdog)
        )

    async def post(self, endpoint: Server, path: str, body: Object) -> bytes:
        """Ask something small; gives the body of the answer.

        Raises:
            UpstreamError: when the server does not answer, or refuses.
        """
        url = endpoint.url + path

        async def ask(key: str) -> bytes:
            headers = {"content-type": "application/json"} | _authorization(key)
            response = await self._client.post(url, content=to_json(body), headers=headers)
            if response.status_code != 200:
                raise from_response(response.status_code, response.content, response.headers)
            return response.content

        try:
            return await self._with_key(endpoint, ask)
        except httpx.HTTPError as error:
            raise unreachable(url, error) from None

    async def health(self, endpoint: Server, within: float) -> int:
        """The status of a server's `/health`.

        Raises:
            Late: when it does not answer within so many seconds.
            UpstreamError: when it does not answer.
        """
        key = await self._keys.untried(endpoint.accepted_key, frozenset()) or ""
        return (await self._get(f"{endpoint.url}/health", key, within)).status_code

    async def models(self, endpoint: Server, within: float) -> list[str]:
        """The names of the models that a server serves.

        Raises:
            Late: when it does not answer within so many seconds.
            UpstreamError: when it does not say.
        """
        url = f"{endpoint.url}/v1/models"

        async def ask(key: str) -> bytes:
            response = await self._get(url, key, within)
            if response.status_code != 200:
                raise from_response(response.status_code, response.content, response.headers)
            return response.content

        content = await self._with_key(endpoint, ask)
        if content.lstrip().startswith(b"<"):
            raise web_page(content, retryable=False)
        try:
            return [model.id for model in msgspec.json.decode(content, type=_Models).data]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamError("not_a_stream", f"{url} does not list models: {error}", retryable=False) from None

    async def _with_key(self, endpoint: Server, ask: Callable[[str], Awaitable[_T]]) -> _T:
        """Ask with the key that the server took last and, where it refuses that, with the others there are.

        A key that it knows and forbids something to (403) says more than those that it does not know.
        """
        refused: set[str] = set()
        refusal: UpstreamError | None = None
        while (key := await self._keys.untried(endpoint.accepted_key, refused)) is not None:
            try:
                answer = await ask(key)
            except UpstreamError as error:
                if error.code != UNAUTHORIZED:
                    raise
                refused.add(key)
                if refusal is None or error.status == 403:
                    refusal = error
            else:
                endpoint.accepted_key = key
                return answer
        raise refusal or AssertionError("there is always a key to begin with")

    def _target(self, url: str, key: str) -> Target:
        if (url, key) not in self._targets:
            try:
                self._targets[url, key] = Target.of(self._client, url, _authorization(key))
            except httpx.HTTPError as error:
                raise unreachable(url, error) from None
        return self._targets[url, key]

    async def _get(self, url: str, key: str, within: float) -> httpx.Response:
        try:
            async with asyncio.timeout(within):
                timeout = httpx.Timeout(None, connect=min(self._connect, _TO_CONNECT * within))
                return await self._client.get(url, headers=_authorization(key), timeout=timeout)
        except httpx.HTTPError as error:
            raise unreachable(url, error, is_probe=True) from None
        except TimeoutError:
            raise Late(url, within) from None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _authorization(key: str) -> dict[str, str]:
    """The header of a key. A user and a password in a URL go before it: httpx makes Basic authorization of them."""
    return {"authorization": f"Bearer {key}"} if key else {}

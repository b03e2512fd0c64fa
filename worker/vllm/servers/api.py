"""The HTTP API of the vLLM servers: completions, short queries, health and models, each with the right API key."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx
import msgspec

from ...contract.entries import Object, to_json
from ...telemetry.events import Telemetry
from ..errors import UNAUTHORIZED, UpstreamError, from_response, unreachable, web_page, without_user
from ..http.connection import HttpResponse
from ..http.credentials import ApiKeys
from ..http.target import Target
from ..http.transport import Transport
from ..stream.chat_stream import open_response
from ..stream.watchdog import StreamTimeouts, StreamWatchdog
from .server import Server

_T = TypeVar("_T")

_CONNECT_SHARE = 0.9
"""The share of a probe's time within which it must connect, so that a failure to connect is not a late answer."""


class LateAnswer(UpstreamError):
    """A server accepted the connection and did not answer within `limit` seconds: it may be busy."""

    def __init__(self, url: str, limit: float) -> None:
        super().__init__(
            "upstream_unreachable", f"{without_user(url)} did not answer within {limit:g} s", retryable=True
        )
        self.limit = limit


class VllmApi:
    """The HTTP client of all servers. It has one transport, and as many connections as the worker has slots."""

    def __init__(
        self, keys: ApiKeys, telemetry: Telemetry, *, connect: float, transport: Transport | None = None
    ) -> None:
        self._keys = keys
        self._telemetry = telemetry
        self._connect = connect
        self._transport = transport or Transport()
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=connect), transport=self._transport)
        self._targets: dict[tuple[str, str], Target] = {}

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def open(
        self,
        server: Server,
        route: str,
        body: Object,
        limits: StreamTimeouts,
        watchdog: StreamWatchdog,
        *,
        traceparent: str = "",
    ) -> HttpResponse:
        """Post a completion request; returns the response, which the caller must close.

        `traceparent` is a valid header of W3C trace context. vLLM's span of the request becomes its child.

        Raises:
            UpstreamError: when the server sends no response with a stream.
        """
        url = server.url + route

        async def send(key: str) -> HttpResponse:
            target = self._target(url, key)
            if traceparent:
                target = target.with_header("traceparent", traceparent)
            return await open_response(self._transport, target, body, limits, watchdog)

        return await self._with_key(server, send)

    async def post(self, server: Server, path: str, body: Object) -> bytes:
        """Post a short query; returns the body of the response.

        Raises:
            UpstreamError: when the server does not answer, or refuses.
        """
        url = server.url + path

        async def send(key: str) -> bytes:
            headers = {"content-type": "application/json"} | _authorization(key)
            return _body_of(await self._client.post(url, content=to_json(body), headers=headers))

        try:
            return await self._with_key(server, send)
        except httpx.HTTPError as error:
            raise unreachable(url, error) from None

    async def health(self, server: Server, limit: float) -> int:
        """The status of a server's `/health`.

        Raises:
            LateAnswer: when the server does not answer within `limit` seconds.
            UpstreamError: when the server cannot be reached.
        """
        key = await self._keys.untried(server.accepted_key, frozenset(), self._telemetry) or ""
        return (await self._get(f"{server.url}/health", key, limit)).status_code

    async def models(self, server: Server, limit: float) -> list[str]:
        """The names of the models that a server lists.

        Raises:
            LateAnswer: when the server does not answer within `limit` seconds.
            UpstreamError: when the server cannot be reached, or sends no list.
        """
        url = f"{server.url}/v1/models"

        async def send(key: str) -> bytes:
            return _body_of(await self._get(url, key, limit))

        content = await self._with_key(server, send)
        if content.lstrip().startswith(b"<"):
            raise web_page(content, retryable=False)
        try:
            return [model.id for model in msgspec.json.decode(content, type=_Models).data]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamError("not_a_stream", f"{url} does not list models: {error}", retryable=False) from None

    async def metrics(self, server: Server, limit: float, most_bytes: int) -> bytes:
        """The page of metrics of a server.

        Raises:
            LateAnswer: when the server does not answer within `limit` seconds.
            UpstreamError: when the server cannot be reached, sends no page, or sends more than `most_bytes`.
        """
        url = f"{server.url}/metrics"

        async def send(key: str) -> bytes:
            headers = {"accept-encoding": "identity", **_authorization(key)}
            page = bytearray()
            try:
                async with asyncio.timeout(limit), self._client.stream("GET", url, headers=headers) as response:
                    async for piece in response.aiter_bytes():
                        page += piece
                        if len(page) > most_bytes:
                            raise UpstreamError("not_a_stream", f"{url} is too long", retryable=False)
            except httpx.HTTPError as error:
                raise unreachable(url, error) from None
            except TimeoutError:
                raise LateAnswer(url, limit) from None
            if response.status_code != httpx.codes.OK:
                raise from_response(response.status_code, bytes(page), response.headers)
            return bytes(page)

        return await self._with_key(server, send)

    async def _with_key(self, server: Server, send: Callable[[str], Awaitable[_T]]) -> _T:
        """Send a request with the key that the server accepted last and, if refused, with each of the other keys.

        If all are refused, a 403 takes precedence over a 401: the server knows that key, and forbids the request.
        """
        refused: set[str] = set()
        refusal: UpstreamError | None = None
        while (key := await self._keys.untried(server.accepted_key, refused, self._telemetry)) is not None:
            try:
                response = await send(key)
            except UpstreamError as error:
                if error.code != UNAUTHORIZED:
                    raise
                refused.add(key)
                if refusal is None or error.status == 403:
                    refusal = error
            else:
                server.accepted_key = key
                return response
        raise refusal or AssertionError("there is always a first key")

    def _target(self, url: str, key: str) -> Target:
        if (url, key) not in self._targets:
            try:
                self._targets[url, key] = Target.of(self._client, url, _authorization(key))
            except httpx.HTTPError as error:
                raise unreachable(url, error) from None
        return self._targets[url, key]

    async def _get(self, url: str, key: str, limit: float) -> httpx.Response:
        try:
            async with asyncio.timeout(limit):
                timeout = httpx.Timeout(None, connect=min(self._connect, _CONNECT_SHARE * limit))
                return await self._client.get(url, headers=_authorization(key), timeout=timeout)
        except httpx.HTTPError as error:
            raise unreachable(url, error, is_probe=True) from None
        except TimeoutError:
            raise LateAnswer(url, limit) from None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _body_of(response: httpx.Response) -> bytes:
    """The body of a response with status 200.

    Raises:
        UpstreamError: for any other status.
    """
    if response.status_code != 200:
        raise from_response(response.status_code, response.content, response.headers)
    return response.content


def _authorization(key: str) -> dict[str, str]:
    """The header of a key. A user in the URL overrides the key: httpx sends it with the password (Basic)."""
    return {"authorization": f"Bearer {key}"} if key else {}

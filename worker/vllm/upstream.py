"""The vLLM servers that this worker may use: which one takes a request, and what each is known not to understand."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx
import msgspec
import structlog

from worker.contract.entries import Object, to_json
from worker.vllm.errors import UpstreamError, from_response, unreachable, without_user
from worker.vllm.stream import ChatStream, Limits, open_stream

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_OPTIONAL = ("return_token_ids", "stream_options")
"""What the worker adds to a request for its own ends; a server that refuses one is asked without it."""

_FEW_SECONDS = 3.0
_PROBE_EVERY = 2.0

_log = structlog.get_logger()


@dataclass(eq=False)
class Endpoint:
    """One server. `url` is its base, without `/v1`; `away` is None until it is known whether it can be reached."""

    url: str
    away: bool | None = None
    in_flight: int = 0
    without: set[str] = field(default_factory=set)


class Upstream:
    """All servers together. One HTTP client serves them, with no limit on connections but the worker's slots."""

    def __init__(self, urls: Sequence[str], *, api_key: str = "", limits: Limits) -> None:
        self.endpoints = [Endpoint(base_url(url)) for url in urls]
        self._limits = limits
        self._there = asyncio.Event()
        self._lost = asyncio.Event()
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=limits.connect),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=15),
        )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    @property
    def is_there(self) -> bool:
        """Whether a server can take work, as far as is known."""
        return any(endpoint.away is False for endpoint in self.endpoints)

    def can_take(self, model: str) -> bool:  # noqa: ARG002
        return self.is_there

    async def available(self, model: str = "") -> None:
        """Wait until a server can take work; `watch` finds out."""
        await self._there.wait()

    async def watch(self) -> None:
        """Ask servers that are away whether they are back, at once and then every two seconds, until cancelled."""
        while True:
            self._lost.clear()
            away = [endpoint for endpoint in self.endpoints if endpoint.away is not False]
            await asyncio.gather(*map(self._probe, away))
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_EVERY):
                    await self._lost.wait()

    async def _probe(self, endpoint: Endpoint) -> None:
        try:
            async with asyncio.timeout(_FEW_SECONDS):
                response = await self._client.get(f"{endpoint.url}/v1/models")
        except (httpx.HTTPError, TimeoutError):
            self._mark(endpoint, away=True)
        else:  # one that asks for a key is there too
            self._mark(endpoint, away=response.status_code >= 500)

    def _mark(self, endpoint: Endpoint, *, away: bool) -> None:
        if away and not endpoint.away:
            _log.warning("vllm_away", endpoint=without_user(endpoint.url))
            self._lost.set()
        elif not away and endpoint.away:
            _log.info("vllm_back", endpoint=without_user(endpoint.url))
        endpoint.away = away
        if self.is_there:
            self._there.set()
        else:
            self._there.clear()

    def choose(self, model: str = "", *, other_than: Endpoint | None = None) -> Endpoint:
        """Of the servers that are there the one with the fewest requests of ours in flight, not the last if may be."""
        there = [endpoint for endpoint in self.endpoints if not endpoint.away] or self.endpoints
        rest = [endpoint for endpoint in there if endpoint is not other_than]
        return min(rest or there, key=lambda endpoint: endpoint.in_flight)

    @asynccontextmanager
    async def stream(self, endpoint: Endpoint, request: Object, route: str = CHAT) -> AsyncIterator[ChatStream]:
        """The token stream of a request; leaving the context closes it.

        Raises:
            UpstreamError: when the server does not give one.
        """
        endpoint.in_flight += 1
        try:
            stream = await self._open(endpoint, request, route)
            try:
                yield stream
            finally:
                await stream.aclose()
        finally:
            endpoint.in_flight -= 1

    async def _open(self, endpoint: Endpoint, request: Object, route: str) -> ChatStream:
        """Open the stream, without what the server does not know.

        A field is held to be unknown only once the same request was taken without it, and never for a request that
        has it of its own: a bad job, or one whose text quotes such a name in an error, must not cost the others theirs.
        """
        without = set(endpoint.without)
        while True:
            try:
                stream = await open_stream(self._client, endpoint.url + route, body_for(request, without), self._limits)
            except UpstreamError as error:
                if error.code == "upstream_unreachable":
                    self._mark(endpoint, away=True)
                refused = {name for name in _OPTIONAL if name not in request and _names(error, name)} - without
                if not refused:
                    raise
                without |= refused
            else:
                endpoint.without |= without
                self._mark(endpoint, away=False)
                return stream

    async def post(self, endpoint: Endpoint, path: str, body: Object) -> bytes:
        """Ask a server something small; gives the body of its answer.

        Raises:
            UpstreamError: when it does not answer, or refuses.
        """
        url = endpoint.url + path
        headers = {"content-type": "application/json"}
        try:
            async with asyncio.timeout(_FEW_SECONDS):
                response = await self._client.post(url, content=to_json(body), headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            raise unreachable(url, error) from None
        if response.status_code != 200:
            raise from_response(response.status_code, response.content, response.headers)
        return response.content

    async def models(self, endpoint: Endpoint) -> list[str]:
        """The names of the models that a server serves.

        Raises:
            UpstreamError: when it does not say.
        """
        url = f"{endpoint.url}/v1/models"
        try:
            async with asyncio.timeout(_FEW_SECONDS):
                response = await self._client.get(url)
        except (httpx.HTTPError, TimeoutError) as error:
            raise unreachable(url, error) from None
        if response.status_code != 200:
            raise from_response(response.status_code, response.content, response.headers)
        try:
            return [model.id for model in msgspec.json.decode(response.content, type=_Models).data]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UpstreamError("not_a_stream", f"{url} does not list models: {error}", retryable=False) from None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def base_url(url: str) -> str:
    """The server's base: given with or without `/v1` and a slash at the end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def body_for(request: Object, without: AbstractSet[str]) -> Object:
    """The request as it is sent: streamed, and with what the worker wants to know beside what the job asks."""
    body: Object = {**request, "stream": True}
    if "return_token_ids" not in without:
        body["return_token_ids"] = True
    if "stream_options" not in without:
        asked = request.get("stream_options")
        body["stream_options"] = {**(asked if isinstance(asked, dict) else {}), "include_usage": True}
    return body


def _names(error: UpstreamError, field_name: str) -> bool:
    return error.status in {400, 422} and field_name in error.message

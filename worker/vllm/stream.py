"""The token stream of one answer, read from a vLLM server: the one place that holds an open HTTP response.

Its limits are on silence: from the request to the first event (a long queue at vLLM is silence after 200), and from
one data event to the next. Keep-alive comments do not count, since a vLLM that is being shut down sends them on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import httpx

from worker.contract.entries import Object, to_json
from worker.vllm.errors import UpstreamError, from_response, malformed, message_of, truncated, unreachable
from worker.vllm.sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder

_END_OF_ANSWER = 0.5
_MOMENTS = 2.0
_MAX_ERROR_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """How long vLLM may be silent, in seconds."""

    connect: float = 5.0
    first_token: float = 120.0
    gap: float = 30.0


class Patience:
    """How long one request may be silent: until its first event, and then from each event to the next."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._first_by: float | None = _now() + limits.first_token
        self._hurried = False
        self._timeout = asyncio.timeout(None)

    def wait(self) -> asyncio.Timeout:
        """The limit of what comes next."""
        self._timeout = asyncio.timeout_at(self._first_by or _now() + self._limits.gap)
        return self._timeout

    def begun(self) -> None:
        """The first event is there."""
        self._first_by = None

    def is_silent(self) -> bool:
        """Whether it has waited for longer than moments by now."""
        allowed = self._limits.gap if self._first_by is None else self._limits.first_token
        when = self._timeout.when()
        return when is not None and when - _now() < allowed - _MOMENTS

    def hurry(self) -> None:
        """The server takes no connections any more: what it does not send within moments will not come.

        vLLM 0.32.0 freezes its open streams when it gets SIGTERM, and refuses connections at once.
        """
        soon = _now() + _MOMENTS
        self._limits = replace(self._limits, gap=min(self._limits.gap, _MOMENTS))
        self._first_by = self._first_by and min(self._first_by, soon)
        self._hurried = True
        when = self._timeout.when()
        if when is not None and when > soon:
            with suppress(RuntimeError):  # it waits for nothing just now
                self._timeout.reschedule(soon)

    def silence(self) -> UpstreamError:
        """What to say when it is over."""
        if self._hurried:
            return truncated("vLLM takes no connections any more, and its open stream is silent")
        if self._first_by is None:
            text = f"vLLM sent nothing for {self._limits.gap:g} s mid-stream"
            return UpstreamError("gap_timeout", text, retryable=True)
        text = f"vLLM sent no token within {self._limits.first_token:g} s"
        return UpstreamError("first_token_timeout", text, retryable=True)


class ChatStream:
    """The events of an answer, as they arrive."""

    def __init__(self, response: httpx.Response, chunks: AsyncIterator[bytes], patience: Patience) -> None:
        self._response = response
        self._chunks = chunks
        self._patience = patience
        self._is_new = True
        self.on_first: Callable[[], None] | None = None
        """Called when the first event is there."""
        self._decoder = SSEDecoder()

    async def read(self) -> list[bytes]:
        """The data of the next events, at least one; nothing at the end of the stream.

        Raises:
            UpstreamError: after too long a silence, when the connection breaks, and for an event without end.
        """
        try:
            async with self._patience.wait():
                async for chunk in self._chunks:
                    if events := self._decoder.feed(chunk):
                        if self._is_new:
                            self._begun()
                        return events
        except TimeoutError:
            raise self._patience.silence() from None
        except EventTooLarge as error:
            raise malformed(str(error)) from None
        except httpx.HTTPError as error:
            raise truncated(f"the connection to vLLM broke: {_why(error)}") from None
        return []

    def _begun(self) -> None:
        self._is_new = False
        self._patience.begun()
        if self.on_first is not None:
            self.on_first()

    async def finish(self) -> None:
        """After `[DONE]`: read the end of the answer, briefly, so that the connection can serve again."""
        with suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(_END_OF_ANSWER):
                async for _ in self._chunks:
                    pass

    async def aclose(self) -> None:
        """Close the answer; a vLLM that is not done with it stops at once."""
        await self._response.aclose()


async def open_stream(
    client: httpx.AsyncClient, url: str, body: Object, limits: Limits, patience: Patience | None = None
) -> ChatStream:
    """Post a completion and give its stream, which the caller closes. `patience` is for who may hurry it.

    Raises:
        UpstreamError: when there is no stream: no connection, a status other than 200, or a page in its place.
    """
    patience = patience or Patience(limits)
    request = client.build_request(
        "POST", url, content=to_json(body), headers={"content-type": "application/json", "accept-encoding": "identity"}
    )
    try:
        async with patience.wait():
            response = await client.send(request, stream=True)
    except TimeoutError:
        raise patience.silence() from None
    except httpx.HTTPError as error:
        raise unreachable(url, error) from None
    try:
        return ChatStream(response, await _events_of(response, limits), patience)
    except BaseException:
        await response.aclose()
        raise


async def _events_of(response: httpx.Response, limits: Limits) -> AsyncIterator[bytes]:
    """The body as a stream of events, also where the server answered with a whole completion as JSON."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if response.status_code == 200 and kind not in {"application/json", "text/html"}:
        return response.aiter_bytes()
    body = await _body(response, limits, MAX_EVENT_BYTES if response.status_code == 200 else _MAX_ERROR_BYTES)
    if response.status_code != 200:
        raise from_response(response.status_code, body, response.headers)
    if kind == "text/html":
        raise UpstreamError(
            "not_a_stream", f"a page came in place of a stream: {message_of(body.decode('utf-8', 'replace')[:200])}",
            status=200, retryable=True,
        )  # fmt: skip
    return _as_events(body)


async def _as_events(body: bytes) -> AsyncIterator[bytes]:
    yield b"data: " + body.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n\ndata: [DONE]\n\n"


async def _body(response: httpx.Response, limits: Limits, most: int) -> bytes:
    """The body, cut at `most` bytes."""
    body = b""
    try:
        async with asyncio.timeout(limits.gap):
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) >= most:
                    break
    except (httpx.HTTPError, TimeoutError) as error:
        if not body:
            raise truncated(f"the answer with status {response.status_code} broke off: {_why(error)}") from None
    return body[:most]


def _now() -> float:
    return asyncio.get_running_loop().time()


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__

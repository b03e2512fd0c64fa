"""The token stream of one answer, which owns the open HTTP response of a vLLM server."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx

from ...contract.entries import Object, to_json
from ..error_bodies import HEAD_OF_PAGE
from ..errors import UpstreamError, from_response, malformed, truncated, unreachable, web_page
from ..http.connection import HttpResponse
from ..http.target import Target
from ..http.transport import Transport
from .sse import MAX_EVENT_BYTES, EventTooLarge, SSEDecoder
from .watchdog import StreamTimeouts, StreamWatchdog

_REST_LIMIT = 0.5
"""Seconds for the end of a response after `[DONE]`."""
_MAX_ERROR_BYTES = 1024 * 1024
_SUCCESS_STATUSES = frozenset({200, 201, 202, 203, 206})
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"


class ChatStream:
    """The events of one answer, passed to the reader as they arrive.

    Attributes:
        has_output: returns whether the server has sent output, which only the reader of the events can decide. It is
            called after each event until it returns true. Without it, the first event counts as output.
        watchdog: the limits on silence, and how long the silences were.

    Args:
        response: the response that holds the stream.
        on_first: called once the first event was passed on.
        reopen: called with an error that came instead of the first event. It returns the response to a changed request
            that avoids the error, or None.
        max_event_bytes: the largest event that is accepted.
    """

    __slots__ = (
        "_answer_started", "_body", "_decoder", "_is_new", "_max_event_bytes", "_on_events", "_on_first", "_reopen",
        "has_output", "watchdog",
    )  # fmt: skip

    def __init__(
        self,
        response: HttpResponse,
        watchdog: StreamWatchdog,
        *,
        on_first: Callable[[], None] | None = None,
        reopen: Callable[[UpstreamError], Awaitable[HttpResponse | None]] | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        self._body = response.body
        self.watchdog = watchdog
        self._on_first = on_first
        self._reopen = reopen
        self._max_event_bytes = max_event_bytes
        self._is_new = True
        """Whether no event has been passed on yet."""
        self._answer_started = False
        self.has_output: Callable[[], bool] | None = None
        self._decoder: SSEDecoder | _Opening = _Opening(self._start_decoder)
        self._on_events: Callable[[list[bytes]], bool]

    @property
    def skipped(self) -> str:
        """The first lines of the stream that belong to no event."""
        return self._decoder.skipped.decode("utf-8", "replace")

    async def read_into(self, on_events: Callable[[list[bytes]], bool]) -> bool:
        """Pass the data of events that arrive together to `on_events`, as they arrive, until it returns true.

        Returns false at the end of the stream. An exception of `on_events` is raised here.

        Raises:
            UpstreamError: after too long a silence, when the connection breaks, and for an event that is too large.
        """
        self._on_events = on_events
        while True:
            try:
                return await self._read()
            except UpstreamError as error:
                # If text came in the same piece as the error, the answer is not requested again.
                output_came = self.has_output is not None and self.has_output()
                response = None
                if self._reopen is not None and self._is_new and not output_came:
                    response = await self._reopen(error)
                if response is None:
                    raise
                await self._body.aclose()
                self._body, self._decoder = response.body, _Opening(self._start_decoder)

    async def _read(self) -> bool:
        try:
            with self.watchdog:
                more = await self._body.read_into(self._on_data)
            return more or self._hand_over(self._decoder.end())
        except TimeoutError:
            self._hand_over(self._decoder.end())  # may raise an error that the server sent
            raise self.watchdog.timeout_error("" if self._answer_started else self.skipped) from None
        except EventTooLarge as error:
            raise malformed(str(error)) from None
        except httpx.HTTPError as error:
            if self._hand_over(self._decoder.end()):  # the last event was complete except for its line end
                return True
            raise truncated(f"the connection to vLLM broke: {_reason(error)}") from None

    def _on_data(self, piece: bytes) -> bool:
        events = self._decoder.feed(piece)
        if not events:
            if self._decoder.holds_json:
                self.watchdog.on_answer_start()  # a completion that is not streamed, in more than one piece
            return False
        self.watchdog.on_event()
        is_enough = self._on_events(events)
        if not self._answer_started:  # and `on_events` found no error in place of an answer
            self._after_event()
        return is_enough

    def _hand_over(self, events: list[bytes]) -> bool:
        """Pass on the last events, which are complete only at the end of the body. False if there are none."""
        if events:
            self._on_events(events)
            if not self._answer_started:
                self._after_event()
        return bool(events)

    def _after_event(self) -> None:
        if self._is_new and self._on_first is not None:
            self._on_first()
        self._is_new = False
        self._on_first = self._reopen = None  # they hold the request
        if self.has_output is None or self.has_output():
            self._answer_started = True
            self.watchdog.on_answer_start()

    def _start_decoder(self) -> SSEDecoder:
        self._decoder = decoder = SSEDecoder(self._max_event_bytes)
        return decoder

    async def read_rest(self) -> None:
        """Read the end of the response after `[DONE]`, for half a second, so that the connection can be used again.

        Events that still come are passed on as before: one of them may hold the usage.
        """

        def on_data(piece: bytes) -> bool:
            if events := self._decoder.feed(piece):
                self._on_events(events)
            return False

        with suppress(httpx.HTTPError, TimeoutError, EventTooLarge):
            async with asyncio.timeout(_REST_LIMIT):
                await self._body.read_into(on_data)

    async def aclose(self) -> None:
        """Close the response; a vLLM that is still generating stops at once."""
        await self._body.aclose()


async def open_response(
    transport: Transport, target: Target, body: Object, limits: StreamTimeouts, watchdog: StreamWatchdog
) -> HttpResponse:
    """Post a completion request; returns the response that holds its stream.

    Raises:
        UpstreamError: when there is no connection, or the status is not that of a stream.
    """
    try:
        with watchdog:
            response = await transport.post(target, to_json(body).encode(), limits.connect)
    except TimeoutError:
        raise watchdog.timeout_error() from None
    except httpx.HTTPError as error:
        raise unreachable(target.url, error) from None
    try:
        await _check_head(response, limits)
    except BaseException:
        await response.body.aclose()
        raise
    return response


async def _check_head(response: HttpResponse, limits: StreamTimeouts) -> None:
    """Raise the error in a response that holds no stream. The content type is not checked: see `_Opening`."""
    if response.status in _SUCCESS_STATUSES:
        if response.header(b"content-encoding") in {"", "identity"}:
            return
        text = "the stream is compressed, though the request forbids it"
        raise UpstreamError("not_a_stream", text, status=200, retryable=True)
    decoding = httpx.Response(response.status, headers=response.headers, stream=response.body)
    body = b""
    try:
        async with asyncio.timeout(limits.gap):
            async for chunk in decoding.aiter_bytes():
                body += chunk
                if len(body) >= _MAX_ERROR_BYTES:
                    break
    except (httpx.HTTPError, TimeoutError) as error:
        if not body:
            raise truncated(f"the answer with status {response.status} broke off: {_reason(error)}") from None
    raise from_response(response.status, body[:_MAX_ERROR_BYTES], decoding.headers)


class _Opening:
    """The decoder until the first byte that is not blank shows whether the body is a web page.

    The content type is no reliable sign: vLLM's own proxies label a stream as JSON, and other servers label a whole
    completion as a stream.
    """

    __slots__ = ("_held", "_start_decoder")

    holds_json = False
    skipped = b""

    def __init__(self, start_decoder: Callable[[], SSEDecoder]) -> None:
        self._start_decoder = start_decoder
        self._held = b""

    def feed(self, piece: bytes) -> list[bytes]:
        start = self._held + piece
        if _BOM.startswith(start):
            self._held = start
            return []
        start = start.removeprefix(_BOM).lstrip(_BLANK)
        self._held = b""
        if not start:
            return []
        if start.startswith(b"<"):
            if len(start) < HEAD_OF_PAGE:
                self._held = start
                return []
            raise web_page(start)
        return self._start_decoder().feed(start)

    def end(self) -> list[bytes]:
        if self._held.startswith(b"<"):
            raise web_page(self._held)
        return []


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__

"""The token stream of one answer, read from a vLLM server: the one place that holds an open HTTP response.

Its limits are on silence: from the request to the first token (a long queue at vLLM is silence after 200), and from
one data event to the next. Keep-alive comments do not count, since a vLLM that is being shut down sends them on.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from types import TracebackType

import httpx

from ...contract.entries import Object, to_json
from ..error_bodies import HEAD_OF_PAGE, excerpt
from ..errors import UpstreamError, from_response, malformed, truncated, unreachable, web_page
from ..http.target import Target
from ..http.transport import HttpResponse, Transport
from .sse import EventTooLarge, SSEDecoder

_END_OF_ANSWER = 0.5
_MOMENTS = 2.0
_MAX_ERROR_BYTES = 1024 * 1024
_ANSWERS = frozenset({200, 201, 202, 203, 206})
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class StreamTimeouts:
    """How long vLLM may be silent, in seconds."""

    connect: float = 5.0
    first_token: float = 120.0
    gap: float = 30.0


class StreamWatchdog:
    """How long one request may be silent: until its answer begins, and then from each event to the next.

    What comes before the first token, such as a chunk with the role alone, begins nothing. Silence is counted anew from
    it all the same: events that say nothing come while a server holds back what may be a tool call.

    Within its context the server is waited for. It is left with TimeoutError when it is silent for too long.
    """

    __slots__ = ("_begun", "_hurried", "_limit", "_limits", "_since", "_timer")

    def __init__(self, limits: StreamTimeouts) -> None:
        self._limits = limits
        self._since = monotonic()
        self._begun = False
        self._hurried: float | None = None
        self._limit: asyncio.Timeout | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        if self._begun:
            self._since = monotonic()  # while its text was not wanted it could say nothing
        self._limit = await asyncio.timeout(None).__aenter__()
        self._look()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        limit, timer, self._limit, self._timer = self._limit, self._timer, None, None
        if timer is not None:
            timer.cancel()
        if limit is not None:
            await limit.__aexit__(kind, error, traceback)

    def on_event(self) -> None:
        """An event is there. Said for each, so it costs next to nothing: the timer finds it out when it is due."""
        self._since = monotonic()

    def on_answer_start(self) -> None:
        """The answer has begun: from here on the gap is the limit."""
        self._since = monotonic()
        if not self._begun:
            self._begun = True
            self._look_again()

    def restart(self) -> None:
        """The request is sent again, in another way: what came was no answer."""
        self._since = monotonic()
        self._begun = False

    def is_silent(self) -> bool:
        """Whether it has waited for longer than moments by now."""
        return self._timer is not None and monotonic() - self._since > _MOMENTS

    def tighten(self) -> None:
        """The server takes no connections any more: what it does not send within moments will not come.

        vLLM 0.32.0 freezes its open streams when it gets SIGTERM, and refuses connections at once.
        """
        if self._hurried is None:
            self._hurried = monotonic()
        self._look_again()

    def timeout_error(self, passed_over: str = "") -> UpstreamError:
        """The error of a server that was silent for too long; it quotes what the server sent in place of events."""
        quoted = f"; what it sent is no event: {excerpt(passed_over)}" if passed_over else ""
        if self._hurried is not None:
            return truncated(f"vLLM takes no connections any more, and its open stream is silent{quoted}")
        if self._begun:
            text = f"vLLM sent nothing for {self._limits.gap:g} s mid-stream{quoted}"
            return UpstreamError("gap_timeout", text, retryable=True)
        text = f"vLLM sent no token within {self._limits.first_token:g} s{quoted}"
        return UpstreamError("first_token_timeout", text, retryable=True)

    def _due(self) -> float:
        due = self._since + (self._limits.gap if self._begun else self._limits.first_token)
        return due if self._hurried is None else min(due, max(self._since, self._hurried) + _MOMENTS)

    def _look(self) -> None:
        due = self._due()
        if due > monotonic():
            self._timer = asyncio.get_running_loop().call_at(due, self._look)
        elif self._limit is not None and not self._limit.expired():
            self._limit.reschedule(due)

    def _look_again(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._look()


class ChatStream:
    """The events of an answer, as they arrive."""

    __slots__ = (
        "_answer",
        "_decoder",
        "_has_begun",
        "_is_new",
        "_take",
        "_watchdog",
        "has_begun",
        "on_first",
        "reopen",
    )

    def __init__(self, answer: HttpResponse, watchdog: StreamWatchdog) -> None:
        self._answer = answer
        self._watchdog = watchdog
        self._is_new = True
        self._has_begun = False
        self.has_begun: Callable[[], bool] | None = None
        """Asked after each event until it says that the answer has begun, which only the reader of the events knows.
        Without it the first event begins the answer."""
        self.on_first: Callable[[], None] | None = None
        """Called when the first event is there and was taken."""
        self.reopen: Callable[[UpstreamError], Awaitable[HttpResponse | None]] | None = None
        """Called with an error that came in place of the first event; gives the answer to a request that avoids it."""
        self._decoder: SSEDecoder | _Opening = _Opening(self._become)
        self._take: Callable[[list[bytes]], bool]

    @property
    def skipped(self) -> str:
        """The first lines that were of no event."""
        return self._decoder.skipped.decode("utf-8", "replace")

    async def read_into(self, take: Callable[[list[bytes]], bool]) -> bool:
        """Hand over the data of all events that arrive at once, as they do, until told that this is enough for now.

        False at the end of the stream. What `take` raises comes out here.

        Raises:
            UpstreamError: after too long a silence, when the connection breaks, and for an event without end.
        """
        self._take = take
        while True:
            try:
                return await self._pour()
            except UpstreamError as error:
                has_text = self.has_begun is not None and self.has_begun()
                another = None  # text may have come in one piece with the error: it is not asked for again
                if self._is_new and not has_text and self.reopen is not None:
                    another = await self.reopen(error)
                if another is None:
                    raise
                await self._answer.body.aclose()
                self._answer, self._decoder = another, _Opening(self._become)

    async def _pour(self) -> bool:
        try:
            async with self._watchdog:
                more = await self._answer.body.read_into(self._arrived)
            return more or self._hand_over(self._decoder.end())
        except TimeoutError:
            self._hand_over(self._decoder.end())  # perhaps it is an error
            raise self._watchdog.timeout_error("" if self._has_begun else self.skipped) from None
        except EventTooLarge as error:
            raise malformed(str(error)) from None
        except httpx.HTTPError as error:
            if self._hand_over(self._decoder.end()):  # nothing of it was missing
                return True
            raise truncated(f"the connection to vLLM broke: {_why(error)}") from None

    def _arrived(self, piece: bytes) -> bool:
        events = self._decoder.feed(piece)
        if not events:
            if self._decoder.holds_json:
                self._watchdog.on_answer_start()  # a completion that is no stream, in more than one piece
            return False
        self._watchdog.on_event()
        take = self._take
        is_enough = take(events)
        if not self._has_begun:  # and no error in place of an answer
            self._begin()
        return is_enough

    def _hand_over(self, events: list[bytes]) -> bool:
        """The last events, which show only once the body has ended; whether there are any."""
        if events:
            self._take(events)
            if not self._has_begun:
                self._begin()
        return bool(events)

    def _become(self) -> SSEDecoder:
        """The answer is no web page."""
        self._decoder = decoder = SSEDecoder()
        return decoder

    def _begin(self) -> None:
        if self._is_new and self.on_first is not None:
            self.on_first()
        self._is_new = False
        if self.has_begun is None or self.has_begun():
            self._has_begun = True
            self._watchdog.on_answer_start()

    async def read_rest(self) -> None:
        """After `[DONE]`: read the end of the answer, briefly, so that the connection can serve again.

        What comes by then is handed over as before: it may be the usage.
        """

        def arrived(piece: bytes) -> bool:
            if events := self._decoder.feed(piece):
                self._take(events)
            return False

        with suppress(httpx.HTTPError, TimeoutError, EventTooLarge):
            async with asyncio.timeout(_END_OF_ANSWER):
                await self._answer.body.read_into(arrived)

    async def aclose(self) -> None:
        """Close the answer; a vLLM that is not done with it stops at once."""
        await self._answer.body.aclose()


async def open_response(
    transport: Transport, target: Target, body: Object, limits: StreamTimeouts, watchdog: StreamWatchdog
) -> HttpResponse:
    """Post a completion, and give the answer that holds its stream.

    Raises:
        UpstreamError: when there is none: no connection, or a status that is none of an answer.
    """
    try:
        async with watchdog:
            answer = await transport.post(target, to_json(body).encode(), limits.connect)
    except TimeoutError:
        raise watchdog.timeout_error() from None
    except httpx.HTTPError as error:
        raise unreachable(target.url, error) from None
    try:
        await _refuse(answer, limits)
    except BaseException:
        await answer.body.aclose()
        raise
    return answer


async def _refuse(answer: HttpResponse, limits: StreamTimeouts) -> None:
    """Raise for an answer that cannot be the stream, as far as its head tells. Its label does not: see `_Opening`."""
    if answer.status not in _ANSWERS:
        response = httpx.Response(answer.status, headers=answer.headers, stream=answer.body)
        body = await _body(response, limits, _MAX_ERROR_BYTES)
        raise from_response(answer.status, body, response.headers)
    if answer.header(b"content-encoding") not in {"", "identity"}:
        raise UpstreamError(
            "not_a_stream", "the stream is compressed, though it was asked not to be", status=200, retryable=True
        )


class _Opening:
    """Stands in for the decoder of an answer until its first byte that is not blank shows whether it is a web page.

    What else it is its label does not tell: vLLM's own proxies label a stream as JSON, and other servers a completion
    as a stream.
    """

    __slots__ = ("_become", "_held")

    holds_json = False
    skipped = b""

    def __init__(self, become: Callable[[], SSEDecoder]) -> None:
        self._become = become
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
        return self._become().feed(start)

    def end(self) -> list[bytes]:
        if self._held.startswith(b"<"):
            raise web_page(self._held)
        return []


async def _body(response: httpx.Response, limits: StreamTimeouts, most: int) -> bytes:
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


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__

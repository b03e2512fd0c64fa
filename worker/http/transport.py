"""`ResumingTransport`, for the clients of httpx and httpx2, and so for those of the SDKs that are built on them.

The two libraries have the same interface and different classes. The class of a request names its library, so only that
one is loaded. Its objects have the type `Any` here.
"""

import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import httpx

from .cursors import RepeatedCalls
from .resumable_call import ResumableCall, is_resumable

if TYPE_CHECKING:
    import httpx2

    _Inner: TypeAlias = (
        httpx.BaseTransport | httpx.AsyncBaseTransport | httpx2.BaseTransport | httpx2.AsyncBaseTransport
    )

    class _Transport(  # type: ignore[misc]  # they differ in the type that `__enter__` returns
        httpx.BaseTransport, httpx.AsyncBaseTransport, httpx2.BaseTransport, httpx2.AsyncBaseTransport
    ):
        """What the clients of both libraries accept."""
else:  # the clients check no type, so httpx2 need not be installed
    _Transport = type("_Transport", (httpx.BaseTransport, httpx.AsyncBaseTransport), {})


class ResumingTransport(_Transport):
    """Makes event streams survive a gateway that is killed, restarted or unreachable for a while.

    When a stream breaks, the transport repeats the request with a cursor, and the gateway sends the rest. So the caller
    receives every event once. These streams resume:

    - `POST …/chat/completions`. The transport adds an `Idempotency-Key`, unless the caller has set one.
    - `GET …/events` of the gateway's native API.

    Other requests, answers without a stream, and first answers that are not 2xx pass through untouched.
    """

    def __init__(self, transport: "_Inner | None" = None, *, limit: float = 60.0) -> None:
        """Make a transport for one client.

        Args:
            transport: sends the requests, with its own TLS and proxy settings. By default an `HTTPTransport` or an
                `AsyncHTTPTransport` of the client's library.
            limit: for how many seconds to try to continue a stream without receiving a byte. Then the error that broke
                the stream is raised. A first connection is tried for a sixth of that.
        """
        self._given: Any = transport
        self._limit = limit
        self._own: dict[str, Any] = {}
        self._repeated = RepeatedCalls()

    def handle_request(self, request: Any) -> Any:  # noqa: ANN401 - of either library
        library = _library_of(request)
        inner = self._given or self._own.get("sync") or self._own.setdefault("sync", library.HTTPTransport())
        if not is_resumable(request):
            return inner.handle_request(request)
        call = ResumableCall(library, request, request.read(), self._repeated, self._limit)
        while True:
            try:
                response = inner.handle_request(request)
            except library.TransportError as error:
                time.sleep(call.delay_after(error))
                continue
            if call.is_stream(response):
                response.stream = _body_class(library)(call, inner, response.stream)
            return response

    async def handle_async_request(self, request: Any) -> Any:  # noqa: ANN401
        library = _library_of(request)
        inner = self._given or self._own.get("async") or self._own.setdefault("async", library.AsyncHTTPTransport())
        if not is_resumable(request):
            return await inner.handle_async_request(request)
        call = ResumableCall(library, request, await request.aread(), self._repeated, self._limit)
        while True:
            try:
                response = await inner.handle_async_request(request)
            except library.TransportError as error:
                await anyio.sleep(call.delay_after(error))
                continue
            if call.is_stream(response):
                response.stream = _body_class(library)(call, inner, response.stream)
            return response

    def close(self) -> None:
        if inner := self._given or self._own.get("sync"):
            inner.close()

    async def aclose(self) -> None:
        if inner := self._given or self._own.get("async"):
            await inner.aclose()


class ResumedBody:
    """The body of a stream, over all the connections that it takes."""

    def __init__(self, call: ResumableCall, inner: Any, stream: Any) -> None:  # noqa: ANN401
        self._call = call
        self._inner = inner
        self._stream = stream
        """The body of the latest connection, or None after the end of a native stream."""

    def __iter__(self) -> Iterator[bytes]:
        while self._stream is not None:
            failure = self._call.ended_early()
            try:
                for data in self._stream:
                    if events := self._call.feed(data):
                        yield events
                    if self._call.cursor.is_interrupted:
                        break
            except self._call.library.TransportError as error:
                failure = error
            self._stream.close()
            if self._call.cursor.is_over:
                return
            self._reconnect(failure)

    def _reconnect(self, failure: Exception) -> None:
        retry_after = ""
        while True:
            time.sleep(self._call.delay_after(failure, retry_after))
            try:
                response = self._inner.handle_request(self._call.request)
            except self._call.library.TransportError as error:
                failure, retry_after = error, ""
                continue
            if self._call.continues_with(response):
                self._stream = None if response.status_code == 204 else response.stream
                return
            response.close()
            failure, retry_after = self._call.refusal(response), response.headers.get("Retry-After", "")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._stream is not None:
            failure = self._call.ended_early()
            try:
                async for data in self._stream:
                    if events := self._call.feed(data):
                        yield events
                    if self._call.cursor.is_interrupted:
                        break
            except self._call.library.TransportError as error:
                failure = error
            await self._stream.aclose()
            if self._call.cursor.is_over:
                return
            await self._areconnect(failure)

    async def _areconnect(self, failure: Exception) -> None:
        retry_after = ""
        while True:
            await anyio.sleep(self._call.delay_after(failure, retry_after))
            try:
                response = await self._inner.handle_async_request(self._call.request)
            except self._call.library.TransportError as error:
                failure, retry_after = error, ""
                continue
            if self._call.continues_with(response):
                self._stream = None if response.status_code == 204 else response.stream
                return
            await response.aclose()
            failure, retry_after = self._call.refusal(response), response.headers.get("Retry-After", "")

    async def aclose(self) -> None:
        if self._stream is not None:
            await self._stream.aclose()


def _library_of(request: object) -> Any:  # noqa: ANN401
    """The module httpx or httpx2, whichever has the request's class."""
    return sys.modules[type(request).__module__.partition(".")[0]]


@cache
def _body_class(library: Any) -> type[ResumedBody]:  # noqa: ANN401
    """`ResumedBody` as a stream of this library: its clients check the class."""
    return type("ResumedBody", (ResumedBody, library.SyncByteStream, library.AsyncByteStream), {})

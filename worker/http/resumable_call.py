"""One call whose answer may be a stream that resumes: which failures are worth another try, and after which time.

No I/O: the transport sends the requests. The objects of httpx and httpx2 have the type `Any`.
"""

import time
from typing import Any

from .cursors import RepeatedCalls, ResumeBackoff, StreamCursor

_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses of a gateway, or of a proxy before it, that may answer later. SDKs repeat a call after them."""


def is_resumable(request: Any) -> bool:  # noqa: ANN401 - of either library
    """Whether the answer to a request may be a stream that a gateway can continue."""
    ending = {"POST": "/chat/completions", "GET": "/events"}.get(request.method)
    path: str = request.url.path
    return ending is not None and path.endswith(ending)


class ResumableCall:
    """The request, with the headers for its next try, and the cursor of its stream."""

    def __init__(self, library: Any, request: Any, body: bytes, repeated: RepeatedCalls, limit: float) -> None:  # noqa: ANN401
        self.request = request
        self.cursor = StreamCursor(is_chat=request.method == "POST", frames=_number(request.headers.get("Relay-After")))
        self.library = library
        self._body = body
        self._repeated = repeated
        self._limit = limit
        self._backoff = ResumeBackoff(limit / 6)
        self._answer_id: str | None = None
        # The bytes that arrive here are not decompressed yet, and events are found in plain text alone.
        request.headers["Accept-Encoding"] = "identity"
        if self.cursor.is_chat and "Idempotency-Key" not in request.headers:
            retry_count = request.headers.get("x-stainless-retry-count", "")
            request.headers["Idempotency-Key"] = repeated.key_for(body, retry_count)

    def is_stream(self, first: Any) -> bool:  # noqa: ANN401
        """Whether the first answer is a stream that can resume. This call is over if it is not."""
        if first.status_code in _BUSY:
            self._remember()
        headers = first.headers
        fits = headers.get("Content-Type", "").startswith("text/event-stream")
        fits = fits and headers.get("Content-Encoding", "identity") == "identity"
        # Only the gateway names its answers. Another server would begin a new one.
        if not (fits and first.is_success and (not self.cursor.is_chat or "X-Request-Id" in headers)):
            return False
        self._answer_id = headers.get("X-Request-Id", "")
        self._backoff = ResumeBackoff(self._limit)
        return True

    def feed(self, data: bytes) -> bytes:
        """The whole events in the bytes that arrived."""
        before = self.cursor.frames
        events = self.cursor.feed(data)
        self._backoff.received(event=self.cursor.frames > before)
        return events

    def delay_after(self, error: Exception, retry_after: str = "") -> float:
        """The seconds until the next try. Raises the error if no other try can help, or the time for tries is over."""
        kinds: tuple[type[Exception], ...] = (self.library.NetworkError, self.library.RemoteProtocolError)
        if self._answer_id is not None:  # before the first answer a timeout is the caller's, who may call again
            kinds = (*kinds, self.library.TimeoutException)
        delay = self._backoff.delay(time.monotonic(), retry_after) if isinstance(error, kinds) else None
        if delay is None or getattr(error, "is_final", False):
            if self._answer_id is None:
                self._remember()
            raise error
        self.cursor.reconnected()
        self.request.headers.update(self.cursor.headers())
        return delay

    def ended_early(self) -> Exception:
        error: Exception = self.library.RemoteProtocolError(
            "the stream ended before its last event", request=self.request
        )
        return error

    def continues_with(self, response: Any) -> bool:  # noqa: ANN401
        """Whether the answer to a repetition continues the stream: it is the same answer."""
        is_same = not self.cursor.is_chat or response.headers.get("X-Request-Id", "") == self._answer_id
        return bool(response.is_success and is_same)

    def refusal(self, response: Any) -> Exception:  # noqa: ANN401
        """The error for an answer that does not continue the stream."""
        error = self.library.RemoteProtocolError(
            f"the stream broke and cannot go on: HTTP {response.status_code}", request=self.request
        )
        error.is_final = response.status_code not in _BUSY
        return error  # type: ignore[no-any-return]

    def _remember(self) -> None:
        """Keep the key for the SDK that makes this call again."""
        if self.cursor.is_chat:
            self._repeated.failed(self._body, self.request.headers["Idempotency-Key"])


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0

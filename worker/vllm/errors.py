"""What can go wrong with vLLM: one error type, and the one place that classifies what the server says."""

import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC
from email.utils import parsedate_to_datetime

import httpx
import msgspec

UNAUTHORIZED = "unauthorized"
"""The code of a server that does not take the worker's key."""

_EXCERPT = 500
_LONGEST_RETRY_AFTER = 60.0
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})
_TOO_LONG = frozenset({"input_tokens", "context_length_exceeded"})
_TOO_LONG_WORDS = ("maximum context length", "context_length_exceeded")
_POLICY = frozenset({"content_filter", "content_policy_violation"})


class UpstreamError(Exception):
    """vLLM did not give an answer, or not a whole one.

    Attributes:
        code: for programs, one of those listed in the README.
        message: for people: what the server said.
        status: the HTTP status, or the code inside an error event; 0 where there was none.
        retryable: whether the same request may succeed elsewhere or later.
        retry_after: seconds the server asked to wait, at most 60, or None.
    """

    def __init__(
        self, code: str, message: str, *, status: int = 0, retryable: bool, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.retryable = retryable
        self.retry_after = retry_after


class CannotResume(Exception):
    """A broken-off answer cannot be gone on with: the text says why."""


class NoConnection(UpstreamError):
    """There is no server to talk to: the connection is refused, or is not there in time."""


class Refused(NoConnection):
    """Nothing listens there any more. A connection that is not there in time may only wait in a full queue."""


def from_response(status: int, body: bytes, headers: Mapping[str, str]) -> UpstreamError:
    """The error of an answer whose status is not 200, or that is no stream: JSON of several shapes, or HTML."""
    error = _decoded(body)
    message = message_of(error) or _excerpt(body) or f"HTTP {status} with an empty body"
    return classify(status, message, said=_said(error), retry_after=_retry_after(headers))


def from_event(error: object) -> UpstreamError:
    """The error inside an event of a stream that began with 200: `{"error": …}`, an object or a string."""
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and code.isdecimal() and len(code) == 3:
        code = int(code)
    status = code if isinstance(code, int) else 500
    return classify(status, message_of(error) or "the server sent an error without a message", said=_said(error))


def classify(
    status: int, message: str, *, said: AbstractSet[str] = frozenset(), retry_after: float | None = None
) -> UpstreamError:
    """What a status means, and the words the server `said` beside it: whose fault it is, and whether a retry can help.

    `context_length_exceeded` may fit another model; `content_policy` is about the request, whatever the model.
    """
    code, retryable = "upstream_error", False
    if _is_context_error(message, said):
        code = "context_length_exceeded"
    elif said & _POLICY:
        code = "content_policy"
    elif status in {401, 403}:
        code, retryable = UNAUTHORIZED, True  # at a server that takes the key
    elif status == 404:
        code = "model_not_found" if "model" in message.lower() else "not_found"
    elif status == 429:
        code, retryable = "rate_limited", True
    elif status in _RETRYABLE_STATUS or status >= 500:
        code, retryable = "upstream_unavailable" if status != 500 else "upstream_error", True
    elif 400 <= status < 500:
        code = "invalid_request"
    return UpstreamError(code, message, status=status, retryable=retryable, retry_after=retry_after)


def unreachable(url: str, error: Exception) -> UpstreamError:
    """There is no connection, or it broke before an answer."""
    kind = UpstreamError
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        kind = Refused if _is_refused(error) else NoConnection
    why = str(error) or type(error).__name__
    return kind("upstream_unreachable", f"cannot reach {without_user(url)}: {why}", retryable=True)


def without_user(url: str) -> str:
    """The URL of a server without user and password: it goes to the log of the request, and of the worker."""
    scheme, _, place = url.partition("://")
    return f"{scheme}://{place.rpartition('@')[2]}"


def truncated(message: str) -> UpstreamError:
    """The stream ended before every choice had finished."""
    return UpstreamError("upstream_truncated", message, retryable=True)


def malformed(message: str) -> UpstreamError:
    """The stream holds what is no chunk of a completion."""
    return UpstreamError("upstream_malformed", message, retryable=True)


def message_of(error: object) -> str:
    """The text of an error in any shape seen: a string, `message` or `detail`, a list, or one inside `error`."""
    if isinstance(error, str):
        return error
    if isinstance(error, list):
        return msgspec.json.encode(error).decode() if error else ""
    if isinstance(error, dict):
        texts = (message_of(error.get(name)) for name in ("error", "message", "detail"))
        return next(filter(None, texts), "")
    return ""


def _is_refused(error: BaseException | None) -> bool:
    """Whether a connection was refused: by every address that was tried, of which anyio tells in a group.

    httpcore 1.0 raises its error `from None`, so that what it stands for is its context only.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_refused, error.exceptions))
    if error is None:
        return False
    return isinstance(error, ConnectionRefusedError) or _is_refused(error.__cause__ or error.__context__)


def _is_context_error(message: str, said: AbstractSet[str]) -> bool:
    return bool(said & _TOO_LONG) or any(words in message.lower() for words in _TOO_LONG_WORDS)


def _said(error: object) -> set[str]:
    """The words for programs beside a message. vLLM puts one into `param`, others into `code` or `type`."""
    inner = error.get("error", error) if isinstance(error, dict) else None
    if not isinstance(inner, dict):
        return set()
    return {word for name in ("param", "code", "type") if isinstance(word := inner.get(name), str)}


def _decoded(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _excerpt(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from now, also where the server gives a date: counted from its own `Date`, for clocks differ."""
    value = headers.get("retry-after", "")
    if value.replace(".", "", 1).isdecimal():
        return min(float(value), _LONGEST_RETRY_AFTER)
    until = _unix_time(value)
    if until is None:
        return None
    now = _unix_time(headers.get("date", ""))
    return min(max(0.0, until - (time.time() if now is None else now)), _LONGEST_RETRY_AFTER)


def _unix_time(date: str) -> float | None:
    """An HTTP date (RFC 9110, 5.6.7: always GMT, also where it does not say so), in seconds."""
    try:
        return parsedate_to_datetime(date).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None

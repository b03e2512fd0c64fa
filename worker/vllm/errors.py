"""What can go wrong with vLLM: one error type, and the one place that classifies what the server says."""

from collections.abc import Mapping

import msgspec

_EXCERPT = 500
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})


class UpstreamError(Exception):
    """vLLM did not give an answer, or not a whole one.

    Attributes:
        code: for programs, one of those listed in the README.
        message: for people: what the server said.
        status: the HTTP status, or the code inside an error event; 0 where there was none.
        retryable: whether the same request may succeed elsewhere or later.
        retry_after: seconds the server asked to wait, or None.
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


def from_response(status: int, body: bytes, headers: Mapping[str, str]) -> UpstreamError:
    """The error of an answer whose status is not 200, or that is no stream: JSON of several shapes, or HTML."""
    error = _decoded(body)
    message = message_of(error) or _excerpt(body) or f"HTTP {status} with an empty body"
    return classify(status, message, param=_param_of(error), retry_after=_retry_after(headers))


def from_event(error: object) -> UpstreamError:
    """The error inside an event of a stream that began with 200: `{"error": …}`, an object or a string."""
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and code.isdecimal() and len(code) == 3:
        code = int(code)
    status = code if isinstance(code, int) else 500
    return classify(status, message_of(error) or "the server sent an error without a message", param=_param_of(error))


def classify(status: int, message: str, *, param: str = "", retry_after: float | None = None) -> UpstreamError:
    """What a status means: whose fault it is, and whether a retry can help."""
    code, retryable = "upstream_error", False
    if _is_context_error(message, param):
        code = "context_length_exceeded"
    elif status in {401, 403}:
        code = "unauthorized"
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
    """There is no connection."""
    why = str(error) or type(error).__name__
    return UpstreamError("upstream_unreachable", f"cannot reach {without_user(url)}: {why}", retryable=True)


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


def _is_context_error(message: str, param: str) -> bool:
    lowered = message.lower()
    return param == "input_tokens" or "maximum context length" in lowered or "context_length_exceeded" in lowered


def _param_of(error: object) -> str:
    inner = error.get("error", error) if isinstance(error, dict) else None
    param = inner.get("param") if isinstance(inner, dict) else None
    return param if isinstance(param, str) else ""


def _decoded(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _excerpt(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds; the form that is a date is passed over, as the backoff serves then."""
    value = headers.get("retry-after", "")
    return float(value) if value.replace(".", "", 1).isdecimal() else None

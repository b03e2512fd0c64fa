"""The errors of vLLM servers: one exception type, and the only classification of servers' errors. No I/O."""

import re
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC
from email.utils import parsedate_to_datetime

import httpx

from .error_bodies import (
    as_json,
    decoded,
    excerpt,
    is_no_error,
    is_page,
    message_of,
    status_of,
    text_of_page,
    words_of,
)

MODEL_NOT_FOUND = "model_not_found"
UNAUTHORIZED = "unauthorized"
"""The code when a server refuses the worker's key."""

_LONGEST_RETRY_AFTER = 60.0
_RETRYABLE_STATUS = frozenset({408, 409, 421, 424, 425, 429, 499})
_SETUP_STATUS = frozenset({*range(300, 400), 402, 405, 407, 426})
"""Statuses of a server whose account, route or proxy is misconfigured. Every request fails there."""
TOO_LARGE_STATUS = frozenset({413, 414, 431})
"""Statuses by which a proxy refuses a request that exceeds a limit of its own."""
_NO_ROUTE = re.compile(
    r"""
      \W* | (404\W*)?((page|path|file|route|endpoint|url)\ )?(not\ found)?\W*  # FastAPI, Go, llama.cpp, Axum
    | cannot\ (get|post)\ .*                                   # Express
    | .*\b(no\ (matching\ )?route|default\ backend)\b.*         # Kong, Envoy, Kubernetes
    | .*\b(invalid|unknown)\ (request\ )?url\b.*                # OpenAI
    | .*/chat/completions.*
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
"""Matches the whole message of a 404 that concerns the route, and not the request."""
_TOO_LONG = frozenset({"input_tokens", "context_length_exceeded", "exceed_context_size_error"})
_TOO_LONG_WORDS = re.compile(
    r"""
      maximum\ context\ length | context_length_exceeded                           # vLLM, OpenAI
    | model's\ context\ length\ is\ only                                          # vLLM
    | longer\ than\ the\ maximum\ model\ length | too\ long\ to\ fit\ into\ the\ model  # vLLM, multimodal
    | longer\ than\ the\ model's\ context\ length                                # SGLang
    | input\ length\ exceeds\ (the\ )?(maximum\ )?context\ length                 # Ollama
    | input\ length\ .{1,40}\ exceeds\ the\ maximum\ allowed\ length
    | exceeds\ the\ available\ context\ size                                     # llama.cpp
    | `inputs`\ must\ have\ less\ than                                           # TGI
    | `inputs`\ tokens\ \+\ `max_new_tokens`\ must\ be\ <=
    | prompt\ length\ .{1,80}\ exceeds?\ (the\ )?max(imum\ (input|sequence)\ length|_num_tokens)  # TensorRT-LLM
    | greater\ than\ the\ context\ length                                        # LM Studio
    | exceeds\ the\ context\ window | ContextWindowExceeded                      # OpenAI, LiteLLM
    | prompt\ is\ too\ long:\ \d+\ tokens                                         # Anthropic
    | input\ is\ too\ long\ for\ (the\ )?requested\ model                        # Bedrock
    | input\ token\ count\ .{1,40}\ exceeds\ the\ maximum\ number\ of\ tokens     # Gemini
    | maximum\ prompt\ length\ is                                                # xAI
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Matches the messages of servers about a prompt that is too long for the model."""
_NO_MODEL = frozenset({MODEL_NOT_FOUND, "model_decommissioned", "DeploymentNotFound"})
_NO_MODEL_WORDS = re.compile(
    r"""
      \bmodel\ ([`'"]?[^\s`'"]{1,200}[`'"]?\ )?(does\ not\ exist|(is\ )?not\ found)   # vLLM and its router, Ollama
    | \binvalid\ model\ name\b                                                     # LiteLLM
    | \b(unknown|no\ such)\ model\b | \binvalid\ model: | \bmodel\ not\ exist\b      # Mistral, DeepSeek
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Matches the messages of servers that do not have a model, with any status."""
_A_MODEL = re.compile(r"(?<![\w/.?&-])models?(?![\w-]|\.\w)", re.IGNORECASE)
"""Matches the word "model", except in a URL, such as the URL of an image that was not found."""
_NO_TLS = "the server does not speak TLS there: its URL begins with http://"
_FIXES = (
    ("Hostname mismatch", "set VLLM_URLS to the host name in the server's certificate"),
    ("IP address mismatch", "set VLLM_URLS to the host name in the server's certificate"),
    ("certificate has expired", "renew the server's certificate"),
    ("CERTIFICATE_VERIFY_FAILED", "set SSL_CERT_FILE to a PEM file with the certificate of the server's authority"),
    ("WRONG_VERSION_NUMBER", _NO_TLS),
    ("RECORD_LAYER_FAILURE", _NO_TLS),  # the same error in OpenSSL 3.2
    ("HTTP_REQUEST", _NO_TLS),
    (
        "closed the connection in the TLS handshake",
        "if the server does not speak TLS there, its URL begins with http://",
    ),
)
"""Fixes of failed TLS connections, by words in the error message. The first match counts."""
_MAY_SPEAK_TLS = "if the server speaks TLS, its URL begins with https://"
_CUT_OFF = ("the server closed the connection", "Connection reset by peer")
"""The errors of a request without TLS to a server that requires TLS."""
_WANTS_TLS = re.compile(r"HTTP request (was sent )?to (an )?HTTPS (port|server)|plain HTTP to an SSL", re.IGNORECASE)
"""Matches the responses of nginx, Go and Apache to a request without TLS, with status 400."""
_NO_VLLM = "check that VLLM_URLS is the URL of a vLLM server"
_STATUS_OF_A_SITE = frozenset({403, 404, 405, 501})
"""Statuses of a web page that comes from another site, and not from a proxy whose vLLM server is down."""
_POLICY = frozenset({"content_filter", "content_policy_violation"})
_BUSY_STATUS = frozenset({429, 503, 529})
"""Statuses of a server that is full. 529 is Anthropic's."""
_BUSY_WORDS = re.compile(
    r"""
      \b(model|server|engine)\ is\ (currently\ )?(overloaded|busy|at\ capacity)\b  # TGI, vLLM
    | \bprefill\ token\ backlog\ limit\b                                           # vLLM
    | \b(request\ )?queue\ is\ full\b | \bmaximum\ queue\ size\b                   # SGLang, Triton
    | \bserver\ (is\ )?busy\b | \bmaximum\ pending\ requests\b                     # Ollama
    | \btoo\ many\ (concurrent\ )?requests\b | \bno\ slots?\ available\b           # proxies, llama.cpp
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Matches the messages of servers that are full, with any status of an error that is worth a retry."""
_DRAINING_WORDS = re.compile(
    r"([\w.]+: ){0,3}cannot schedule new futures after (interpreter )?shutdown\W*", re.IGNORECASE
)
"""Matches the error of vLLM 0.32.0 between SIGTERM and its end, with status 500. Its `/health` still answers 200.

It is the whole message: a message that quotes the request may hold these words too.
"""
_NOT_FULL_WORDS = re.compile(
    r"""
      \brequest\ failed;\ please\ retry\b              # vLLM's RetryableRequestError: the request failed inside it
    | \bdisconnect/reset\ before\ headers\b.*(termination|remote\ reset)  # Envoy: the server has died
    | \bexceeded\ your\ current\ quota\b | \bcredit\ balance\b           # OpenAI, Anthropic: nothing is paid
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Matches the messages of servers with a status of `_BUSY_STATUS` that are not full: a wait alone does not help."""
_NOT_FULL = frozenset({"insufficient_quota", "billing_error", "billing_hard_limit_reached"})
_QUOTED = re.compile(r"""'.*'|".*"|`.*`""", re.DOTALL)
_LONGEST_BUSY_MESSAGE = 200
"""Characters. A longer message with a status that does not say that the server is full may quote the request."""


class UpstreamError(Exception):
    """A vLLM server gave no answer, or an incomplete one.

    Attributes:
        code: for programs, one of the codes in the documentation of the contract.
        message: for people: the server's message, and the fix.
        status: the HTTP status, or the code inside an error event; 0 if there was none.
        retryable: whether the same request may succeed at another server, or later.
        elsewhere: whether this server can never answer the request and another may: this one lacks the model, or is
            misconfigured.
        retry_after: how many seconds the server asks the worker to wait, at most 60; None if it does not ask.
        is_busy: whether the server refused the request because it is full or shutting down, before an answer began.
        is_draining: whether the server refused the request because it is shutting down. It is busy too.
        words: words for programs that accompany the message, such as the parameter that the server refuses.
        fix: how to fix the error, if that is known.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int = 0,
        retryable: bool,
        elsewhere: bool = False,
        retry_after: float | None = None,
        words: AbstractSet[str] = frozenset(),
        fix: str = "",
    ) -> None:
        self.code = code
        self.message = f"{message}; {fix}" if fix else message
        super().__init__(self.message)
        self.status = status
        self.retryable = retryable
        self.elsewhere = elsewhere
        self.retry_after = retry_after
        self.is_busy = False
        self.is_draining = False
        self.words = words
        self.fix = fix


class CannotResume(Exception):
    """An interrupted answer cannot be resumed. The message is the reason."""


class NoConnection(UpstreamError):
    """The server cannot be reached: the connection is refused, or not made in time."""


class ConnectionRefused(NoConnection):
    """No server listens at the address. A connection that is not made in time may instead wait in a full queue."""


def from_response(status: int, body: bytes, headers: Mapping[str, str]) -> UpstreamError:
    """The error in a response whose status is not a success: JSON of several shapes, or HTML.

    A redirect is reported and not followed, since only the settings may choose a server.
    """
    error = decoded(body)
    message = message_of(error) or excerpt(body) or f"HTTP {status} with an empty body"
    if 300 <= status < 400 and (location := headers.get("location")):
        place = excerpt(without_user(location).partition("?")[0])
        message = f"HTTP {status}: the server redirects to {place}, which is not followed"
        return UpstreamError(
            "upstream_error", message, status=status, retryable=False, elsewhere=True,
            fix="set VLLM_URLS to the server's own URL",
        )  # fmt: skip
    if status == 400 and _WANTS_TLS.search(message):
        message = text_of_page(body) if is_page(body) else message
        fix = "the server speaks TLS: its URL begins with https://"
        return UpstreamError("not_a_stream", message, status=status, retryable=False, elsewhere=True, fix=fix)
    if is_page(body):
        return _page_with_status(status, body, headers)
    found = classify(status, message, words=words_of(error), retry_after=_retry_after(headers))
    if found.code == "not_found" and (not body.strip() or _NO_ROUTE.fullmatch(message)):
        found.elsewhere = True
    return found


def _page_with_status(status: int, page: bytes, headers: Mapping[str, str]) -> UpstreamError:
    """The error for a web page, from a proxy or from a site that is not vLLM. Only the status is used."""
    found = classify(status, "", retry_after=_retry_after(headers))
    is_setup = found.code == "invalid_request" and status not in TOO_LARGE_STATUS
    error = UpstreamError(
        "not_a_stream" if is_setup else found.code,
        f"HTTP {status}: a web page came instead of an answer: {text_of_page(page)}",
        status=status, retryable=found.retryable, elsewhere=found.elsewhere or is_setup or status == 404,
        retry_after=found.retry_after, fix=_NO_VLLM if is_setup or status in _STATUS_OF_A_SITE else "",
    )  # fmt: skip
    error.is_busy = found.is_busy
    return error


def from_event(error: object) -> UpstreamError:
    """The error inside a stream that began with status 200: an event, or the value of its field `error`."""
    message = message_of(error)
    if not message:
        message = "the server sent an error without a message"
        message += "" if is_no_error(error) else f": {excerpt(as_json(error))}"
    return classify(status_of(error), message, words=words_of(error))


def classify(
    status: int, message: str, *, words: AbstractSet[str] = frozenset(), retry_after: float | None = None
) -> UpstreamError:
    """The error for a status, a message and words for programs, with its code and whether a retry may help.

    A prompt that is too long may fit another model. A request with `content_policy` fails for every model.
    """
    code, retryable, elsewhere = "upstream_error", False, False
    if _is_context_error(message, words):
        code = "context_length_exceeded"
    elif words & _POLICY:
        code = "content_policy"
    elif _is_model_error(status, message, words):
        code, elsewhere = MODEL_NOT_FOUND, True
    elif status in {401, 403}:
        code, retryable = UNAUTHORIZED, True  # another server may accept the key
    elif status == 404:
        code = "not_found"
    elif status in _RETRYABLE_STATUS or status >= 500:
        code, retryable = {429: "rate_limited", 500: "upstream_error"}.get(status, "upstream_unavailable"), True
    elif status in _SETUP_STATUS:
        elsewhere = True
    elif 400 <= status < 500:
        code, elsewhere = "invalid_request", status in TOO_LARGE_STATUS
    elif 200 <= status < 300:  # such as 204: an empty body instead of an answer
        code, retryable = "not_a_stream", True
    error = UpstreamError(
        code, message, status=status, retryable=retryable, elsewhere=elsewhere, retry_after=retry_after, words=words
    )
    error.is_draining = retryable and _DRAINING_WORDS.fullmatch(message) is not None
    error.is_busy = error.is_draining or (retryable and _is_full(status, message, words))
    return error


def unreachable(url: str, error: Exception, *, is_probe: bool = False) -> UpstreamError:
    """The error for a connection that was not made, or that broke before a response.

    If the server closes the connection of a probe, it may require TLS. A chat request is sent after a probe: if its
    connection is closed, the server is more likely shutting down.
    """
    kind = UpstreamError
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        kind = ConnectionRefused if _is_refused(error) else NoConnection
    why = str(error) or type(error).__name__
    fix = next((fix for part, fix in _FIXES if part in why), "")
    if is_probe and not fix and url.startswith("http://") and any(text in why for text in _CUT_OFF):
        fix = _MAY_SPEAK_TLS
    return kind("upstream_unreachable", f"cannot reach {without_user(url)}: {why}", retryable=True, fix=fix)


def without_user(url: str) -> str:
    """The URL of a server without user and password, for logs and error messages."""
    scheme, mark, place = url.partition("://")
    return f"{scheme}{mark}{place.rpartition('@')[2]}" if mark else url.rpartition("@")[2]


def truncated(message: str) -> UpstreamError:
    """The error for a stream that ended before every choice had finished."""
    return UpstreamError("upstream_truncated", message, retryable=True)


def web_page(page: bytes, *, retryable: bool = True) -> UpstreamError:
    """The error for a web page instead of a stream or a list, with status 200."""
    message = f"a web page came instead of an answer: {text_of_page(page)}"
    return UpstreamError("not_a_stream", message, status=200, retryable=retryable, fix=_NO_VLLM)


def malformed(message: str) -> UpstreamError:
    """The error for a stream that contains something other than chunks of a completion."""
    return UpstreamError("upstream_malformed", message, retryable=True)


def _is_refused(error: BaseException | None) -> bool:
    """Whether every address that was tried refused the connection. anyio raises their errors as a group.

    httpcore 1.0 raises its error `from None`, so the original error is only in its context.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_refused, error.exceptions))
    if error is None:
        return False
    return isinstance(error, ConnectionRefusedError) or _is_refused(error.__cause__ or error.__context__)


def _is_context_error(message: str, words: AbstractSet[str]) -> bool:
    return bool(words & _TOO_LONG) or _TOO_LONG_WORDS.search(message) is not None


def _is_full(status: int, message: str, words: AbstractSet[str]) -> bool:
    """Whether a server refused a request because it is full. A wait then helps, without any end but the deadline."""
    if status in {401, 403} or words & _NOT_FULL or _NOT_FULL_WORDS.search(message):
        return False
    if status in _BUSY_STATUS or "overloaded_error" in words:
        return True
    return len(message) <= _LONGEST_BUSY_MESSAGE and _BUSY_WORDS.search(_QUOTED.sub("", message)) is not None


def _is_model_error(status: int, message: str, words: AbstractSet[str]) -> bool:
    if words & _NO_MODEL or (status == 404 and _A_MODEL.search(message)):
        return True
    return status in {400, 422} and _NO_MODEL_WORDS.search(message) is not None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds from now. A date is compared with the server's own `Date`, since clocks differ."""
    value = headers.get("retry-after", "")
    if value.replace(".", "", 1).isdecimal():
        return min(float(value), _LONGEST_RETRY_AFTER)
    until = _unix_time(value)
    if until is None:
        return None
    now = _unix_time(headers.get("date", ""))
    return min(max(0.0, until - (time.time() if now is None else now)), _LONGEST_RETRY_AFTER)


def _unix_time(date: str) -> float | None:
    """An HTTP date in Unix seconds. It is always GMT, even if the header has no time zone (RFC 9110, 5.6.7)."""
    try:
        return parsedate_to_datetime(date).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None

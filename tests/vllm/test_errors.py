"""The classification of errors: those of a real vLLM, and the shapes of other servers and of proxies."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.error_bodies import message_of
from worker.vllm.errors import (
    ConnectionRefused,
    NoConnection,
    UpstreamError,
    classify,
    from_event,
    from_response,
    malformed,
    truncated,
    unreachable,
)

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"
INDEX: dict[str, dict[str, Any]] = json.loads((TRANSCRIPTS / "index.json").read_bytes())
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def summary(error: UpstreamError) -> tuple[str, int, bool]:
    return error.code, error.status, error.retryable


def from_body(status: int, body: object, **headers: str) -> UpstreamError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return from_response(status, raw, httpx.Headers({name.replace("_", "-"): text for name, text in headers.items()}))


@pytest.mark.parametrize(
    ("name", "code", "retryable", "message"),
    [
        ("error_404_model", "model_not_found", False, "The model `nope` does not exist. Valid aliases: reciter."),
        ("error_400_context", "context_length_exceeded", False, "This model's maximum context length is 4096 tokens."),
        ("error_400_params", "invalid_request", False, "temperature must be non-negative, got -3.0."),
        ("error_400_max_tokens", "invalid_request", False, "max_tokens=100000 cannot be greater than max_model_len"),
        ("error_400_messages", "invalid_request", False, "1 validation error:\n  {'type': 'list_type'"),
        ("error_401_auth", "unauthorized", True, "Unauthorized"),
        ("error_500_engine_dead", "upstream_error", True, DEAD),
    ],
)
def test_a_recorded_refusal_is_an_error_with_its_message(name: str, code: str, retryable: bool, message: str) -> None:  # noqa: FBT001
    error = from_response(INDEX[name]["status"], (TRANSCRIPTS / f"{name}.body").read_bytes(), {})
    assert summary(error) == (code, INDEX[name]["status"], retryable)
    assert error.message.startswith(message)
    assert str(error) == error.message


@pytest.mark.parametrize(
    ("name", "code", "status", "retryable", "message"),
    [
        ("error_400_top_logprobs", "invalid_request", 400, False, "Requested sample logprobs of 500"),
        ("engine_death_mid_stream", "upstream_error", 500, True, DEAD),
    ],
)
def test_a_recorded_error_under_status_200_is_classified_by_its_own_code(
    name: str,
    code: str,
    status: int,
    retryable: bool,  # noqa: FBT001
    message: str,
) -> None:
    body = (TRANSCRIPTS / f"{name}.body").read_bytes()
    events = [json.loads(event[6:]) for event in body.split(b"\n\n") if event.startswith(b'data: {"error"')]
    error = from_event(events[0]["error"])
    assert summary(error) == (code, status, retryable)
    assert error.message.startswith(message)


def test_every_recorded_error_is_in_these_tables() -> None:
    assert {name for name in INDEX if name.startswith("error_")} == {
        "error_400_context",
        "error_400_max_tokens",
        "error_400_messages",
        "error_400_params",
        "error_400_top_logprobs",
        "error_401_auth",
        "error_404_model",
        "error_500_engine_dead",
    }


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (302, "upstream_error", False),
        (400, "invalid_request", False),
        (401, "unauthorized", True),
        (403, "unauthorized", True),
        (404, "not_found", False),
        (405, "upstream_error", False),
        (408, "upstream_unavailable", True),
        (409, "upstream_unavailable", True),
        (413, "invalid_request", False),
        (422, "invalid_request", False),
        (425, "upstream_unavailable", True),
        (429, "rate_limited", True),
        (500, "upstream_error", True),
        (502, "upstream_unavailable", True),
        (503, "upstream_unavailable", True),
        (504, "upstream_unavailable", True),
        (529, "upstream_unavailable", True),
    ],
)
def test_each_status_has_a_code(status: int, code: str, retryable: bool) -> None:  # noqa: FBT001
    assert summary(classify(status, "something")) == (code, status, retryable)
    assert summary(from_event({"code": status, "message": "something"})) == (code, status, retryable)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "busy"}, "busy"),
        ("busy", "busy"),
        ({"error": {"message": "busy"}}, "busy"),
        ({"error": {"error": {"detail": "busy"}}}, "busy"),
        ({"message": "busy"}, "busy"),
        ({"object": "error", "message": "busy", "code": 400}, "busy"),
        ({"detail": "busy"}, "busy"),
        ({"detail": [{"loc": ["body", "x"], "msg": "no"}]}, '[{"loc":["body","x"],"msg":"no"}]'),
        ({"error": {"message": None, "detail": "busy"}}, "busy"),
        ({"error": "", "message": "busy"}, "busy"),
        ({"error": {}}, '{"error": {}}'),
        ({"reason": "busy"}, '{"reason": "busy"}'),
        ([], "[]"),
        (17, "17"),
        (b"busy, come  again\n", "busy, come again"),
        (b"\xff busy", "\ufffd busy"),
        (b"", "HTTP 422 with an empty body"),
        (b" \n", "HTTP 422 with an empty body"),
        (b"{not json", "{not json"),
    ],
)
def test_the_message_is_found_in_each_shape_of_body(body: object, message: str) -> None:
    assert from_body(422, body).message == message


def test_a_web_page_of_a_proxy_is_quoted_in_short() -> None:
    page = b"<html>\n<head><title>502 Bad Gateway</title></head>\n<body>" + b"<hr>" * 500 + b"</body></html>"
    error = from_body(502, page)
    assert summary(error) == ("upstream_unavailable", 502, True)
    assert error.message == "HTTP 502: a web page came instead of an answer: 502 Bad Gateway"
    untitled = from_body(502, b"<html>" + b"<p>away</p>" * 500)
    assert untitled.message.endswith("away away away")
    assert len(untitled.message) < 300


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"error":' * 100_000, b'{"error":' * 400 + b"1" + b"}" * 400])
def test_a_deeply_nested_body_is_an_error_like_others(body: bytes) -> None:
    assert summary(from_body(500, body)) == ("upstream_error", 500, True)


@pytest.mark.parametrize(
    ("start", "end"), [(b'{"error":', b"}"), (b'{"a":', b"}"), (b"[", b"]"), (b'{"choices":[],"error_code":[', b"]}")]
)
def test_an_error_as_deep_as_can_be_decoded_is_an_error_like_others(start: bytes, end: bytes) -> None:
    for depth in range(300, 1100, 3):
        body = start * depth + b"1" + end * depth
        assert from_response(500, body, {}).code == "upstream_error"
        with suppress(UpstreamError):
            ChunkParser().parse(body)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "too long", "param": "input_tokens", "code": 400}},
        {"error": {"message": "This model's maximum context length is 8192 tokens. However …"}},
        {"message": "too long", "param": "input_tokens"},
        {"detail": "code: context_length_exceeded"},
        {"error": {"message": "too long", "code": "context_length_exceeded"}},
    ],
)
def test_a_prompt_that_is_too_long_has_a_code_of_its_own(body: object) -> None:
    assert summary(from_body(400, body)) == ("context_length_exceeded", 400, False)


@pytest.mark.parametrize(
    "error",
    [
        {"message": "no", "type": "invalid_request_error", "code": "content_policy_violation"},
        {"message": "no", "param": "prompt", "code": "content_filter", "status": 400},
        {"message": "no", "type": "content_filter", "code": None},
    ],
)
def test_a_refusal_by_content_policy_has_a_code_of_its_own_and_is_not_retried(error: object) -> None:
    assert summary(from_body(400, {"error": error})) == ("content_policy", 400, False)
    assert (from_event(error).code, from_event(error).retryable) == ("content_policy", False)


def test_a_failure_to_connect_differs_from_a_connection_that_breaks() -> None:
    absent = [unreachable("http://a:1", error("no")) for error in (httpx.ConnectError, httpx.ConnectTimeout)]
    silent = [unreachable("http://a:1", error("no")) for error in (httpx.ReadError, httpx.RemoteProtocolError)]
    assert {summary(error) for error in absent + silent} == {("upstream_unreachable", 0, True)}
    assert [isinstance(error, NoConnection) for error in absent + silent] == [True, True, False, False]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("causes", "refused"),
    [
        ([ConnectionRefusedError()], True),
        ([ConnectionRefusedError(), ConnectionRefusedError()], True),
        ([ConnectionRefusedError(), TimeoutError()], False),
        ([OSError("no such host")], False),
    ],
)
def test_a_connection_is_refused_when_every_address_refuses_it(causes: list[Exception], *, refused: bool) -> None:
    cause = causes[0] if len(causes) == 1 else ExceptionGroup("tried", causes)
    error = unreachable("http://a:1", caused(httpx.ConnectError("no"), caused(OSError("all failed"), cause)))
    assert (isinstance(error, NoConnection), isinstance(error, ConnectionRefused)) == (True, refused)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("0", 0.0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("86400", 60.0),
        ("9" * 400, 60.0),
        ("Wed, 21 Oct 2026 07:28:07 GMT", 7.0),
        ("Wednesday, 21-Oct-26 07:28:07 GMT", 7.0),
        ("Wed Oct 21 07:28:07 2026", 7.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 60.0),
        ("Wed, 21 Oct 20269 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_in_seconds_and_limited(value: str, seconds: float | None) -> None:
    headers = {"Retry_After": value, "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}
    assert from_body(429, {"error": "busy"}, **headers).retry_after == seconds


@pytest.mark.parametrize(("year", "seconds"), [(1999, 0.0), (2199, 60.0)])
def test_a_retry_after_date_needs_no_date_header(year: int, seconds: float) -> None:
    value = f"Fri, 31 Dec {year} 23:59:59 GMT"
    assert from_body(429, {"error": "busy"}, Retry_After=value, Date="today").retry_after == seconds


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, {"error": "slow down"}),
        (503, {"error": {"message": "The engine is currently busy and cannot accept new requests.", "code": 503}}),
        (503, "no healthy upstream"),
        (503, "<html><title>503 Service Temporarily Unavailable</title></html>"),
        (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
        (500, {"error": "Model is overloaded", "error_type": "overloaded"}),
        (500, {"error": {"message": "The request queue is full."}}),
        (502, {"error": "server busy, please try again.  maximum pending requests exceeded"}),
        (500, {"error": {"message": "cannot schedule new futures after shutdown", "code": 500}}),
        (500, {"error": {"message": "litellm.InternalServerError: cannot schedule new futures after shutdown"}}),
        (429, {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}),
        (503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}),
    ],
)
def test_a_full_server_is_busy(status: int, body: object) -> None:
    error = from_body(status, body)
    assert (error.is_busy, error.retryable) == (True, True)
    assert error.is_draining == ("cannot schedule" in str(error))


def test_a_refusal_by_a_full_vllm_may_come_within_a_stream() -> None:
    """A vLLM 0.32.0 answers 200, and sends an event: more often than a 503 if many requests come at once."""
    message = "The engine is currently busy and cannot accept new requests. Please try again later."
    assert from_event({"error": {"message": message, "type": "Service Unavailable", "code": 503}}).is_busy


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": "the model is overloaded with tools"}),
        (401, {"error": "too many requests with a wrong key"}),
        (500, {"error": "the engine is dead"}),
        (502, "<html><title>Bad gateway</title></html>"),
        (503, {"error": {"message": "Request failed; please retry"}}),
        # The account has no money left: no wait helps.
        (429, {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": None}}),
        (429, {"error": {"message": "litellm.RateLimitError: You exceeded your current quota"}}),
        (429, {"error": {"message": "Your credit balance is too low"}}),
        # The server behind a proxy has died, perhaps of this request.
        (503, "upstream connect error or disconnect/reset before headers. reset reason: connection termination"),
        (503, "upstream connect error or disconnect/reset before headers. reset reason: remote reset"),
        # The words are those of the request, which the server quotes.
        (500, {"error": {"message": "unexpected token in 'the server is busy': position 3"}}),
        (500, {"error": {"message": 'bad template for "cannot schedule new futures after shutdown"'}}),
        (500, {"error": {"message": f"error in template of: {'Once upon a time. ' * 9} the server is busy"}}),
        (500, {"error": {"message": "Who wrote: cannot schedule new futures after shutdown? I forgot."}}),
    ],
)
def test_a_server_that_refuses_or_fails_is_not_busy(status: int, body: object) -> None:
    assert not from_body(status, body).is_busy


def test_without_retry_after_there_is_none() -> None:
    assert from_body(503, {"error": "busy"}).retry_after is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("busy", 500),
        ({"message": "busy"}, 500),
        ({"message": "busy", "code": None}, 500),
        ({"message": "busy", "code": "server_error"}, 500),
        ({"message": "busy", "code": 503}, 503),
        ({"message": "busy", "code": "503"}, 503),
        ({"message": "busy", "code": "5" * 5000}, 500),
        ({"message": "busy", "code": "٥٠٣"}, 503),
    ],
)
def test_the_code_of_an_event_is_its_status(error: object, status: int) -> None:
    assert (from_event(error).status, from_event(error).message) == (status, "busy")


def test_an_error_event_without_a_message_gets_one() -> None:
    errors: list[object] = [None, {}, [], 7, {"code": 500}, {"message": {}}]
    for error in errors:
        assert from_event(error).message.startswith("the server sent an error without a message")
        assert message_of(error) == ""


def test_a_stream_that_breaks_is_a_retryable_error() -> None:
    assert summary(truncated("cut")) == ("upstream_truncated", 0, True)
    assert summary(malformed("odd")) == ("upstream_malformed", 0, True)

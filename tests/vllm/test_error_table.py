"""The errors of servers and how each is classified, as a table.

A new error is a new line: the status and the body as the server sends them, the code in the log, whether the request is
retried, and words of its message.
"""

import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from raw_server import sending

from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.http.connection import HttpResponse
from worker.vllm.servers.pool import ServerPool
from worker.vllm.servers.server import counts_against_server
from worker.vllm.stream.chat_stream import ChatStream
from worker.vllm.stream.sse import SSEDecoder
from worker.vllm.stream.watchdog import StreamTimeouts, StreamWatchdog

M = "top_k is too large"
AGAIN, ONCE = True, False
WEB_PAGE = (
    f"<!doctype html><html lang=en><head><title>Sorry &amp;\n no</title></head><body>{'<p>…</p>' * 99}</body></html>"
)
WANTS_TLS = "the server speaks TLS: its URL begins with https://"


def event(data: object) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def chunk(delta: object, finish_reason: str | None = None, **more: object) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"}
    return event(head | {"choices": [choice]} | more)


ROLE = chunk({"role": "assistant", "content": ""})
DONE = "data: [DONE]\n\n"

TABLE: list[tuple[int, str, str, bool, str]] = [
    # Errors under status 200: where the code stands, and how it is written.
    (200, event({"error": {"message": M, "code": 400}}), "invalid_request", ONCE, M),
    (200, ROLE + event({"error": {"message": M, "code": 400}}) + DONE, "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "code": 400.0}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "code": "400"}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "status": 400}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "status_code": 422}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "http_status_code": 422}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "error_code": "503"}}), "upstream_unavailable", AGAIN, M),
    (200, event({"error": M, "code": 400}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M}, "status_code": 429}), "rate_limited", AGAIN, M),
    (200, event({"error": {"error": {"message": M, "code": 400}}}), "invalid_request", ONCE, M),
    (200, event({"error": {"error": {"message": M, "code": 400}, "code": 500}}), "invalid_request", ONCE, M),
    (200, event({"error": {"code": "internal", "detail": {"message": M, "status": 400}}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "code": 40003}}), "upstream_error", AGAIN, M),
    # The name of its type stands for the code.
    (200, event({"error": M, "error_type": "validation"}), "invalid_request", ONCE, M),
    (200, event({"error": M, "error_type": "overloaded"}), "upstream_unavailable", AGAIN, M),
    (200, event({"error": M, "error_type": "generation"}), "upstream_error", AGAIN, M),
    (200, event({"error": {"message": M, "type": "BadRequestError", "code": None}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "type": "invalid_request_error"}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "type": "UnprocessableEntityError"}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "code": "rate_limit_exceeded"}}), "rate_limited", AGAIN, M),
    (200, event({"error": {"message": M, "type": "RateLimitError"}}), "rate_limited", AGAIN, M),
    (200, event({"error": {"message": M, "type": "AuthenticationError"}}), "unauthorized", AGAIN, M),
    (200, event({"error": {"message": M, "code": "model_not_found"}}), "model_not_found", ONCE, M),
    (200, event({"error": {"message": M, "type": "InternalServerError"}}), "upstream_error", AGAIN, M),
    (200, event({"error": {"message": M, "type": "ServiceUnavailableError"}}), "upstream_unavailable", AGAIN, M),
    (200, event({"error": {"message": M, "code": 400, "status": "INVALID_ARGUMENT"}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "type": "content_filter"}}), "content_policy", ONCE, M),
    (200, event({"error": {"message": M, "type": "invalid_request_error", "code": "invalid_api_key"}}),
     "unauthorized", AGAIN, M),
    (200, event({"error": {"message": M, "type": "invalid_request_error", "code": "rate_limit_exceeded"}}),
     "rate_limited", AGAIN, M),
    # Other places and shapes.
    (200, event({"choices": None, "error_type": "BadRequestError", "error_message": M}), "invalid_request", ONCE, M),
    (200, event({"choices": [], "error_code": 503, "error_msg": M}), "upstream_unavailable", AGAIN, M),
    (200, event({"object": "error", "message": M, "type": "BadRequestError"}), "invalid_request", ONCE, M),
    (200, event({"type": "error", "code": "400", "message": M}), "invalid_request", ONCE, M),
    (200, event({"type": "error", "error": {"type": "overloaded_error", "message": M}}),
     "upstream_unavailable", AGAIN, M),
    (200, event({"code": 400, "message": M}), "invalid_request", ONCE, M),
    (200, event({"code": "InvalidParameter", "message": M, "request_id": "7"}), "invalid_request", ONCE, M),
    (200, event({"status": "error", "message": M}), "upstream_error", AGAIN, M),
    (200, event({"status": 503, "text": M}), "upstream_unavailable", AGAIN, M),
    (200, event([{"error": {"code": 400, "message": M, "status": "INVALID_ARGUMENT"}}]), "invalid_request", ONCE, M),
    (200, chunk({"content": ""}, "error", choices=[{"error": {"code": 502, "message": M}, "finish_reason": "error"}]),
     "upstream_unavailable", AGAIN, M),
    (200, chunk({"error": {"code": 400, "message": M}}, "error"), "invalid_request", ONCE, M),
    (200, ROLE + chunk({"content": "", "error": M}), "upstream_error", AGAIN, M),
    (200, chunk({}, choices=[{"delta": {"content": "a"}, "error": {"code": 400, "message": M}}]),
     "invalid_request", ONCE, M),
    (200, chunk({"content": "a"}, error={"code": 400, "message": M}) + DONE, "invalid_request", ONCE, M),
    (200, chunk({"content": "a"}) + DONE + event({"error": {"code": 400, "message": M}}), "invalid_request", ONCE, M),
    (200, DONE + "event: error\n" + event({"code": 400, "message": M}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": {"top_k": [M]}, "status": 400}}), "invalid_request", ONCE, M),
    (200, event({"error": {"message": M, "code": 400}, "choices": {}}), "invalid_request", ONCE, M),
    # What Python prints.
    (200, event("{'error': {'message': '" + M + "', 'code': 400}}"), "invalid_request", ONCE, M),
    (200, event("{'error': {\"message\": {\"top_k\": \"" + M + '"}, "param": null, "status": 400}}'),
     "invalid_request", ONCE, M),
    (200, event(f"{{'error': ValueError('{M}')}}"), "upstream_malformed", AGAIN, M),
    # Other fields of server-sent events, and none.
    (200, "event: error\n" + event({"message": M, "code": 400}), "invalid_request", ONCE, M),
    (200, "event: error\n" + event({"error": {"message": M, "code": 400}}), "invalid_request", ONCE, M),
    (200, "event: error\n" + event(M), "upstream_error", AGAIN, M),
    (200, event({"message": M, "code": 400}).replace("\n\n", "\nevent: error\n\n"), "invalid_request", ONCE, M),
    (200, ROLE + "error: " + json.dumps({"message": M, "code": 400}) + "\n\n", "invalid_request", ONCE, M),
    (200, "error: " + json.dumps({"error": {"message": M, "status": 400}}), "invalid_request", ONCE, M),
    (200, "error: " + M + "\n", "upstream_error", AGAIN, M),
    (200, ROLE + json.dumps({"error_code": 10401, "text": M}) + "\n", "upstream_error", AGAIN, M),
    (200, ROLE + json.dumps({"error": {"message": M, "code": 400}}) + "\n" + DONE, "invalid_request", ONCE, M),
    # A body of JSON in place of a stream.
    (200, json.dumps({"error_code": 10401, "text": M}) + "\n", "upstream_error", AGAIN, M),
    (200, json.dumps({"error": M, "code": 400}) + "\n" + DONE, "invalid_request", ONCE, M),
    (200, json.dumps([{"error": {"message": M, "code": 400}}], indent=2), "invalid_request", ONCE, M),
    (200, json.dumps({"detail": M}), "upstream_error", AGAIN, M),
    (200, ROLE + " " + json.dumps({"error": {"message": M, "code": 400}}) + " \n", "invalid_request", ONCE, M),
    (200, ROLE + json.dumps({"error": {"message": M, "code": 400}}, indent=1), "invalid_request", ONCE, M),
    (200, event({"choices": []})[:-1] + json.dumps({"error_code": 400, "text": M}), "invalid_request", ONCE, M),
    (202, json.dumps({"detail": M, "status_code": 422}), "invalid_request", ONCE, M),
    # Nothing that can be read: what was passed over is quoted.
    (200, f"pool connect error: {M}\n", "upstream_truncated", AGAIN, M),
    (200, f": ping\n\nid: 7\nunknown: {M}\n\n{DONE}", "upstream_truncated", AGAIN, M),
    (200, event({"reason": M}) + DONE, "upstream_truncated", AGAIN, M),
    (200, event({"id": "x", "choices": None, "base_resp": {"status_code": 1008, "status_msg": M}}),
     "upstream_truncated", AGAIN, M),
    (200, ROLE + event({"id": "x", "choices": [], "warning": M}) + DONE, "upstream_truncated", AGAIN, M),
    (200, 'data: {"error": {"message": "' + M, "upstream_truncated", AGAIN, M),
    (200, event(f"Internal Server Error: {M}"), "upstream_malformed", AGAIN, M),
    (200, event(json.dumps(M)), "upstream_malformed", AGAIN, M),
    (200, f"\n<!doctype html><title>{M}</title>", "not_a_stream", AGAIN, M),
    (200, "", "upstream_truncated", AGAIN, "ended"),
    # Statuses.
    (204, "", "not_a_stream", AGAIN, "HTTP 204"),
    (205, "", "not_a_stream", AGAIN, "HTTP 205"),
    (400, M, "invalid_request", ONCE, M),
    (421, M, "upstream_unavailable", AGAIN, M),
    (424, M, "upstream_unavailable", AGAIN, M),
    (499, M, "upstream_unavailable", AGAIN, M),
    (502, f"<html>{M}</html>", "upstream_unavailable", AGAIN, M),
    # A web page with any status: what it says without its markup.
    (403, WEB_PAGE, "unauthorized", AGAIN, "HTTP 403: a web page came instead of an answer: Sorry & no; check that"),
    (404, WEB_PAGE, "not_found", ONCE, "HTTP 404: a web page came instead of an answer: Sorry & no; check that"),
    (400, WEB_PAGE, "not_a_stream", ONCE, "HTTP 400: a web page came instead of an answer: Sorry & no; check that"),
    (501, WEB_PAGE, "upstream_unavailable", AGAIN, "HTTP 501: a web page came instead of an answer: Sorry & no; check"),
    (502, WEB_PAGE, "upstream_unavailable", AGAIN, "HTTP 502: a web page came instead of an answer: Sorry & no"),
    (429, WEB_PAGE, "rate_limited", AGAIN, "HTTP 429: a web page came instead of an answer: Sorry & no"),
    (413, WEB_PAGE, "invalid_request", ONCE, "HTTP 413: a web page came instead of an answer: Sorry & no"),
    (404, "<title>Models</title>", "not_found", ONCE, "instead of an answer: Models; check that VLLM_URLS is"),
    (503, "<title>\n</title><h1>Away</h1>", "upstream_unavailable", AGAIN, "instead of an answer: Away"),
    (503, "<" * 70_000, "upstream_unavailable", AGAIN, "instead of an answer: it has no words"),
    # A server that speaks TLS, asked without: nginx, Go, Apache.
    (400, "<title>400 The plain HTTP request was sent to HTTPS port</title>", "not_a_stream", ONCE, WANTS_TLS),
    (400, "Client sent an HTTP request to an HTTPS server.\n", "not_a_stream", ONCE, WANTS_TLS),
    (400, "<p>You're speaking plain HTTP to an SSL-enabled server port.</p>", "not_a_stream", ONCE, WANTS_TLS),
    # No answer of a vLLM at all, with 0 for the status: the whole of what is sent.
    (0, "", "upstream_unreachable", AGAIN, "the server closed the connection"),
    (0, "SSH-2.0-OpenSSH_9.6\r\n", "upstream_unreachable", AGAIN, "no HTTP/1.1"),
    (0, "\x15\x03\x01\x00\x02\x02\x46", "upstream_unreachable", AGAIN, "its URL begins with https://"),
    (0, "HTTP/1.1 307 X\r\nlocation: https://other/v1\r\ncontent-length: 0\r\n\r\n",
     "upstream_error", ONCE, "the server redirects to https://other/v1, which is not followed; set VLLM_URLS to"),
    (0, "HTTP/1.1 200 X\r\ncontent-length: 9\r\n\r\n<html>", "not_a_stream", AGAIN, "check that VLLM_URLS is"),
    # A prompt that is too long: vLLM, its multimodal path, SGLang, llama.cpp, TGI, and others.
    (400, json.dumps({"error": {"message": "This model's maximum context length is 4096 tokens.", "code": 400}}),
     "context_length_exceeded", ONCE, "4096"),
    (400, json.dumps({"error": {"message": "The decoder prompt (length 5000) is longer than the maximum model length "
                                           "of 4096."}}),
     "context_length_exceeded", ONCE, "decoder prompt"),
    (400, json.dumps({"message": "The prompt (total length 5000) is too long to fit into the model (context length "
                                 "4096)."}),
     "context_length_exceeded", ONCE, "total length"),
    (400, json.dumps({"message": "The input (5000 tokens) is longer than the model's context length (4096 tokens)."}),
     "context_length_exceeded", ONCE, "5000 tokens"),
    (200, event({"error": {"message": "The input (5000 tokens) is longer than the model's context length (4096)."}}),
     "context_length_exceeded", ONCE, "5000 tokens"),
    (400, json.dumps({"message": "Input length (5000 tokens) exceeds the maximum allowed length (4096 tokens)."}),
     "context_length_exceeded", ONCE, "5000 tokens"),
    (400, json.dumps({"error": {"code": 400, "message": M, "type": "exceed_context_size_error"}}),
     "context_length_exceeded", ONCE, M),
    (500, json.dumps({"error": {"message": "the request exceeds the available context size. try increasing it"}}),
     "context_length_exceeded", ONCE, "available context size"),
    (422, json.dumps({"error": "Input validation error: `inputs` must have less than 4095 tokens. Given: 5000",
                      "error_type": "validation"}),
     "context_length_exceeded", ONCE, "Given: 5000"),
    (200, event({"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000",
                 "error_type": "validation"}),
     "context_length_exceeded", ONCE, "Given: 5000"),
    (200, event({"error": "Prompt length (5056) exceeds maximum input length (2048). Set log level to info"}),
     "context_length_exceeded", ONCE, "5056"),
    (500, json.dumps({"message": "The sum of prompt length (5000), query length (0) should not exceed max_num_tokens "
                                 "(4096)"}),
     "context_length_exceeded", ONCE, "5000"),
    (400, json.dumps({"error": "Trying to keep the first 5000 tokens when context overflows: that is greater than the "
                               "context length of 4096"}),
     "context_length_exceeded", ONCE, "5000"),
    (400, json.dumps({"error": {"message": "Your input exceeds the context window of this model."}}),
     "context_length_exceeded", ONCE, "context window"),
    (400, json.dumps({"error": {"message": "litellm.ContextWindowExceededError: x", "code": "400"}}),
     "context_length_exceeded", ONCE, "litellm"),
    (400, json.dumps({"error": {"message": "You passed 5001 input tokens and requested 1 output tokens. However, the "
                                           "model's context length is only 4096 tokens, resulting in a maximum input "
                                           "length of 4095 tokens. Please reduce the length of the input prompt."}}),
     "context_length_exceeded", ONCE, "5001"),
    (400, json.dumps({"error": {"message": "You passed 70000 input characters and requested 1 output tokens. However, "
                                           "the model's context length is only 4096 tokens. (parameter=input_text, "
                                           "value=70000)", "param": "input_text"}}),
     "context_length_exceeded", ONCE, "70000"),
    (500, json.dumps({"error": "input length exceeds context length"}), "context_length_exceeded", ONCE, "input"),
    (400, json.dumps({"error": "the input length exceeds the context length"}),
     "context_length_exceeded", ONCE, "the input"),
    (400, json.dumps({"error": {"type": "invalid_request_error",
                                "message": "prompt is too long: 5000 tokens > 4096 maximum"}}),
     "context_length_exceeded", ONCE, "5000"),
    (400, json.dumps({"message": "Input is too long for requested model."}),
     "context_length_exceeded", ONCE, "too long"),
    (400, json.dumps([{"error": {"message": "The input token count (5000) exceeds the maximum number of tokens allowed "
                                            "(4096)."}}]),
     "context_length_exceeded", ONCE, "5000"),
    (400, json.dumps({"error": "This model's maximum prompt length is 4096 but the request contains 5000 tokens."}),
     "context_length_exceeded", ONCE, "5000"),
    # A model that is not there, or something else.
    (404, json.dumps({"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}}),
     "model_not_found", ONCE, "`x`"),
    (404, json.dumps({"error": "model 'x' not found"}), "model_not_found", ONCE, "'x'"),
    (404, json.dumps({"error": {"message": "models/x is not found for API version v1"}}),
     "model_not_found", ONCE, "models/x"),
    (404, json.dumps({"error": {"message": "404, Not Found, url=http://files/model.png", "type": "NotFoundError"}}),
     "not_found", ONCE, "model.png"),
    (404, json.dumps({"error": {"message": "404, Not Found, url=http://files/model/1?model=x"}}),
     "not_found", ONCE, "model/1"),
    (200, event({"error": {"message": "The model `x` does not exist", "type": "invalid_request_error",
                           "code": "model_not_found"}}),
     "model_not_found", ONCE, "`x`"),
    (200, event({"error": {"message": "The model `x` does not exist", "type": "invalid_request_error"}}),
     "model_not_found", ONCE, "`x`"),
    (400, json.dumps({"error": {"message": M, "type": "invalid_request_error", "code": "model_not_found"}}),
     "model_not_found", ONCE, M),
    (403, json.dumps({"error": {"message": "Project `p` does not have access to x", "code": "model_not_found"}}),
     "model_not_found", ONCE, "`p`"),
    (400, json.dumps({"error": {"message": "/chat/completions: Invalid model name passed in model=x. Call `/v1/models`",
                                "type": "invalid_request_error", "code": "400"}}),
     "model_not_found", ONCE, "model=x"),
    (400, json.dumps({"error": "Model x not found or vLLM engine is sleeping."}), "model_not_found", ONCE, "Model x"),
    (400, json.dumps({"error": {"message": "Model Not Exist", "type": "invalid_request_error"}}),
     "model_not_found", ONCE, "Model Not Exist"),
    (400, json.dumps({"message": "Invalid model: x", "type": "invalid_model", "code": "1500"}),
     "model_not_found", ONCE, "Invalid model"),
    (400, json.dumps({"error": {"message": "The model does not support tools", "type": "BadRequestError"}}),
     "invalid_request", ONCE, "tools"),
    # A server that is set up wrongly: see also `test_a16_what_is_asked_of_another_server`.
    (405, json.dumps({"detail": "Method Not Allowed"}), "upstream_error", ONCE, "Method Not Allowed"),
    (402, json.dumps({"error": {"message": "Insufficient Balance"}}), "upstream_error", ONCE, "Insufficient Balance"),
    (400, "<html><h1>400 Bad Request</h1>The plain HTTP request was sent to HTTPS port</html>",
     "not_a_stream", ONCE, "sent to HTTPS port"),
    # What has other limits in it is about the request.
    (400, json.dumps({"error": {"message": "max_tokens=100000 cannot be greater than max_model_len=4096"}}),
     "invalid_request", ONCE, "max_model_len"),
    (400, json.dumps({"error": {"message": "The stop string exceeds the maximum allowed length"}}),
     "invalid_request", ONCE, "stop string"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
@pytest.mark.parametrize(("status", "body", "code", "retried", "words"), TABLE)
async def test_each_error_has_its_code_and_its_message(
    kind: str,
    status: int,
    body: str,
    code: str,
    retried: bool,  # noqa: FBT001 - a column of the table
    words: str,
) -> None:
    head = (
        ""
        if not status
        else f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body.encode())}\r\n\r\n"
    )
    async with sending(head.encode() + body.encode()) as url:
        error = await error_of(url)
    assert (error.code, error.retryable) == (code, retried), error.message
    assert words in error.message
    assert not body or body.lstrip()[:1] != "<" or (len(error.message) < 400 and "<" not in error.message)


@pytest.mark.parametrize(
    ("status", "body", "elsewhere", "blamed"),
    [
        (301, "", True, True),
        (307, "Temporary Redirect", True, True),
        (402, '{"error":{"message":"Insufficient Balance"}}', True, True),
        (404, "", True, True),
        (404, '{"detail":"Not Found"}', True, True),
        (404, '{"error":{"message":"Not Found","type":"NotFoundError","param":null,"code":404}}', True, True),
        (404, '{"error":{"message":"File Not Found","type":"not_found_error","code":404}}', True, True),
        (404, "404 page not found\n", True, True),
        (404, "default backend - 404", True, True),
        (404, '{"message":"no Route matched with those values"}', True, True),
        (404, '{"error":{"message":"Invalid URL (POST /v1/v1/chat/completions)"}}', True, True),
        (404, "<pre>Cannot POST /v1/chat/completions</pre>", True, True),
        (404, "Cannot POST /v1/chat/completions", True, True),
        (404, "<html><title>404 Not Found</title><center>nginx</center></html>", True, True),
        (404, '{"error":{"message":"404, message=\'Not Found\', url=http://files/cat.png"}}', False, False),
        (404, '{"error":{"message":"Response with id r-1 not found."}}', False, False),
        (404, '{"error":{"message":"The model `x` does not exist."}}', True, False),
        (405, '{"detail":"Method Not Allowed"}', True, True),
        (407, "", True, True),
        (426, "", True, True),
        (400, "<html>The plain HTTP request was sent to HTTPS port</html>", True, True),
        (413, "<html>413 Request Entity Too Large</html>", True, False),
        (413, '{"message":"Payload Too Large"}', True, False),
        (431, "", True, False),
        (400, '{"error":{"message":"top_k is too large"}}', False, False),
        (422, '{"detail":"bad"}', False, False),
        # These are worth another try wherever it is.
        (200, "<html>Welcome</html>", False, True),
        (501, "", False, True),
    ],
)
async def test_which_errors_send_the_job_to_another_server(
    status: int,
    body: str,
    elsewhere: bool,  # noqa: FBT001 - a column of the table
    blamed: bool,  # noqa: FBT001 - a column of the table
) -> None:
    """An error caused by the URL, proxy or account of the server. With `blamed`, it counts against the server."""
    answer = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body.encode())}\r\n\r\n{body}"
    async with sending(answer.encode()) as url:
        error = await error_of(url)
    assert (error.elsewhere, counts_against_server(error)) == (elsewhere, blamed)
    assert error.retryable is (status in {200, 501})


class Pieces:
    """A response whose body comes in these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.body = self
        self._pieces = list(pieces)

    async def read_into(self, into: Callable[[bytes], bool]) -> bool:
        return any(into(self._pieces.pop(0)) for _ in range(len(self._pieces)))

    async def aclose(self) -> None:
        """There is nothing to close."""


@pytest.mark.parametrize(
    ("body", "code"), [(body.encode(), code) for status, body, code, _, _ in TABLE if status == 200 and body]
)
async def test_an_error_is_the_same_however_its_bytes_are_cut(body: bytes, code: str) -> None:
    cuts = [[body], [bytes([byte]) for byte in body], *([body[:at], body[at:]] for at in range(1, len(body)))]
    told = set()
    for pieces in cuts:
        stream = ChatStream(cast("HttpResponse", Pieces(*pieces)), StreamWatchdog(StreamTimeouts()))
        with pytest.raises(UpstreamError) as caught:
            await drain(stream)
        told.add((caught.value.code, caught.value.message))
    assert len(told) == 1
    assert {found for found, _ in told} == {code}


NO_ERRORS: list[Any] = [None, False, 0, 0.0, "", [], {}, {"code": None, "message": ""},
                        {"code": 0, "message": "success"}, {"code": "0", "message": "OK"}]  # fmt: skip


@pytest.mark.parametrize("value", NO_ERRORS)
@pytest.mark.parametrize("place", ["chunk", "choice", "delta", "alone"])
def test_an_empty_error_field_is_not_an_error(value: object, place: str) -> None:
    parser = ChunkParser()
    choice = {"delta": {"content": "hi"}, "finish_reason": "stop"}
    if place == "alone":
        assert parser.parse(json.dumps({"error": value, "choices": []}).encode()) == []
    shown = {
        "chunk": {"choices": [choice], "error": value},
        "choice": {"choices": [choice | {"error": value}]},
        "delta": {"choices": [{"delta": {"content": "hi", "error": value}, "finish_reason": "stop"}]},
        "alone": {"choices": [choice]},
    }[place]
    (entry,) = parser.parse(json.dumps(shown).encode())
    assert entry == {"type": "delta", "content": "hi", "finish_reason": "stop"}
    parser.check_complete()


@pytest.mark.parametrize(
    "data",
    [
        {"error_code": 0, "error_msg": "success", "choices": []},
        {"code": 200, "message": "ok"},
        {"object": "chat.completion.chunk", "choices": [], "detail": "x", "usage": {"total_tokens": 7}},
        {"type": "message_start", "message": {"role": "assistant"}},
        {"choices": [{"delta": {"content": "hi"}}], "error_type": "x", "status": 500},
    ],
)
def test_chunks_that_look_like_errors_are_not_errors(data: object) -> None:
    ChunkParser().parse(json.dumps(data).encode())


@pytest.mark.parametrize("value", ["null", "false", "{}", ""])
def test_an_empty_event_named_error_is_not_an_error(value: str) -> None:
    parser, decoder = ChunkParser(), SSEDecoder()
    body = f"event: error\ndata: {value}\n\n" + chunk({"content": "hi"}, "stop")
    assert [len(parser.parse(data)) for data in decoder.feed(body.encode())] == [0, 2]
    parser.check_complete()


@pytest.mark.parametrize(
    "body",
    [
        chunk({"content": "last words", "error": {"code": 400, "message": M}}, "error"),
        chunk({}, choices=[{"delta": {"content": "last words"}, "error": {"code": 400, "message": M}}]),
        chunk({"content": "last words"}, error={"code": 400, "message": M}),
    ],
)
def test_the_text_beside_an_error_is_not_lost(body: str) -> None:
    parser = ChunkParser()
    _, entry = [fields for data in SSEDecoder().feed(body.encode()) for fields in parser.parse(data)]
    assert entry["content"] == "last words"
    assert (parser.done, parser.is_complete) == (True, False)
    with pytest.raises(UpstreamError, match=M):
        parser.check_complete()


async def error_of(url: str) -> UpstreamError:
    """The error of a request, as a job ends with it."""
    pool = ServerPool([url], limits=StreamTimeouts(connect=5, first_token=10, gap=10))
    try:
        with pytest.raises(UpstreamError) as caught:
            await read(pool)
    finally:
        await pool.aclose()
    return caught.value


async def read(pool: ServerPool) -> None:
    async with pool.stream(pool.servers[0], {"messages": []}) as stream:
        await drain(stream)


async def drain(stream: ChatStream) -> None:
    parser = ChunkParser()

    def on_events(events: list[bytes]) -> bool:
        for data in events:
            parser.parse(data)
        return parser.done

    while await stream.read_into(on_events) and not parser.done:
        pass
    await stream.read_rest()
    parser.check_complete(stream.skipped)

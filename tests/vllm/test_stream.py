"""Streams from a server: every way in which they break, the limits on silence, and refused fields."""

import asyncio
import gc
import json
import socket
import ssl
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from raw_server import sending
from streaming import (
    HEAD,
    JSON_HEAD,
    REQUEST,
    WHO,
    asking,
    chunked,
    enough,
    error_of,
    error_of_server,
    opened,
    reaching,
    request_answer,
    serving,
    to,
    until,
)

from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import NoConnection, UpstreamError
from worker.vllm.http.connection import HIGH_WATER, HttpClientConnection
from worker.vllm.http.target import base_url
from worker.vllm.http.transport import Transport
from worker.vllm.stream.watchdog import StreamTimeouts

# Whole answers


async def test_an_answer_comes_whole() -> None:
    async with serving() as (simulator, pool):
        answer, parser = await request_answer(pool)
        request = simulator.served[-1].request
    assert (answer.text, answer.finish_reason, parser.done) == (answer_to(WHO), "stop", True)
    assert request == {**REQUEST, "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    assert parser.usage["completion_tokens"] == len(answer.choices[0].token_ids)
    assert answer.opened is not None
    assert answer.opened.prompt_tokens == parser.usage["prompt_tokens"]


@pytest.mark.parametrize(
    "shape",
    ["no_space", "crlf", "cr", "comments", "sloppy", "bom", "multiline", "finish_text", "reasoning_content"],
)
async def test_an_answer_comes_whole_in_the_shapes_of_other_servers(shape: str) -> None:
    thinking: list[Any] = [{"role": "user", "content": "Think first"}]
    async with serving() as (_, pool):
        plain, _ = await request_answer(pool, {**asking(), "messages": thinking})
        shaped, _ = await request_answer(pool, {**asking(shape=shape), "messages": thinking})
    assert plain.choices[0].reasoning.startswith("\nThe user wants me to think.")
    for name in ("content", "reasoning", "token_ids", "finish_reason"):
        assert getattr(shaped.choices[0], name) == getattr(plain.choices[0], name)


async def test_a_completion_that_is_not_streamed_is_read() -> None:
    async with serving() as (simulator, pool):
        answer, parser = await request_answer(pool, asking(fault="json"))
        assert (answer.text, answer.finish_reason) == (answer_to(WHO), "stop")
        assert parser.usage["completion_tokens"] == len(answer.choices[0].token_ids)
        await request_answer(pool)
        assert simulator.accepted == 1


async def test_a_completion_over_several_lines_is_read() -> None:
    body = b'{\r\n "choices": [\n  {"message": {"content": "a\\nb"},\r "finish_reason": "stop"}\n ]\n}\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json; charset=utf-8\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with sending(head + body) as url, reaching(url) as pool:
        assert (await request_answer(pool))[0].text == "a\nb"


@pytest.mark.parametrize("kind", [b"content-type: text/plain\r\n", b"content-type: Text/Event-Stream\r\n", b""])
async def test_a_stream_is_read_whatever_its_content_type(kind: bytes) -> None:
    event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    async with sending(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n" + event) as url, reaching(url) as pool:
        assert (await request_answer(pool))[0].text == "a"


LABELS = ["application/json", "application/json; charset=utf-8", "text/event-stream", "text/plain", "text/html",
          "application/problem+json", "application/octet-stream"]  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b": a comment\n\n", b"\n \n", b"event: chunk\n", b"id: 1\r\n"])
async def test_events_come_out_as_they_arrive_whatever_the_content_type(label: str, start: bytes) -> None:
    event = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {label}\r\n\r\n".encode()
    async with sending(head, start[:2], start[2:] + event, then_close=False) as url, Transport() as transport:
        stream = await opened(transport, url)
        events: list[bytes] = []

        def on_events(new: list[bytes]) -> bool:
            events.extend(new)
            return True

        async with asyncio.timeout(60):  # the answer does not end
            while not events:
                await stream.read_into(on_events)
        assert events == [event[6:-2]]
        await stream.aclose()


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n  \n"])
async def test_a_whole_completion_is_read_whatever_the_content_type(label: str, start: bytes) -> None:
    body = start + b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {label}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    async with sending(head, body) as url, reaching(url) as pool:
        assert (await request_answer(pool))[0].text == "a"


TEXT = b'{"choices":[{"delta":{"content":"%c"}}]}'
FINISH = b'{"choices":[{"delta":{},"finish_reason":"stop"}]}'


@pytest.mark.parametrize("prefix", [b"data: ", b"data:", b""])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
async def test_lines_that_are_chunks_come_out_during_the_stream(prefix: bytes, end: bytes) -> None:
    """With one line end behind each, or as lines of JSON."""
    body = b"".join(prefix + TEXT % letter + end for letter in b"abc")
    async with sending(HEAD + b"\r\n", body, then_close=False) as url, Transport() as transport:
        stream = await opened(transport, url)
        events: list[bytes] = []

        def on_events(new: list[bytes]) -> bool:
            events.extend(new)
            return True

        async with asyncio.timeout(60):  # the answer does not end
            while len(events) < 2:
                await stream.read_into(on_events)
        assert events[:2] == [TEXT % b"a", TEXT % b"b"]
        await stream.aclose()


@pytest.mark.parametrize("prefix", [b"data: ", b""])
async def test_lines_that_are_chunks_are_a_whole_answer(prefix: bytes) -> None:
    lines = [*(TEXT % letter for letter in b"abc"), FINISH]
    answer = HEAD + b"\r\n" + b"".join(prefix + line + b"\n" for line in lines)
    for rest in (b"", b"data: [DONE]\n"):
        async with sending(answer + rest) as url, reaching(url) as pool:
            assert (await request_answer(pool))[0].text == "abc"


ERROR = b'{"error":{"message":"no such thing","code":400}}'
LIMITED = StreamTimeouts(connect=5, first_token=1, gap=1)


@pytest.mark.parametrize(
    "body",
    [
        ERROR + b"\n",
        b" " + ERROR + b" \r\n",
        json.dumps(json.loads(ERROR), indent=1).encode() + b"\n",
        b"data: " + TEXT % b"a" + b"\n\n" + ERROR + b"\n",
        b"data: " + TEXT % b"a" + b"\n" + ERROR + b"\n",
        b"[" + ERROR + b"]\n",
    ],
)
async def test_an_error_on_a_line_is_raised_at_once_though_the_connection_stays_open(body: bytes) -> None:
    error = await error_of_server(HEAD + b"\r\n" + body, then_close=False)
    assert (error.code, error.message) == ("invalid_request", "no such thing")


@pytest.mark.parametrize(
    "body",
    [ERROR, b"data: " + ERROR + b"\n", b"data: " + ERROR, b"event: error\ndata: " + ERROR + b"\n", b"\n " + ERROR],
)
async def test_an_unfinished_error_is_raised_though_the_connection_stays_open(body: bytes) -> None:
    error = await error_of_server(HEAD + b"\r\n" + body, limits=LIMITED, then_close=False)
    assert (error.code, error.message) == ("invalid_request", "no such thing")


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"the quota is gone\n", "first_token_timeout", "the quota is gone"),
        (b"data: the quota is go", "first_token_timeout", "the quota is go"),
        (b'{"error": {"message": "the quota', "gap_timeout", "the quota"),
        (b"<p>the quota is gone", "not_a_stream", "the quota is gone"),
    ],
)
async def test_after_silence_the_error_quotes_what_came_in_place_of_an_answer(
    body: bytes, code: str, words: str
) -> None:
    error = await error_of_server(HEAD + b"\r\n" + body, limits=LIMITED, then_close=False)
    assert error.code == code
    assert words in error.message


async def test_after_silence_the_error_does_not_quote_text() -> None:
    body = b"data: " + TEXT % b"a" + b"\n\ndata: " + (TEXT % b"b")[:-3]
    error = await error_of_server(HEAD + b"\r\n" + body, limits=LIMITED, then_close=False)
    assert (error.code, error.message) == ("gap_timeout", "vLLM sent nothing for 1 s mid-stream")


async def test_a_whole_completion_counts_though_the_connection_stays_open() -> None:
    body = b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
    async with sending(HEAD + b"\r\n", body, then_close=False) as url, reaching(url, limits=LIMITED) as pool:
        parser = ChunkParser()
        async with pool.stream(pool.servers[0], REQUEST) as stream:

            def on_events(events: list[bytes]) -> bool:
                for data in events:
                    parser.parse(data)
                return parser.done

            with pytest.raises(UpstreamError, match="sent nothing"):
                await stream.read_into(on_events)
        assert parser.is_complete


@pytest.mark.parametrize("cut", range(4))
async def test_a_bom_may_come_in_pieces(cut: int) -> None:
    body = b"\xef\xbb\xbfdata: " + TEXT % b"a" + b"\n\ndata: " + FINISH + b"\n\n"
    async with sending(HEAD + b"\r\n", body[:cut], body[cut:]) as url, reaching(url) as pool:
        assert (await request_answer(pool))[0].text == "a"


@pytest.mark.parametrize("status", [200, 201, 202, 203, 206])
@pytest.mark.parametrize("body", [b'data: {"choices":[%b]}\n\n', b'{"choices":[%b]}'])
async def test_these_statuses_are_those_of_an_answer(status: int, body: bytes) -> None:
    answer = body % b'{"delta":{"content":"a"},"finish_reason":"stop"}'
    async with sending(b"HTTP/1.1 %d OK\r\n\r\n" % status + answer) as url, reaching(url) as pool:
        assert (await request_answer(pool))[0].text == "a"


async def test_an_answer_comes_over_tls_from_a_server_whose_certificate_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    authority, secure = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(secure)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    async with sending(HEAD + b"\r\n" + event, secure=secure) as url:
        async with reaching(url) as pool:
            error = await error_of(pool)
            assert isinstance(error, NoConnection)
            assert "CERTIFICATE_VERIFY_FAILED" in error.message
            assert error.message.endswith(
                "; set SSL_CERT_FILE to a PEM file with the certificate of the server's authority"
            )
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        async with reaching(url) as pool:
            assert (await request_answer(pool))[0].text == "a"
        async with reaching(url.replace("127.0.0.1", "localhost")) as pool:  # which the certificate is not for
            assert "Hostname mismatch" in (error := await error_of(pool)).message
            assert error.message.endswith("; set VLLM_URLS to the host name in the server's certificate")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        async with reaching(url) as pool:
            assert "the certificates of SSL_CERT_FILE cannot be read" in (await error_of(pool)).message


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n", b""])
async def test_tls_to_a_server_without_it_is_an_error_with_a_fix(answer: bytes) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, reaching(url) as pool:
        error = await error_of(pool)
    assert error.code == "upstream_unreachable"
    assert "does not speak TLS" in error.fix
    assert error.message.endswith("its URL begins with http://")


async def test_the_key_is_sent() -> None:
    async with serving(Options(api_key="secret"), api_key="secret") as (_, pool):
        assert (await request_answer(pool))[0].text == answer_to(WHO)
    async with serving(Options(api_key="secret"), api_key="wrong") as (_, pool):
        error = await error_of(pool)
        assert (error.code, error.retryable, error.message) == ("unauthorized", True, "Unauthorized")


async def test_many_streams_go_at_once() -> None:
    async with serving() as (simulator, pool):
        answers = await asyncio.gather(*(request_answer(pool, asking(tokens=20, rate=200)) for _ in range(100)))
        assert {answer.text for answer, _ in answers} == {answer_to(WHO, tokens=20)}
        assert simulator.accepted == 100
        assert len(pool.servers[0].requests) == 0


# Faults


@pytest.mark.parametrize(
    ("fault", "code", "status", "retryable"),
    [
        ("refuse", "upstream_unreachable", 0, True),
        ("429", "rate_limited", 429, True),
        ("503", "upstream_unavailable", 503, True),
        ("500", "upstream_error", 500, True),
        ("html", "not_a_stream", 200, True),
        ("cut", "upstream_truncated", 0, True),
        ("reset", "upstream_truncated", 0, True),
        ("malformed", "upstream_malformed", 0, True),
        ("error_under_200", "upstream_error", 500, True),
        ("abort", "upstream_aborted", 200, True),
    ],
)
async def test_each_fault_has_its_code(fault: str, code: str, status: int, retryable: bool) -> None:  # noqa: FBT001
    async with serving() as (simulator, pool):
        # Paced, so that what was sent before a reset is read before it.
        error = await error_of(pool, asking(fault=fault, after=3, rate=500))
        assert simulator.served[-1].fault == fault
        assert (error.code, error.status, error.retryable) == (code, status, retryable)
        assert error.message
        # The server is as good as before.
        assert (await request_answer(pool))[0].text == answer_to(WHO)


async def test_a_missing_done_is_not_a_fault() -> None:
    async with serving() as (_, pool):
        answer, parser = await request_answer(pool, asking(fault="no_done"))
    assert (answer.text, parser.done, parser.is_complete) == (answer_to(WHO), False, True)


async def test_retry_after_is_in_the_error() -> None:
    async with serving() as (_, pool):
        assert (await error_of(pool, asking(fault="429", retry_after=7))).retry_after == 7
        assert (await error_of(pool, asking(fault="429"))).retry_after is None


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "nope"}, "model_not_found"),
        ({"temperature": -3.0}, "invalid_request"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "context_length_exceeded"),
        ({"logprobs": True, "top_logprobs": 500}, "invalid_request"),
    ],
)
async def test_a_bad_request_is_not_retryable(fields: dict[str, Any], code: str) -> None:
    async with serving() as (simulator, pool):
        error = await error_of(pool, {**REQUEST, **fields})
        assert (error.code, error.retryable) == (code, False)
        assert len(simulator.served) == 1


async def test_a_server_that_is_not_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    async with reaching(url) as pool:
        error = await error_of(pool)
    assert (error.code, error.status, error.retryable) == ("upstream_unreachable", 0, True)
    assert error.message.startswith(f"cannot reach {url}/v1/chat/completions: ")


async def test_a_server_that_goes_during_the_write_is_a_write_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    write = HttpClientConnection.write

    def lose(connection: HttpClientConnection, packed: bytes) -> None:
        connection.abort()
        write(connection, packed)

    transport = Transport()
    async with serving() as (simulator, _), httpx.AsyncClient(transport=transport) as client:
        monkeypatch.setattr(HttpClientConnection, "write", lose)
        with pytest.raises(httpx.WriteError):
            await client.get(simulator.url)
        await until(lambda: not transport._open)
    gc.collect()
    assert unheard == []


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\ncontent-le"])
async def test_a_server_that_does_not_speak_http_is_unreachable(answer: bytes) -> None:
    assert (await error_of_server(answer)).code == "upstream_unreachable"


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"content-length: 1000\r\n\r\ndata: {}\n\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(b"data: {}\n\n"),
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(b"data: {}\n\n") + b"what is this\r\n",
        JSON_HEAD,
        b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 1000\r\n\r\n",
    ],
)
async def test_an_answer_that_breaks_off_or_cannot_be_parsed_is_truncated(answer: bytes) -> None:
    error = await error_of_server(answer)
    assert (error.code, error.retryable) == ("upstream_truncated", True)
    assert error.message


async def test_a_compressed_stream_is_refused() -> None:
    error = await error_of_server(HEAD + b"content-encoding: gzip\r\n\r\ndata: {}\n\n")
    assert (error.code, error.retryable) == ("not_a_stream", True)
    assert "compressed" in error.message


async def test_a_completion_that_is_cut_off_is_truncated() -> None:
    assert (await error_of_server(JSON_HEAD + b'{"choices":[{"mess')).code == "upstream_truncated"


async def test_an_error_page_cut_short_is_an_error_of_its_status() -> None:
    error = await error_of_server(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 1000\r\n\r\n<html>no gateway")
    assert (error.code, error.status) == ("upstream_unavailable", 502)
    assert error.message == "HTTP 502: a web page came instead of an answer: no gateway"


async def test_an_error_page_without_end_is_read_to_a_limit() -> None:
    error = await error_of_server(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", again=b"busy " * 10_000)
    assert error.code == "upstream_unavailable"
    assert error.message.startswith("busy busy busy")


async def test_an_event_without_end_is_malformed() -> None:
    async with sending(HEAD + b"\r\ndata: ", again=b"x" * 100) as url, Transport() as transport:
        stream = await opened(transport, url, max_event_bytes=1000)
        with pytest.raises(UpstreamError, match="larger than 1000 bytes") as caught:
            await stream.read_into(enough)
        await stream.aclose()
    assert (caught.value.code, caught.value.retryable) == ("upstream_malformed", True)


async def test_a_redirect_is_not_followed() -> None:
    error = await error_of_server(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")
    assert (error.code, error.status, error.retryable) == ("upstream_error", 302, False)


# Silence


# Closing


async def test_leaving_the_stream_closes_the_connection() -> None:
    async with serving() as (simulator, pool):
        async with pool.stream(pool.servers[0], asking(tokens=4000, rate=50)) as stream:
            assert await stream.read_into(enough)
            assert len(pool.servers[0].requests) == 1
        assert len(pool.servers[0].requests) == 0
        await until(lambda: simulator.served[-1].closed_early)
        assert simulator.served[-1].chunks < 200


@pytest.mark.parametrize("fault", ["stall", "hang"])
async def test_being_cancelled_closes_the_connection(fault: str) -> None:
    async with serving() as (simulator, pool):
        task = asyncio.create_task(request_answer(pool, asking(fault=fault, after=2)))
        await until(lambda: bool(simulator.served) and simulator.served[-1].fault == fault)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: simulator.served[-1].closed_early)
        assert len(pool.servers[0].requests) == 0


async def test_the_connection_is_used_again_after_a_whole_stream() -> None:
    async with serving() as (simulator, pool):
        for _ in range(3):
            await request_answer(pool)
        assert (len(simulator.served), simulator.accepted) == (3, 1)


async def test_the_connection_is_used_again_after_a_refusal() -> None:
    async with serving() as (simulator, pool):
        await error_of(pool, asking(fault="503"))
        await request_answer(pool)
        assert simulator.accepted == 1


async def test_a_closed_connection_is_dropped_after_a_response_that_waited_for_its_reader() -> None:
    body = b"x" * HIGH_WATER
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with sending(head, body) as url, Transport() as transport:
        answer = await transport.post(to(url), b"{}", 5)
        await until(lambda: answer.body._is_over)
        assert b"".join([piece async for piece in answer.body]) == body
        await until(lambda: not transport._open)


async def test_a_server_that_does_not_end_its_answer_after_done_is_not_waited_for() -> None:
    event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    async with sending(HEAD + b"\r\n" + event, then_close=False) as url, reaching(url) as pool:
        async with asyncio.timeout(60):
            assert (await request_answer(pool))[0].text == "a"


async def test_usage_after_done_in_a_piece_of_its_own_is_read() -> None:
    event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    head = HEAD + b"connection: close\r\n\r\n"
    async with sending(head + event, b'data: {"usage":{"total_tokens":3}}\n\n') as url, reaching(url) as pool:
        answer, parser = await request_answer(pool)
    assert (answer.text, parser.usage) == ("a", {"total_tokens": 3})


# Servers that do not know what the worker adds


# The request, and the choice of a server


@pytest.mark.parametrize("url", ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/", "http://a:1//"])
def test_the_url_of_a_server_may_end_with_v1(url: str) -> None:
    assert base_url(url) == "http://a:1"
    assert base_url(url.replace("a:1", "a:1/llm")) == "http://a:1/llm"


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions/", "/v1/models"])
def test_the_url_of_a_server_may_end_with_a_route(route: str) -> None:
    assert base_url("http://a:1" + route) == "http://a:1"
    assert base_url("http://a:1/llm" + route) == "http://a:1/llm"


async def test_requests_spread_over_the_servers() -> None:
    async with Simulator() as one, Simulator() as two, reaching(one.url, two.url) as pool:

        async def hold(gate: Awaitable[object]) -> None:
            with (pooled := pool.choose("")).reserve():
                await asyncio.sleep(0)  # a request of the same moment chooses the other server all the same
                async with pool.stream(pooled, asking(fault="stall")) as stream:
                    await stream.read_into(enough)
                    await gate

        gate = asyncio.Event()
        held = [asyncio.create_task(hold(gate.wait())) for _ in range(6)]
        await until(lambda: [pooled.in_flight for pooled in pool.servers] == [3, 3])
        await until(lambda: len(one.served) == len(two.served) == 3)
        gate.set()
        await asyncio.gather(*held)
        assert [pooled.in_flight for pooled in pool.servers] == [0, 0]


# The list of models


async def test_the_scenario_of_a_simulator_applies_to_every_request() -> None:
    async with serving(Options(scenario=Scenario(fault="503", times=1))) as (_, pool):
        assert (await error_of(pool)).code == "upstream_unavailable"
        assert (await request_answer(pool))[0].text == answer_to(WHO)

"""Streams from a server: every way in which they break, the limits on silence, and refused fields."""

import asyncio
import gc
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from raw_server import sending

from worker.contract import entries
from worker.contract.answer import Answer
from worker.contract.entries import Object, to_json
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import NoConnection, UpstreamError
from worker.vllm.http.connection import HIGH_WATER, HttpClientConnection
from worker.vllm.http.credentials import ApiKeys
from worker.vllm.http.target import Target, base_url
from worker.vllm.http.transport import Transport
from worker.vllm.servers.opening import body_for
from worker.vllm.servers.pace import ServerPace
from worker.vllm.servers.pool import ServerPool
from worker.vllm.stream.chat_stream import ChatStream, open_response
from worker.vllm.stream.sse import MAX_EVENT_BYTES
from worker.vllm.stream.watchdog import StreamTimeouts, StreamWatchdog

PATIENT = StreamTimeouts(connect=5, first_token=10, gap=10)
WHO: list[Any] = [{"role": "user", "content": "Who are you?"}]
REQUEST: Object = {"model": "reciter", "messages": WHO}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"


def asking(**simulate: object) -> Object:
    request: dict[str, Any] = {**REQUEST, "simulate": simulate}
    return request


class Counting(Simulator):
    """Counts the connections that are made to it."""

    accepted = 0

    def _accept(self) -> HttpConnection:
        self.accepted += 1
        return super()._accept()


@asynccontextmanager
async def serving(
    options: Options | None = None,
    limits: StreamTimeouts = PATIENT,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[tuple[Counting, ServerPool]]:
    async with Counting(options) as simulator, reaching(simulator.url, limits=limits, **settings) as pool:
        yield simulator, pool


@asynccontextmanager
async def reaching(
    *urls: str, limits: StreamTimeouts = PATIENT, api_key: str = "", pace: ServerPace | None = None
) -> AsyncIterator[ServerPool]:
    pool = ServerPool(urls, keys=ApiKeys(api_key), limits=limits, pace=pace)
    try:
        yield pool
    finally:
        await pool.aclose()


def to(url: str) -> Target:
    return Target.of(httpx.AsyncClient(), url, {})


async def opened(transport: Transport, url: str, *, max_event_bytes: int = MAX_EVENT_BYTES) -> ChatStream:
    watchdog = StreamWatchdog(PATIENT)
    response = await open_response(transport, to(url), REQUEST, PATIENT, watchdog)
    return ChatStream(response, watchdog, max_event_bytes=max_event_bytes)


def enough(_events: list[bytes]) -> bool:
    """Stop after the next events."""
    return True


async def ask(pool: ServerPool, request: Object | None = None) -> tuple[Answer, ChunkParser]:
    """The whole answer, read as the worker reads it."""
    parser, answer = ChunkParser(), Answer()
    async with pool.stream(pool.servers[0], request or REQUEST) as stream:
        stream.has_begun = lambda: parser.has_content

        def take(events: list[bytes]) -> bool:
            for fields in (fields for data in events for fields in parser.parse(data)):
                answer.add(entries.parse("1-1", fields))
            return parser.done

        while await stream.read_into(take) and not parser.done:
            pass
        await stream.read_rest()
    parser.check_complete()
    return answer, parser


async def error_of(pool: ServerPool, request: Object | None = None) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        await ask(pool, request)
    assert len(pool.servers[0].requests) == 0
    return caught.value


async def error_of_server(*pieces: bytes, limits: StreamTimeouts = PATIENT, **settings: Any) -> UpstreamError:  # noqa: ANN401
    async with sending(*pieces, **settings) as url, reaching(url, limits=limits) as pool:
        return await error_of(pool)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110, a record has no event to wait for
            await asyncio.sleep(0.001)


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


# Whole answers


async def test_an_answer_comes_whole() -> None:
    async with serving() as (simulator, pool):
        answer, parser = await ask(pool)
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
        plain, _ = await ask(pool, {**asking(), "messages": thinking})
        shaped, _ = await ask(pool, {**asking(shape=shape), "messages": thinking})
    assert plain.choices[0].reasoning.startswith("\nThe user wants me to think.")
    for name in ("content", "reasoning", "token_ids", "finish_reason"):
        assert getattr(shaped.choices[0], name) == getattr(plain.choices[0], name)


async def test_a_completion_that_is_not_streamed_is_read() -> None:
    async with serving() as (simulator, pool):
        answer, parser = await ask(pool, asking(fault="json"))
        assert (answer.text, answer.finish_reason) == (answer_to(WHO), "stop")
        assert parser.usage["completion_tokens"] == len(answer.choices[0].token_ids)
        await ask(pool)
        assert simulator.accepted == 1


async def test_a_completion_over_several_lines_is_read() -> None:
    body = b'{\r\n "choices": [\n  {"message": {"content": "a\\nb"},\r "finish_reason": "stop"}\n ]\n}\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json; charset=utf-8\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with sending(head + body) as url, reaching(url) as pool:
        assert (await ask(pool))[0].text == "a\nb"


@pytest.mark.parametrize("kind", [b"content-type: text/plain\r\n", b"content-type: Text/Event-Stream\r\n", b""])
async def test_a_stream_is_read_whatever_its_content_type(kind: bytes) -> None:
    event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    async with sending(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n" + event) as url, reaching(url) as pool:
        assert (await ask(pool))[0].text == "a"


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

        def take(new: list[bytes]) -> bool:
            events.extend(new)
            return True

        async with asyncio.timeout(5):  # the answer does not end
            while not events:
                await stream.read_into(take)
        assert events == [event[6:-2]]
        await stream.aclose()


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n  \n"])
async def test_a_whole_completion_is_read_whatever_the_content_type(label: str, start: bytes) -> None:
    body = start + b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {label}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    async with sending(head, body) as url, reaching(url) as pool:
        assert (await ask(pool))[0].text == "a"


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

        def take(new: list[bytes]) -> bool:
            events.extend(new)
            return True

        async with asyncio.timeout(5):  # the answer does not end
            while len(events) < 2:
                await stream.read_into(take)
        assert events[:2] == [TEXT % b"a", TEXT % b"b"]
        await stream.aclose()


@pytest.mark.parametrize("prefix", [b"data: ", b""])
async def test_lines_that_are_chunks_are_a_whole_answer(prefix: bytes) -> None:
    lines = [*(TEXT % letter for letter in b"abc"), FINISH]
    answer = HEAD + b"\r\n" + b"".join(prefix + line + b"\n" for line in lines)
    for rest in (b"", b"data: [DONE]\n"):
        async with sending(answer + rest) as url, reaching(url) as pool:
            assert (await ask(pool))[0].text == "abc"


ERROR = b'{"error":{"message":"no such thing","code":400}}'
LIMITED = StreamTimeouts(connect=5, first_token=0.3, gap=0.3)


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
    assert (error.code, error.message) == ("gap_timeout", "vLLM sent nothing for 0.3 s mid-stream")


async def test_a_whole_completion_counts_though_the_connection_stays_open() -> None:
    body = b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
    async with sending(HEAD + b"\r\n", body, then_close=False) as url, reaching(url, limits=LIMITED) as pool:
        parser = ChunkParser()
        async with pool.stream(pool.servers[0], REQUEST) as stream:

            def take(events: list[bytes]) -> bool:
                for data in events:
                    parser.parse(data)
                return parser.done

            with pytest.raises(UpstreamError, match="sent nothing"):
                await stream.read_into(take)
        assert parser.is_complete


@pytest.mark.parametrize("cut", range(4))
async def test_a_bom_may_come_in_pieces(cut: int) -> None:
    body = b"\xef\xbb\xbfdata: " + TEXT % b"a" + b"\n\ndata: " + FINISH + b"\n\n"
    async with sending(HEAD + b"\r\n", body[:cut], body[cut:]) as url, reaching(url) as pool:
        assert (await ask(pool))[0].text == "a"


@pytest.mark.parametrize("status", [200, 201, 202, 203, 206])
@pytest.mark.parametrize("body", [b'data: {"choices":[%b]}\n\n', b'{"choices":[%b]}'])
async def test_these_statuses_are_those_of_an_answer(status: int, body: bytes) -> None:
    answer = body % b'{"delta":{"content":"a"},"finish_reason":"stop"}'
    async with sending(b"HTTP/1.1 %d OK\r\n\r\n" % status + answer) as url, reaching(url) as pool:
        assert (await ask(pool))[0].text == "a"


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
            assert (await ask(pool))[0].text == "a"
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
        assert (await ask(pool))[0].text == answer_to(WHO)
    async with serving(Options(api_key="secret"), api_key="wrong") as (_, pool):
        error = await error_of(pool)
        assert (error.code, error.retryable, error.message) == ("unauthorized", True, "Unauthorized")


async def test_many_streams_go_at_once() -> None:
    async with serving() as (simulator, pool):
        answers = await asyncio.gather(*(ask(pool, asking(tokens=20, rate=200)) for _ in range(100)))
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
        assert (await ask(pool))[0].text == answer_to(WHO)


async def test_a_missing_done_is_not_a_fault() -> None:
    async with serving() as (_, pool):
        answer, parser = await ask(pool, asking(fault="no_done"))
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

SHORT_FIRST = StreamTimeouts(first_token=0.1, gap=10)
SHORT_GAP = StreamTimeouts(first_token=10, gap=0.1)


async def test_no_answer_at_all_is_a_late_first_token() -> None:
    async with serving(limits=SHORT_FIRST) as (simulator, pool):
        error = await error_of(pool, asking(fault="hang"))
        assert (error.code, error.retryable) == ("first_token_timeout", True)
        assert error.message == "vLLM sent no token within 0.1 s"
        await until(lambda: simulator.served[-1].closed_early)


@pytest.mark.parametrize("again", [b"", b": keep-alive\n\n", b"data: {"])
async def test_an_unfinished_event_is_not_a_first_token(again: bytes) -> None:
    error = await error_of_server(HEAD + b"\r\n", limits=SHORT_FIRST, then_close=False, again=again)
    assert error.code == "first_token_timeout"


async def test_the_limit_of_the_first_token_counts_from_the_request() -> None:
    """Not from the head of the response: vLLM sends it at once, and its queue is silent after that."""
    loop = asyncio.get_running_loop()
    async with sending(HEAD + b"\r\n", then_close=False) as url, Transport() as transport:
        asked = loop.time()
        stream = await opened(transport, url)
        watchdog = stream._watchdog
        assert asked + 10 <= watchdog._due() < loop.time() + 10
        watchdog._since = asked - 10
        with pytest.raises(UpstreamError, match="within 10 s"):
            await stream.read_into(enough)
        await stream.aclose()


async def test_a_watchdog_can_be_tightened_after_its_timeout() -> None:
    watchdog = StreamWatchdog(SHORT_FIRST)

    async def hurried_at_last() -> None:
        async with watchdog:
            try:
                await asyncio.Event().wait()
            finally:
                watchdog.tighten()

    with pytest.raises(TimeoutError):
        await hurried_at_last()


async def test_a_gap_mid_stream_is_a_gap_timeout() -> None:
    async with serving(limits=SHORT_GAP) as (simulator, pool):
        error = await error_of(pool, asking(fault="stall", after=3))
        assert (error.code, error.retryable) == ("gap_timeout", True)
        assert error.message == "vLLM sent nothing for 0.1 s mid-stream"
        await until(lambda: simulator.served[-1].closed_early)


@pytest.mark.parametrize("delta", [{"role": "assistant", "content": ""}, {"role": "assistant"}, {}, None])
async def test_events_before_the_first_token_do_not_begin_the_gap_limit(delta: Any) -> None:  # noqa: ANN401
    event = b"data: " + to_json({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"
    error = await error_of_server(HEAD + b"\r\n" + event, limits=SHORT_FIRST, then_close=False)
    assert error.code == "first_token_timeout"


@pytest.mark.parametrize(
    "delta", [{"content": "a"}, {"reasoning": "a"}, {"tool_calls": [{"id": "x"}]}, {"refusal": "a"}]
)
async def test_the_first_delta_begins_the_gap_limit(delta: Object) -> None:
    event = b"data: " + to_json({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"
    error = await error_of_server(HEAD + b"\r\n" + event, limits=SHORT_GAP, then_close=False)
    assert error.code == "gap_timeout"


async def test_empty_events_are_not_silence() -> None:
    """A server sends them while it holds back what may be a tool call."""
    role, nothing, text = (
        b"data: " + to_json({"choices": [{"delta": delta}]}).encode() + b"\n\n"
        for delta in ({"role": "assistant"}, {}, {"content": "a"})
    )
    async with sending(HEAD + b"\r\n" + role, then_close=False, again=nothing) as url, reaching(url) as pool:
        parser = ChunkParser()
        async with pool.stream(pool.servers[0], REQUEST) as stream:
            stream.has_begun = lambda: parser.has_content
            watchdog = stream._watchdog
            begun = []
            for data in (b"", b"", text[6:]):
                parser.parse(data)
                watchdog._since -= 9
                await stream.read_into(enough)
                begun.append(watchdog._has_begun)
                assert watchdog._due() > asyncio.get_running_loop().time() + 9
            assert begun == [False, False, True]


async def test_comments_do_not_fill_a_gap() -> None:
    async with serving(Options(keep_alive=0.005), SHORT_GAP) as (simulator, pool):
        assert (await error_of(pool, asking(fault="freeze", after=3))).code == "gap_timeout"
        await until(lambda: simulator.served[-1].closed_early)


async def test_the_gap_limit_is_between_events_and_not_for_the_whole_answer() -> None:
    async with serving(limits=StreamTimeouts(first_token=0.1, gap=0.1)) as (_, pool):
        answer, _ = await ask(pool, asking(tokens=20, rate=100))
    assert answer.text == answer_to(WHO, tokens=20)


async def test_a_completion_that_stops_half_way_does_not_hang() -> None:
    error = await error_of_server(JSON_HEAD + b'{"choices":', limits=SHORT_GAP, then_close=False)
    assert (error.code, error.retryable) == ("gap_timeout", True)


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
        task = asyncio.create_task(ask(pool, asking(fault=fault, after=2)))
        await until(lambda: bool(simulator.served) and simulator.served[-1].fault == fault)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: simulator.served[-1].closed_early)
        assert len(pool.servers[0].requests) == 0


async def test_the_connection_is_used_again_after_a_whole_stream() -> None:
    async with serving() as (simulator, pool):
        for _ in range(3):
            await ask(pool)
        assert (len(simulator.served), simulator.accepted) == (3, 1)


async def test_the_connection_is_used_again_after_a_refusal() -> None:
    async with serving() as (simulator, pool):
        await error_of(pool, asking(fault="503"))
        await ask(pool)
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
        async with asyncio.timeout(5):
            assert (await ask(pool))[0].text == "a"


async def test_usage_after_done_in_a_piece_of_its_own_is_read() -> None:
    event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    head = HEAD + b"connection: close\r\n\r\n"
    async with sending(head + event, b'data: {"usage":{"total_tokens":3}}\n\n') as url, reaching(url) as pool:
        answer, parser = await ask(pool)
    assert (answer.text, parser.usage) == ("a", {"total_tokens": 3})


# Servers that do not know what the worker adds

BOTH = frozenset({"return_token_ids", "stream_options"})
STYLES = ["openai", "vllm", "fastapi"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("fields", [{"return_token_ids"}, {"stream_options"}, BOTH])
async def test_a_field_that_a_server_refuses_is_left_out(style: Any, fields: Iterable[str]) -> None:  # noqa: ANN401
    rejects = frozenset(fields)
    async with serving(Options(rejects=rejects, reject_style=style)) as (simulator, pool):
        for _ in range(2):
            assert (await ask(pool))[0].text == answer_to(WHO)
        assert [served.status for served in simulator.served] == [400] * len(rejects) + [200, 200]
        assert BOTH - simulator.served[-1].request.keys() == rejects
        assert pool.servers[0].unsupported_fields == rejects


UNKNOWN = "Unrecognized request argument supplied"
IN_MESSAGE = {"message": f"{UNKNOWN}: return_token_ids"}
IN_PARAM = {"message": UNKNOWN, "param": "return_token_ids", "code": None}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, {"error": IN_MESSAGE}),
        (403, {"detail": IN_MESSAGE["message"]}),
        (422, {"error": IN_PARAM}),
        (400, {"error": IN_PARAM}),
        (400, {"error": IN_PARAM | {"param": "body.return_token_ids"}}),
        (200, {"error": IN_MESSAGE | {"code": 400}}),
        (200, {"error": IN_PARAM | {"type": "invalid_request_error"}}),
        (200, {"error": IN_MESSAGE}),
    ],
)
@pytest.mark.parametrize("shape", ["%s", "data: %s\n\ndata: [DONE]\n\n"])
async def test_a_field_that_a_server_refuses_in_its_own_way_is_left_out(
    status: int, body: dict[str, Any], shape: str
) -> None:
    class Refusing(Counting):
        async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
            if b"return_token_ids" in request.body:
                self.refused += 1
                await connection.respond(status, "text/event-stream", (shape % json.dumps(body)).encode())
            else:
                await super()._handle(request, connection)

        refused = 0

    async with Refusing() as server, reaching(server.url) as pool:
        for _ in range(2):
            assert (await ask(pool))[0].text == answer_to(WHO)
        assert (server.refused, len(server.served)) == (1, 2)
        assert pool.servers[0].unsupported_fields == {"return_token_ids"}


@pytest.mark.parametrize("own", [{}, {"stream_options": {"continuous_usage_stats": True}}])
async def test_a_server_that_refuses_include_usage_gets_requests_without_it(own: dict[str, Any]) -> None:
    """Its error names the inner field alone."""

    class Refusing(Simulator):
        async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
            if b"include_usage" in request.body:
                error = {"error": {"message": f"{UNKNOWN}: include_usage"}}
                await connection.respond(400, "application/json", json.dumps(error).encode())
            else:
                await super()._handle(request, connection)

    async with Refusing() as server, reaching(server.url) as pool:
        assert (await ask(pool, REQUEST | own))[0].text == answer_to(WHO)
        assert pool.servers[0].unsupported_fields == {"stream_options"}
        asked = REQUEST | {"stream_options": {"include_usage": True}}
        assert (await error_of(pool, asked)).code == "invalid_request"


async def test_an_error_that_names_a_field_and_stays_does_not_cost_other_jobs_the_field() -> None:
    error = {"error": {"message": "cannot sample {'return_token_ids': True}", "code": 500}}
    answer = b"HTTP/1.1 200 OK\r\n\r\ndata: %b\n\n" % json.dumps(error).encode()
    async with sending(answer) as url, reaching(url) as pool:
        assert (await error_of(pool)).message == error["error"]["message"]
        assert pool.servers[0].unsupported_fields == set()


async def test_text_that_came_with_such_an_error_is_not_requested_again() -> None:
    chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": "said"}}]}
    error = {"error": {"message": "cannot sample {'return_token_ids': True}", "code": 500}}
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(b"data: %b\n\n" % json.dumps(it).encode() for it in (chunk, error))
    parser, said = ChunkParser(), list[entries.Fields]()

    def take(events: list[bytes]) -> bool:
        for data in events:
            said.extend(parser.parse(data))
        return False

    async def read(pool: ServerPool) -> None:
        async with pool.stream(pool.servers[0], REQUEST) as stream:
            stream.has_begun = lambda: parser.has_content
            await stream.read_into(take)

    async with sending(answer) as url, reaching(url) as pool:
        with pytest.raises(UpstreamError, match="cannot sample"):
            await read(pool)
    assert [fields["content"] for fields in said if "content" in fields] == ["said"]


async def test_a_field_that_a_server_ignores_does_no_harm() -> None:
    async with serving(Options(ignores=BOTH)) as (simulator, pool):
        answer, parser = await ask(pool)
        assert (answer.text, parser.usage, answer.choices[0].token_ids) == (answer_to(WHO), {}, [])
        assert len(simulator.served) == 1


@pytest.mark.parametrize("style", STYLES)
async def test_many_requests_may_find_a_refused_field_at_the_same_time(style: Any) -> None:  # noqa: ANN401
    async with serving(Options(rejects=BOTH, reject_style=style)) as (simulator, pool):
        answers = await asyncio.gather(*(ask(pool) for _ in range(30)))
        assert {answer.text for answer, _ in answers} == {answer_to(WHO)}
        sent = len(simulator.served)
        await ask(pool)
        assert len(simulator.served) == sent + 1


async def test_what_one_server_refuses_is_still_sent_to_another() -> None:
    async with serving(Options(rejects=BOTH)) as (strict, _), reaching(strict.url, "http://127.0.0.1:9") as pool:
        await ask(pool)
        assert [pooled.unsupported_fields for pooled in pool.servers] == [BOTH, set()]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("fields", [{"return_token_ids": True}, {"stream_options": {"include_usage": True}}])
async def test_a_request_with_the_refused_field_itself_gets_the_refusal(style: Any, fields: dict[str, Any]) -> None:  # noqa: ANN401
    name = next(iter(fields))
    async with serving(Options(rejects=frozenset(fields), reject_style=style)) as (simulator, pool):
        error = await error_of(pool, {**REQUEST, **fields})
        assert (error.code, error.retryable, len(simulator.served)) == ("invalid_request", False, 1)
        assert name in error.message
        # Others find out on their own, and it is the same for whoever asks for the field later.
        await ask(pool)
        assert (await error_of(pool, {**REQUEST, **fields})).code == "invalid_request"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": "tell me about return_token_ids and stream_options"},
        {"stream_options": {"continuous_usage_stats": "return_token_ids"}},
    ],
)
async def test_one_bad_request_does_not_cost_other_jobs_their_token_ids(fields: dict[str, Any]) -> None:
    async with serving() as (simulator, pool):
        error = await error_of(pool, {**REQUEST, **fields})
        assert (error.code, error.status) == ("invalid_request", 400)
        answer, parser = await ask(pool)
        assert answer.choices[0].token_ids
        assert parser.usage
        assert simulator.served[-1].request.keys() >= BOTH


# The request, and the choice of a server


def test_fields_of_the_request_itself_are_sent() -> None:
    own: Object = {"top_k": 5, "stream": False, "stream_options": {"continuous_usage_stats": True}}
    body = body_for(own, frozenset())
    options = {"continuous_usage_stats": True, "include_usage": True}
    assert body == {"top_k": 5, "stream": True, "return_token_ids": True, "stream_options": options}
    assert own == {"top_k": 5, "stream": False, "stream_options": {"continuous_usage_stats": True}}
    assert body_for({"stream_options": None}, frozenset())["stream_options"] == {"include_usage": True}
    assert body_for({}, BOTH) == {"stream": True}


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
                await asyncio.sleep(0)  # whoever comes in the same moment chooses the other one all the same
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

DEEP = b'{"x":' + b"[" * 100_000


async def test_the_models_of_a_server_are_listed() -> None:
    async with serving(Options(model="tiny", api_key="k"), api_key="k") as (_, pool):
        assert await pool.list_models(pool.servers[0]) == ["tiny"]


async def models_error(pool: ServerPool) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        await pool.list_models(pool.servers[0])
    return caught.value


async def test_a_server_with_a_key_lists_no_models_without_it() -> None:
    async with serving(Options(api_key="k")) as (_, pool):
        assert (await models_error(pool)).code == "unauthorized"


@pytest.mark.parametrize("body", [b"<html></html>", b"[]", b'{"data":null}', b'{"data":[{}]}', b"\xff", b"", DEEP])
async def test_a_body_that_is_not_a_list_of_models_is_an_error(body: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with sending(answer) as url, reaching(url) as pool:
        error = await models_error(pool)
    assert (error.code, error.retryable) == ("not_a_stream", False)


async def test_the_models_of_a_missing_or_silent_server_are_an_error() -> None:
    pace = ServerPace(probe_limit=0.1)
    async with sending(then_close=False) as url, reaching(url, pace=pace) as pool:
        error = await models_error(pool)
    assert (error.code, error.message) == ("upstream_unreachable", f"{url}/v1/models did not answer within 0.1 s")
    async with reaching(url) as pool:
        error = await models_error(pool)
    assert (error.code, error.retryable) == ("upstream_unreachable", True)


@contextmanager
def connections_waiting(server: socket.socket) -> Iterator[None]:
    """Fill the server's queue with connections that it does not accept, so that further connections wait outside."""
    with ExitStack() as waiting:
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A server with the shortest possible queue of connections."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        server.setblocking(False)
        yield server


def url_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


async def test_connecting_has_a_limit_of_its_own(listening: socket.socket) -> None:
    limits = StreamTimeouts(connect=0.1, first_token=600, gap=600)
    with connections_waiting(listening):
        async with reaching(url_of(listening), limits=limits) as pool:
            error = await error_of(pool)
            assert pool.servers[0].is_away
    assert (error.code, error.retryable) == ("upstream_unreachable", True)
    assert isinstance(error, NoConnection)


async def test_a_connection_that_is_not_made_in_time_does_not_cut_open_streams(listening: socket.socket) -> None:
    """Such a server is busy, not gone."""
    loop = asyncio.get_running_loop()
    limits, pace = StreamTimeouts(connect=0.1, first_token=600, gap=600), ServerPace(frozen_after=0)
    async with reaching(url_of(listening), limits=limits, pace=pace) as pool:
        asking = asyncio.create_task(ask(pool))
        connection, _ = await loop.sock_accept(listening)
        with connection, connections_waiting(listening):
            await loop.sock_sendall(connection, HEAD + b"\r\n")
            with pytest.raises(NoConnection):
                await ask(pool)
            event = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
            await loop.sock_sendall(connection, event)
            connection.shutdown(socket.SHUT_WR)
            assert (await asking)[0].text == "a"


async def test_the_scenario_of_a_simulator_applies_to_every_request() -> None:
    async with serving(Options(scenario=Scenario(fault="503", times=1))) as (_, pool):
        assert (await error_of(pool)).code == "upstream_unavailable"
        assert (await ask(pool))[0].text == answer_to(WHO)

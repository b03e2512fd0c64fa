"""Fields that a server refuses: they are left out of the next requests."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from raw_server import sending
from streaming import (
    REQUEST,
    WHO,
    Counting,
    error_of,
    reaching,
    request_answer,
    serving,
)

from worker.contract import entries
from worker.contract.entries import Object
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Simulator
from worker.sandbox.simulator.wire import HttpConnection, HttpRequest
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.servers.opening import body_for
from worker.vllm.servers.pool import ServerPool

BOTH = frozenset({"return_token_ids", "stream_options"})
STYLES = ["openai", "vllm", "fastapi"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("fields", [{"return_token_ids"}, {"stream_options"}, BOTH])
async def test_a_field_that_a_server_refuses_is_left_out(style: Any, fields: Iterable[str]) -> None:  # noqa: ANN401
    rejects = frozenset(fields)
    async with serving(Options(rejects=rejects, reject_style=style)) as (simulator, pool):
        for _ in range(2):
            assert (await request_answer(pool))[0].text == answer_to(WHO)
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
            assert (await request_answer(pool))[0].text == answer_to(WHO)
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
        assert (await request_answer(pool, REQUEST | own))[0].text == answer_to(WHO)
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

    def on_events(events: list[bytes]) -> bool:
        for data in events:
            said.extend(parser.parse(data))
        return False

    async def read(pool: ServerPool) -> None:
        async with pool.stream(pool.servers[0], REQUEST) as stream:
            stream.has_output = lambda: parser.has_output
            await stream.read_into(on_events)

    async with sending(answer) as url, reaching(url) as pool:
        with pytest.raises(UpstreamError, match="cannot sample"):
            await read(pool)
    assert [fields["content"] for fields in said if "content" in fields] == ["said"]


async def test_a_field_that_a_server_ignores_does_no_harm() -> None:
    async with serving(Options(ignores=BOTH)) as (simulator, pool):
        answer, parser = await request_answer(pool)
        assert (answer.text, parser.usage, answer.choices[0].token_ids) == (answer_to(WHO), {}, [])
        assert len(simulator.served) == 1


@pytest.mark.parametrize("style", STYLES)
async def test_many_requests_may_find_a_refused_field_at_the_same_time(style: Any) -> None:  # noqa: ANN401
    async with serving(Options(rejects=BOTH, reject_style=style)) as (simulator, pool):
        answers = await asyncio.gather(*(request_answer(pool) for _ in range(30)))
        assert {answer.text for answer, _ in answers} == {answer_to(WHO)}
        sent = len(simulator.served)
        await request_answer(pool)
        assert len(simulator.served) == sent + 1


async def test_what_one_server_refuses_is_still_sent_to_another() -> None:
    async with serving(Options(rejects=BOTH)) as (strict, _), reaching(strict.url, "http://127.0.0.1:9") as pool:
        await request_answer(pool)
        assert [pooled.unsupported_fields for pooled in pool.servers] == [BOTH, set()]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("fields", [{"return_token_ids": True}, {"stream_options": {"include_usage": True}}])
async def test_a_request_with_the_refused_field_itself_gets_the_refusal(style: Any, fields: dict[str, Any]) -> None:  # noqa: ANN401
    name = next(iter(fields))
    async with serving(Options(rejects=frozenset(fields), reject_style=style)) as (simulator, pool):
        error = await error_of(pool, {**REQUEST, **fields})
        assert (error.code, error.retryable, len(simulator.served)) == ("invalid_request", False, 1)
        assert name in error.message
        # The worker learns of the refusal from another request. A later request with the field is refused as before.
        await request_answer(pool)
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
        answer, parser = await request_answer(pool)
        assert answer.choices[0].token_ids
        assert parser.usage
        assert simulator.served[-1].request.keys() >= BOTH


def test_fields_of_the_request_itself_are_sent() -> None:
    own: Object = {"top_k": 5, "stream": False, "stream_options": {"continuous_usage_stats": True}}
    body = body_for(own, frozenset())
    options = {"continuous_usage_stats": True, "include_usage": True}
    assert body == {"top_k": 5, "stream": True, "return_token_ids": True, "stream_options": options}
    assert own == {"top_k": 5, "stream": False, "stream_options": {"continuous_usage_stats": True}}
    assert body_for({"stream_options": None}, frozenset())["stream_options"] == {"include_usage": True}
    assert body_for({}, BOTH) == {"stream": True}

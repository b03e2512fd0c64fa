"""Chat completions through the gateway, by the stock client of OpenAI."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from conftest import StartSimulator, StartWorker, stream
from gateway_fixtures import KEY_B, KEYS, Served, StartGateway
from openai import APIError, APIStatusError, AsyncOpenAI
from openai.types.chat import ChatCompletionChunk
from openai_reading import without_nothing
from raw_posts import RawPost
from redis.asyncio import Redis
from rooms import whole_room
from waits import eventually

from worker import Client
from worker.gateway.answers import AnswerPace
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator

Object = dict[str, Any]
ASK: list[Any] = [{"role": "user", "content": "Who are you?"}]
TEXT = answer_to(ASK)
BODY: Object = {"model": "reciter", "messages": ASK}
WEATHER: Object = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "w",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WHOLE = {"include_usage": True}
CALLS: dict[str, Object] = {
    "text": {},
    "usage": {"stream_options": WHOLE},
    "usage in each": {"stream_options": WHOLE | {"continuous_usage_stats": True}},
    "token ids": {"return_token_ids": True, "stream_options": WHOLE | {"continuous_usage_stats": True}},
    "logprobs": {"logprobs": True, "top_logprobs": 2, "max_tokens": 8},
    "tools": {"messages": [{"role": "user", "content": "Weather in Paris"}], "tools": [WEATHER]},
    "choices": {"n": 3, "max_tokens": 20},
    "stop": {"stop": ["an AI"]},
    "length": {"max_tokens": 3},
}
KINDS = ("asked", "unanswered")
_VARYING = {"id", "created", "prompt_text"}


@pytest.fixture
async def ai(gateway: Served) -> AsyncIterator[AsyncOpenAI]:
    async with openai(gateway.url) as client:
        yield client


def openai(url: str, key: str = "none", **options: Any) -> AsyncOpenAI:  # noqa: ANN401 - of the client
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=key, **({"max_retries": 0} | options))


def split(fields: Object) -> Object:
    """The fields of a request as the client takes them: what it does not know is in `extra_body`."""
    own = {"return_token_ids"}
    extra = {name: value for name, value in fields.items() if name in own}
    return {name: value for name, value in (BODY | fields).items() if name not in own} | {"extra_body": extra}


def shown(value: Any) -> Any:  # noqa: ANN401 - JSON
    """What is the same from the gateway and from the server: all but ids, times and what is empty."""
    if isinstance(value, list):
        return [shown(one) for one in value]
    if isinstance(value, dict):
        return {name: shown(one) for name, one in value.items() if name not in _VARYING}
    return value


async def chunks_of(client: AsyncOpenAI, **fields: Any) -> list[ChatCompletionChunk]:  # noqa: ANN401 - of a request
    return [chunk async for chunk in await client.chat.completions.create(**split(fields), stream=True)]


async def texts(client: AsyncOpenAI, **fields: Any) -> str:  # noqa: ANN401 - of a request
    return "".join(chunk.choices[0].delta.content or "" for chunk in await chunks_of(client, **fields))


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("fields", CALLS.values(), ids=CALLS.keys())
async def test_a_stream_has_the_same_chunks_as_that_of_the_server(
    fields: Object, ai: AsyncOpenAI, simulator: Simulator
) -> None:
    async with openai(simulator.url) as direct:
        expected, found = [
            [without_nothing(without_nothing(shown(chunk.to_dict()))) for chunk in await chunks_of(client, **fields)]
            for client in (direct, ai)
        ]
    assert found == expected


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("fields", CALLS.values(), ids=CALLS.keys())
async def test_a_whole_answer_is_the_same_as_that_of_the_server(
    fields: Object, ai: AsyncOpenAI, simulator: Simulator
) -> None:
    fields = {name: value for name, value in fields.items() if name != "stream_options"}
    async with openai(simulator.url) as direct:
        expected, found = [
            without_nothing(without_nothing(shown((await client.chat.completions.create(**split(fields))).to_dict())))
            for client in (direct, ai)
        ]
    assert found == expected


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("fields", [{"model": "nope"}, {"temperature": -3}, {"max_tokens": 1_000_000}], ids=str)
async def test_a_refusal_of_the_server_is_a_status_with_its_message(
    fields: Object, simulator: Simulator, start_gateway: StartGateway, *, streams: bool
) -> None:
    gateway = await start_gateway(grace=30)
    async with openai(simulator.url) as direct, openai(gateway.url) as relayed:
        expected, found = [
            await refusal(client.chat.completions.create(**split(fields), stream=streams))
            for client in (direct, relayed)
        ]
    assert found.status_code == expected.status_code
    ours, theirs = found.response.json()["error"], expected.response.json()["error"]
    assert ours["message"] == theirs["message"]
    assert set(ours) == {"message", "type", "param", "code"}
    assert len(found.response.headers["x-request-id"]) == 48


async def refusal(call: Any) -> APIStatusError:  # noqa: ANN401 - of the client
    with pytest.raises(APIStatusError) as caught:
        await call
    return caught.value


async def test_an_error_after_text_is_an_error_of_the_client(
    ai: AsyncOpenAI, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(fault="error_under_200", after=3))), tries=1)
    with pytest.raises(APIError) as caught:
        await texts(ai, n=2)
    assert caught.value.code in {"stream_restarted", "upstream_error"}


async def test_a_job_that_waits_shows_its_place_in_the_queue(
    gateway: Served, client: Client, http: httpx.AsyncClient
) -> None:
    before = await client.enqueue(BODY)
    async with http.stream("POST", f"{gateway.url}/v1/chat/completions", json=BODY | {"stream": True}) as response:
        assert response.status_code == 200
        lines = response.aiter_lines()
        async for line in lines:
            if line.startswith(": queued"):
                break
        assert line == ": queued 1"
        await client.cancel(before)
        await client.cancel(response.headers["x-request-id"])
        rest = [line async for line in lines if line.startswith("data")]
    assert json.loads(rest[0].removeprefix("data: "))["error"]["code"] == "cancelled"
    assert rest[1:] == ["data: [DONE]"]


async def test_options_in_the_body_and_in_headers_become_those_of_the_job(
    start_gateway: StartGateway, redis: Redis, client: Client, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway(grace=0)
    url = f"{gateway.url}/v1/chat/completions"
    relay = {"queue": "batch", "timeout": 60, "retention": 90, "fallbacks": ["other"], "tenant": "acme"}
    headers = {"Relay-Queue": "batch", "Relay-Timeout": "60", "Relay-Retention": "90", "Relay-Fallbacks": "other"}
    ids = []
    for body, own in ({"relay": relay}, {}), ({"relay": {"tenant": "acme"}}, headers):
        async with http.stream("POST", url, json=BODY | {"stream": True} | body, headers=own) as response:
            ids.append(response.headers["x-request-id"])
    for _, fields in await stream(redis, "chat:jobs:batch"):
        assert json.loads(fields[b"request"]) == BODY | {"stream": True}
        assert (fields[b"retention"], fields[b"fallbacks"], fields[b"tenant"]) == (b"90", b'["other"]', b"acme")
    assert await redis.xlen("chat:jobs:batch") == 2
    for request_id in ids:
        await client.cancel(request_id)


BAD: dict[str, tuple[Any, dict[str, str], int]] = {
    "no JSON": (b"{", {}, 400),
    "a list": (b"[]", {}, 400),
    "not UTF-8": (b'{"messages": "\xff"}', {}, 400),
    "nested deeply": (b"[" * 9_000, {}, 400),
    "no messages": ({"model": "m"}, {}, 400),
    "messages of text": (BODY | {"messages": "Hi"}, {}, 400),
    "messages of numbers": (BODY | {"messages": [1]}, {}, 400),
    "empty messages": (BODY | {"messages": []}, {}, 400),
    "stream as text": (BODY | {"stream": "yes"}, {}, 400),
    "model as number": (BODY | {"model": 5}, {}, 400),
    "n as text": (BODY | {"n": "2"}, {}, 400),
    "stream_options as list": (BODY | {"stream_options": []}, {}, 400),
    "a field of the worker": (BODY | {"kv_transfer_params": {}}, {}, 400),
    "relay as list": (BODY | {"relay": [1]}, {}, 400),
    "relay as empty list": (BODY | {"relay": []}, {}, 400),
    "tenant with a line break": (BODY | {"relay": {"tenant": "x\ny"}}, {}, 400),
    "unknown option": (BODY | {"relay": {"priority": 1}}, {}, 400),
    "id as option": (BODY | {"relay": {"id": "mine"}}, {}, 400),
    "timeout as text": (BODY | {"relay": {"timeout": "soon"}}, {}, 400),
    "timeout in the past": (BODY | {"relay": {"timeout": -1}}, {}, 400),
    "bad queue": (BODY | {"relay": {"queue": "a b"}}, {}, 400),
    "fallbacks as text": (BODY | {"relay": {"fallbacks": "m"}}, {}, 400),
    "bad timeout header": (BODY, {"Relay-Timeout": "soon"}, 400),
    "bad disconnect header": (BODY, {"Relay-On-Disconnect": "maybe"}, 400),
    "long key": (BODY, {"Idempotency-Key": "k" * 256}, 400),
    "a place without a key": (BODY | {"stream": True}, {"Relay-After": "3"}, 400),
    "a bad place": (BODY | {"stream": True}, {"Relay-After": "-1", "Idempotency-Key": "k"}, 400),
    "a place of another script": (BODY | {"stream": True}, {"Relay-After": "1_0", "Idempotency-Key": "k"}, 400),
    "a huge place": (BODY | {"stream": True}, {"Relay-After": "9" * 5000, "Idempotency-Key": "k"}, 400),
    "a place in an unknown answer": (BODY | {"stream": True}, {"Relay-After": "1", "Idempotency-Key": "k"}, 410),
    "too large": (BODY | {"messages": [{"role": "user", "content": "x" * 20_000}]}, {}, 413),
}


async def test_malformed_requests_are_refused_in_openais_shape_and_add_no_job(
    start_gateway: StartGateway, redis: Redis, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway(max_body_bytes=10_000)
    url = f"{gateway.url}/v1/chat/completions"
    for name, (body, headers, status) in BAD.items():
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await http.post(url, content=content, headers={"Content-Type": "application/json"} | headers)
        assert response.status_code == status, (name, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, name
        assert "xxxx" not in response.text
        assert error["message"], name
    assert (await http.get(url)).status_code == 405
    assert not [key async for key in redis.scan_iter("chat:jobs*")]
    assert not [key async for key in redis.scan_iter("chat:tokens*")]


async def test_a_caller_without_a_key_or_with_a_wrong_one_gets_401(
    start_gateway: StartGateway, redis: Redis, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway(keys=KEYS)
    for path in ("/v1/chat/completions", "/v1/models", "/v1/models/reciter"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            method = "POST" if path.endswith("completions") else "GET"
            response = await http.request(method, gateway.url + path, json=BODY, headers=headers)
            assert response.status_code == 401
    assert not await redis.exists("chat:jobs")


@pytest.mark.usefixtures("worker")
async def test_a_key_with_a_tenant_speaks_for_no_other(start_gateway: StartGateway, redis: Redis) -> None:
    gateway = await start_gateway(keys=KEYS)
    async with openai(gateway.url, KEY_B) as client:
        error = await refusal(client.chat.completions.create(**BODY, extra_body={"relay": {"tenant": "acme"}}))
        assert error.status_code == 403
        answer = await client.chat.completions.create(**BODY)
        assert answer.choices[0].message.content == TEXT
    ((_, fields),) = [entry for entry in await stream(redis, "chat:lifecycle") if entry[1][b"type"] == b"finished"]
    assert fields[b"tenant"] == b"b-tenant"


@pytest.mark.usefixtures("worker")
async def test_the_models_are_those_of_the_servers(ai: AsyncOpenAI) -> None:
    async def listed() -> bool:
        return [model.id for model in (await ai.models.list()).data] == ["reciter"]

    await eventually(listed)
    assert (await ai.models.retrieve("reciter")).owned_by == "vllm"
    assert (await refusal(ai.models.retrieve("a/b"))).status_code == 404


async def test_a_full_queue_is_a_429_that_leaves_nothing_behind(
    start_gateway: StartGateway, redis: Redis, client: Client
) -> None:
    gateway = await start_gateway(queue_limit=1)
    waiting = await client.enqueue(BODY)
    async with openai(gateway.url) as ai:
        error = await refusal(ai.chat.completions.create(**BODY))
    assert error.status_code == 429
    assert "retry-after" in error.response.headers
    assert await redis.xlen("chat:jobs") == 1
    assert not [key async for key in redis.scan_iter("chat:gateway:running*")]
    await client.cancel(waiting)


async def test_a_whole_answer_that_takes_long_begins_with_spaces(
    start_gateway: StartGateway, http: httpx.AsyncClient, simulator: Simulator, start_worker: StartWorker
) -> None:
    gateway = await start_gateway(rooms=(whole_room(AnswerPace(grace=0.05, keep_alive=0.05)),))
    async with http.stream("POST", f"{gateway.url}/v1/chat/completions", json=BODY) as response:
        pieces = response.aiter_raw()
        assert [await anext(pieces) for _ in range(3)] == [b" "] * 3
        await start_worker(simulator)
        body = b"".join([piece async for piece in pieces])
    assert json.loads(body)["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "closed"])
async def test_a_retry_attaches_to_a_whole_answer_whose_connection_was_reset_after_its_head(
    start_gateway: StartGateway, simulator: Simulator, start_worker: StartWorker, *, is_cut: bool
) -> None:
    """A client that has read everything closes without a reset, and a retry is then of another request."""
    await start_worker(simulator, lease=60, gap_timeout=60, first_token_timeout=60)
    gateway = await start_gateway(rooms=(whole_room(AnswerPace(receipt=2.0)),))
    first = await RawPost.send(gateway.port, BODY)
    assert await first.read_head() == 200
    (first.reset if is_cut else first.close)()
    second = await RawPost.send(gateway.port, BODY, x_stainless_retry_count="1")
    assert await second.read_head() == 200
    assert (second.request_id == first.request_id) is is_cut
    second.close()
    assert len(simulator.served) == (1 if is_cut else 2)


async def test_a_whole_answer_that_fails_after_spaces_is_a_broken_connection_and_then_a_status(
    start_gateway: StartGateway, redis: Redis, simulator: Simulator, start_worker: StartWorker
) -> None:
    """Clients do not look for an error in a body with status 200."""
    gateway = await start_gateway(rooms=(whole_room(AnswerPace(grace=2.0, keep_alive=0.05)),))
    async with openai(gateway.url, max_retries=5) as ai:  # on a busy machine, a retry too may get a space first
        asking = asyncio.create_task(ai.chat.completions.create(**BODY | {"temperature": -3}))

        async def has_a_byte() -> bool:
            asked, unanswered = [[key async for key in redis.scan_iter(f"chat:gateway:{kind}:*")] for kind in KINDS]
            return bool(asked) and not unanswered

        await eventually(has_a_byte)
        await start_worker(simulator, lease=60, gap_timeout=60, first_token_timeout=60)
        with pytest.raises(APIStatusError) as caught:
            await asking
    assert caught.value.status_code == 400
    assert len(simulator.served) == 1


async def test_a_failure_under_an_idempotency_key_is_not_repeated(
    start_gateway: StartGateway, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    """The key would get the same failure again. Without a key, the SDK's retry is a new job."""
    simulator = await start_simulator(Options(model="broken", scenario=Scenario(fault="500")))
    await start_worker(simulator, lease=60, gap_timeout=60, first_token_timeout=60, tries=1)
    gateway = await start_gateway(grace=30)
    async with openai(gateway.url, max_retries=1) as ai:
        for streams in (True, False):
            call = BODY | {"model": "broken", "stream": streams}
            error = await refusal(ai.chat.completions.create(**call, extra_headers={"Idempotency-Key": f"{streams}"}))
            assert error.response.headers["x-should-retry"] == "false"
    assert len(simulator.served) == 2


@pytest.mark.parametrize("drain", [30.0, 0.0], ids=["in time", "too late"])
async def test_a_gateway_that_stops_lets_answers_end_within_its_time(
    drain: float, start_gateway: StartGateway, start_simulator: StartSimulator, start_worker: StartWorker
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=20, tokens=30 if drain else 600))))
    gateway = await start_gateway(drain_timeout=drain)
    async with openai(gateway.url) as ai:
        answer = await ai.chat.completions.create(**BODY, stream=True)
        chunks = [await anext(answer)]
        gateway.gateway.stop()
        if drain:
            chunks += [chunk async for chunk in answer]
            assert chunks[-1].choices[0].finish_reason == "stop"
            return
        with pytest.raises(APIError) as caught:
            async for _ in answer:
                pass
    assert caught.value.code == "interrupted"


async def test_a_gateway_that_stops_before_an_answer_begins_says_so_with_a_status(
    start_gateway: StartGateway, redis: Redis, client: Client, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway(grace=30, drain_timeout=0)
    url = f"{gateway.url}/v1/chat/completions"
    asking = [asyncio.create_task(http.post(url, json=BODY | {"stream": streams})) for streams in (True, False)]

    async def wait() -> bool:
        return int(await redis.xlen("chat:jobs")) == 2

    await eventually(wait)
    gateway.gateway.stop()
    for response in await asyncio.gather(*asking):
        assert (response.status_code, response.json()["error"]["code"]) == (503, "interrupted")
        assert "x-should-retry" not in response.headers
        await client.cancel(response.headers["x-request-id"])

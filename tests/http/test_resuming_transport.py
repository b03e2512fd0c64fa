"""The clients of openai, httpx and httpx2 over `ResumingTransport`, against a gateway that breaks off."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any, TypeAlias

import httpx
import httpx2
import openai
import pytest
from broken_gateway import TEXT, WORDS, End, Plan, broken_gateway
from waits import eventually

from worker.http import ResumingTransport

Read: TypeAlias = Callable[..., Awaitable[str]]
MESSAGES: Any = [{"role": "user", "content": "Recite"}]
BREAKS = [
    Plan(1, "reset"),
    Plan(0, "reset", torn=b'data: {"choices":[{"del'),
    Plan(5, "clean"),
    Plan(3, "interrupted"),
    Plan(before=True),
    Plan(status=503, headers=("Retry-After: 0",)),
    Plan(2, "reset", torn="data: é".encode()[:-1]),
]
"""Ways in which a connection breaks: together they pass on 11 of the events."""


async def read_async(library: ModuleType, url: str, limit: float = 30.0) -> str:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="k",
        http_client=library.AsyncClient(transport=ResumingTransport(limit=limit)),
        max_retries=0,
    ) as client:
        stream = await client.chat.completions.create(model="reciter", messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def read_sync(library: ModuleType, url: str, limit: float = 30.0) -> str:
    def read() -> str:
        with openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="k",
            http_client=library.Client(transport=ResumingTransport(limit=limit)),
            max_retries=0,
        ) as client:
            stream = client.chat.completions.create(model="reciter", messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    return await asyncio.to_thread(read)


both_ways = pytest.mark.parametrize("read", [read_async, read_sync])
both_libraries = pytest.mark.parametrize("library", [httpx, httpx2])


@both_ways
@both_libraries
async def test_a_stream_that_breaks_in_every_way_arrives_whole(read: Read, library: ModuleType) -> None:
    async with broken_gateway(Plan(1, "reset"), *BREAKS, Plan()) as gateway:
        assert await read(library, gateway.url) == TEXT
    assert len({headers["idempotency-key"] for headers in gateway.requests}) == 1
    cursors = [headers.get("relay-after", "0") for headers in gateway.requests]
    assert cursors == ["0", "1", "2", "2", "7", "10", "10", "10", "12"]


@both_ways
@both_libraries
async def test_a_stream_that_never_goes_on_ends_in_an_error(read: Read, library: ModuleType) -> None:
    async with broken_gateway(Plan(3, "reset"), Plan(before=True)) as gateway:
        with pytest.raises(openai.APIConnectionError):
            await read(library, gateway.url, limit=0.3)


@both_ways
async def test_an_answer_that_is_gone_ends_in_an_error_at_once(read: Read) -> None:
    async with broken_gateway(Plan(3, "reset"), Plan(status=410)) as gateway:
        with pytest.raises(openai.APIConnectionError, match="Connection error") as raised:
            await read(httpx, gateway.url)
    assert "HTTP 410" in str(raised.value.__cause__)
    assert len(gateway.requests) == 2


@both_ways
@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 503])
async def test_a_first_answer_that_refuses_is_untouched(read: Read, status: int) -> None:
    async with broken_gateway(Plan(status=status)) as gateway:
        with pytest.raises(openai.APIStatusError) as raised:
            await read(httpx, gateway.url)
    assert raised.value.status_code == status
    assert raised.value.code == "no"
    assert len(gateway.requests) == 1


@both_ways
async def test_another_answer_does_not_continue_the_stream(read: Read) -> None:
    """As of a server that is no gateway: it begins a new answer."""
    async with broken_gateway(Plan(3, "reset"), Plan()) as gateway:
        original = gateway.answer_id
        gateway.answer_id = lambda key: original(key + str(len(gateway.requests)))
        with pytest.raises(openai.APIConnectionError):
            await read(httpx, gateway.url)
    assert len(gateway.requests) == 2


async def test_a_retry_of_the_sdk_has_the_key_of_the_first_call() -> None:
    async with (
        broken_gateway(Plan(status=503, headers=("retry-after-ms: 1",)), Plan()) as gateway,
        openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1",
            api_key="k",
            http_client=httpx2.AsyncClient(transport=ResumingTransport()),
        ) as client,
    ):
        stream = await client.chat.completions.create(model="reciter", messages=MESSAGES, stream=True)
        assert len([chunk async for chunk in stream]) == len(WORDS) + 2
        again = await client.chat.completions.create(model="reciter", messages=MESSAGES, stream=True)
        await again.close()
    first, second, third = [headers["idempotency-key"] for headers in gateway.requests]
    assert first == second != third


async def test_the_callers_own_key_and_cursor_are_kept() -> None:
    headers = {"Idempotency-Key": "mine", "Relay-After": "21"}
    async with (
        broken_gateway(Plan(1, "reset"), Plan()) as gateway,
        httpx.AsyncClient(transport=ResumingTransport()) as client,
    ):
        answer = await client.post(f"{gateway.url}/v1/chat/completions", json={"stream": True}, headers=headers)
    events = [event for event in answer.text.split("\n\n") if event.startswith("data:")]
    assert len(events) == 2
    assert events[-1] == "data: [DONE]"
    assert [sent["relay-after"] for sent in gateway.requests] == ["21", "22"]
    assert {sent["idempotency-key"] for sent in gateway.requests} == {"mine"}


async def test_native_events_go_on_after_the_last_id_until_204() -> None:
    async with (
        broken_gateway(Plan(3, "reset"), Plan(4, "clean"), Plan(before=True), Plan()) as gateway,
        httpx.AsyncClient(transport=ResumingTransport()) as client,
    ):
        answer = await client.get(f"{gateway.url}/requests/1/events")
    assert [line for line in answer.text.splitlines() if line.startswith("id:")] == [f"id: {n}" for n in range(1, 21)]
    cursors = [headers.get("last-event-id") for headers in gateway.requests]
    assert cursors == [None, "3", "7", "7", "20"]


async def test_other_requests_are_untouched() -> None:
    async with (
        broken_gateway(Plan(before=True)) as gateway,
        httpx.AsyncClient(transport=ResumingTransport()) as client,
    ):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(f"{gateway.url}/requests", json={})
    (headers,) = gateway.requests
    assert "idempotency-key" not in headers


async def test_a_silent_connection_is_replaced_after_the_read_timeout() -> None:
    """A busy machine makes a connection silent before its last event too, so its cursor may be any."""
    timeout = httpx.Timeout(60, read=1)
    async with (
        broken_gateway(Plan(3, "silent"), Plan()) as gateway,
        httpx.AsyncClient(transport=ResumingTransport(), timeout=timeout) as client,
    ):
        answer = await client.post(f"{gateway.url}/v1/chat/completions", json={"stream": True})
    frames = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    texts = [json.loads(frame)["choices"][0]["delta"].get("content", "") for frame in frames[:-1]]
    assert ("".join(texts), frames[-1]) == (TEXT, "[DONE]"), "every event comes once"
    assert len(gateway.requests) > 1


@pytest.mark.parametrize("events", [0, 3])
@pytest.mark.parametrize(("end", "requests"), [("silent", 1), ("reset", 3)])
async def test_a_caller_may_leave_at_every_moment(end: End, requests: int, events: int) -> None:
    """While the stream is open, and while the transport waits for its next try."""

    async def read(client: httpx.AsyncClient, url: str) -> None:
        async with client.stream("POST", f"{url}/v1/chat/completions", json={}) as answer:
            async for _ in answer.aiter_lines():
                pass

    async def enough() -> bool:
        return len(gateway.requests) >= requests

    async with (
        broken_gateway(Plan(events, end), Plan(before=True)) as gateway,
        httpx.AsyncClient(transport=ResumingTransport()) as client,
    ):
        reading = asyncio.create_task(read(client, gateway.url))
        await eventually(enough)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

"""`/client.js` in Node, against a gateway that breaks off."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from broken_gateway import TEXT, Plan, broken_gateway

import worker

CLIENT = Path(worker.__file__).parent / "gateway/page/client.js"
SCRIPT = Path(__file__).with_name("drivers") / "resuming_fetch.mjs"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="node is missing")

BREAKS = [
    Plan(1, "reset"),
    Plan(0, "reset", torn=b'data: {"choices":[{"del'),
    Plan(5, "clean"),
    Plan(3, "interrupted"),
    Plan(before=True),
    Plan(status=503, headers=("Retry-After: 0",)),
    Plan(2, "reset", torn="data: é".encode()[:-1]),
]


async def call(url: str, what: str, limit: int = 30_000) -> dict[str, Any]:
    """What the script prints. A process that does not end by itself fails the test by its timeout."""
    process = await asyncio.create_subprocess_exec(
        str(NODE), str(SCRIPT), str(CLIENT), url, what, str(limit), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    result: dict[str, Any] = json.loads(output)
    return result


def text_of(stream: str) -> str:
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


@pytest.mark.parametrize("what", ["text", "default", "request"])
async def test_a_stream_that_breaks_in_every_way_arrives_whole(what: str) -> None:
    async with broken_gateway(Plan(1, "reset"), *BREAKS, Plan()) as gateway:
        answer = await call(gateway.url, what)
    assert text_of(answer["text"]) == TEXT
    assert answer["text"].endswith("data: [DONE]\n\n")
    assert len({headers["idempotency-key"] for headers in gateway.requests}) == 1
    cursors = [headers.get("relay-after", "0") for headers in gateway.requests]
    assert cursors == ["0", "1", "2", "2", "7", "10", "10", "10", "12"]


async def test_a_stream_that_never_goes_on_ends_in_an_error() -> None:
    async with broken_gateway(Plan(3, "reset"), Plan(before=True)) as gateway:
        answer = await call(gateway.url, "text", 300)
    assert answer["error"] == "fetch failed"


async def test_an_answer_that_is_gone_ends_in_an_error_at_once() -> None:
    async with broken_gateway(Plan(3, "reset"), Plan(status=410)) as gateway:
        answer = await call(gateway.url, "text")
    assert "HTTP 410" in answer["error"]
    assert len(gateway.requests) == 2


@pytest.mark.parametrize("status", [400, 404, 429, 503])
async def test_a_first_answer_that_refuses_is_untouched(status: int) -> None:
    async with broken_gateway(Plan(status=status)) as gateway:
        answer = await call(gateway.url, "refused")
    assert answer["status"] == status
    assert json.loads(answer["text"])["error"]["code"] == "no"
    assert len(gateway.requests) == 1


async def test_another_answer_does_not_continue_the_stream() -> None:
    async with broken_gateway(Plan(3, "reset"), Plan()) as gateway:
        original = gateway.answer_id
        gateway.answer_id = lambda key: original(key + str(len(gateway.requests)))
        answer = await call(gateway.url, "text")
    assert "cannot go on" in answer["error"]
    assert len(gateway.requests) == 2


async def test_a_retry_of_the_sdk_has_the_key_of_the_first_call() -> None:
    async with broken_gateway(Plan(status=503), Plan()) as gateway:
        assert await call(gateway.url, "retried") == {"statuses": [503, 200, 200]}
    first, second, third = [headers["idempotency-key"] for headers in gateway.requests]
    assert first == second != third


async def test_the_callers_own_key_and_cursor_are_kept() -> None:
    async with broken_gateway(Plan(1, "reset"), Plan()) as gateway:
        answer = await call(gateway.url, "ownKey")
    assert answer["text"].count("data:") == 2
    assert [sent["relay-after"] for sent in gateway.requests] == ["21", "22"]
    assert {sent["idempotency-key"] for sent in gateway.requests} == {"mine"}


async def test_native_events_go_on_after_the_last_id_until_204() -> None:
    async with broken_gateway(Plan(3, "reset"), Plan(4, "clean"), Plan(before=True), Plan()) as gateway:
        answer = await call(gateway.url, "events")
    assert [line for line in answer["text"].splitlines() if line.startswith("id:")] == [
        f"id: {n}" for n in range(1, 21)
    ]
    assert [headers.get("last-event-id") for headers in gateway.requests] == [None, "3", "7", "7", "20"]


async def test_other_requests_are_untouched() -> None:
    async with broken_gateway(Plan(before=True)) as gateway:
        assert (await call(gateway.url, "other"))["error"] == "fetch failed"
    (headers,) = gateway.requests
    assert "idempotency-key" not in headers


async def test_a_silent_connection_is_replaced() -> None:
    """After 0.3 s. A busy machine makes a connection silent before its last event too, so its cursor may be any."""
    async with broken_gateway(Plan(3, "silent"), Plan()) as gateway:
        answer = await call(gateway.url, "silent")
    assert text_of(answer["text"]) == TEXT, "every event comes once"
    assert len(gateway.requests) > 1


@pytest.mark.parametrize("plans", [[Plan(before=True)], [Plan(3, "silent")], [Plan(3, "reset"), Plan(before=True)]])
async def test_an_abort_works_at_every_moment(plans: list[Plan]) -> None:
    """Before the head, in the open stream, and between two tries."""
    async with broken_gateway(*plans) as gateway:
        answer = await call(gateway.url, "abort")
    assert answer["error"] == "enough"


async def test_a_cancelled_body_closes_the_connection() -> None:
    async with broken_gateway(Plan(3, "silent")) as gateway:
        answer = await call(gateway.url, "cancel")
    assert answer["first"]
    assert len(gateway.requests) == 1

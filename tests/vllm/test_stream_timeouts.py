"""The time limits of a stream: until the first token, and between two events."""

import asyncio
from time import monotonic
from typing import Any

import pytest
from raw_server import sending
from streaming import (
    HEAD,
    JSON_HEAD,
    REQUEST,
    WHO,
    asking,
    enough,
    error_of,
    error_of_server,
    opened,
    reaching,
    request_answer,
    serving,
    until,
)

from worker.contract.entries import Object, to_json
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.http.transport import Transport
from worker.vllm.stream.watchdog import StreamTimeouts, StreamWatchdog

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
    async with sending(HEAD + b"\r\n", then_close=False) as url, Transport() as transport:
        stream = await opened(transport, url, since=monotonic() - 9)
        async with asyncio.timeout(8):  # counted from the head, the limit would be reached after 10 s
            with pytest.raises(UpstreamError, match="within 10 s"):
                await stream.read_into(enough)
        await stream.aclose()


async def test_a_watchdog_can_be_tightened_after_its_timeout() -> None:
    watchdog = StreamWatchdog(SHORT_FIRST)

    async def tightened_at_the_end() -> None:
        with watchdog:
            try:
                await asyncio.Event().wait()
            finally:
                watchdog.tighten()

    with pytest.raises(TimeoutError):
        await tightened_at_the_end()


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
    limits = StreamTimeouts(first_token=2.5, gap=2.5)  # longer than a busy machine keeps this process from running
    async with (
        sending(HEAD + b"\r\n" + role, then_close=False, again=nothing) as url,
        reaching(url, limits=limits) as pool,
    ):
        parser = ChunkParser()
        async with pool.stream(pool.servers[0], REQUEST) as stream:
            stream.has_output = lambda: parser.has_output
            for data in (b"", text[6:]):  # before the first token, and after it
                parser.parse(data)
                end = monotonic() + 3
                while monotonic() < end:
                    await stream.read_into(enough)


async def test_comments_do_not_fill_a_gap() -> None:
    async with serving(Options(keep_alive=0.005), SHORT_GAP) as (simulator, pool):
        assert (await error_of(pool, asking(fault="freeze", after=3))).code == "gap_timeout"
        await until(lambda: simulator.served[-1].closed_early)


async def test_the_gap_limit_is_between_events_and_not_for_the_whole_answer() -> None:
    async with serving(limits=StreamTimeouts(first_token=2.5, gap=2.5)) as (_, pool):
        answer, _ = await request_answer(pool, asking(tokens=60, rate=20))  # takes 3 s
    assert answer.text == answer_to(WHO, tokens=60)


async def test_a_completion_that_stops_half_way_does_not_hang() -> None:
    error = await error_of_server(JSON_HEAD + b'{"choices":', limits=SHORT_GAP, then_close=False)
    assert (error.code, error.retryable) == ("gap_timeout", True)

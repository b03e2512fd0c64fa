"""How a server's finish reason decides about an answer, from its bytes to the seal."""

import asyncio
import json

import pytest
from conftest import StartWorker
from raw_server import sending
from structlog.testing import capture_logs

from worker import Client
from worker.telemetry.logging import configure_logging

REQUEST = {"messages": [{"role": "user", "content": "a secret prompt"}]}


def answer_that_ends(reason: str) -> bytes:
    chunks = [{"choices": [{"delta": {"content": text}}]} for text in ("", "a")] + [
        {"choices": [{"delta": {}, "finish_reason": reason}]}
    ]
    events = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + events


async def test_an_unknown_finish_reason_is_done_and_named(client: Client, start_worker: StartWorker) -> None:
    configure_logging("json", "info")
    async with sending(answer_that_ends("because")) as url:
        worker = await start_worker(vllm_urls=url)
        with capture_logs() as logs:
            answer = await client.result(await client.enqueue(REQUEST))
    assert (answer.outcome, answer.text, answer.finish_reason) == ("done", "a", "because")
    (line,) = [line for line in logs if line["event"] == "unknown_finish_reason"]
    assert (line["reason"], line["endpoint"]) == ("because", url)
    name = "vllm_relay_unknown_finish_reasons_total"
    assert worker.metrics.registry.get_sample_value(name, {"reason": "because"}) == 1


@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
async def test_an_answer_that_its_server_broke_off_is_not_done(
    client: Client, start_worker: StartWorker, reason: str
) -> None:
    async with sending(answer_that_ends(reason)) as url:
        await start_worker(vllm_urls=url, tries=1)
        answer = await client.result(await client.enqueue(REQUEST))
    assert (answer.outcome, answer.error) == ("error", f"vLLM broke the answer off ({reason}) (upstream_aborted)")


async def test_a_role_long_before_the_text_does_not_start_the_gap_timeout(
    client: Client, start_worker: StartWorker
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head, role, rest = answer_that_ends("stop").partition(b'data: {"choices": [{"delta": {"content": ""}}]}\n\n')
        writer.write(head + role)
        await asyncio.sleep(0.3)  # longer than the gap timeout; no other limit applies
        writer.write(rest)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await start_worker(vllm_urls=url, tries=1, gap_timeout=0.1)
        answered = await client.result(await client.enqueue(REQUEST))
    assert (answered.outcome, answered.text, answered.error) == ("done", "a", "")


@pytest.mark.parametrize("place", ["delta", "choice", "chunk", "after [DONE]"])
async def test_text_beside_an_error_is_in_the_log_and_the_error_ends_it(
    client: Client, start_worker: StartWorker, place: str
) -> None:
    error = {"message": "no such thing", "code": 400}
    lasts: dict[str, list[object]] = {
        "delta": [{"choices": [{"delta": {"content": "b", "error": error}, "finish_reason": "error"}]}],
        "choice": [{"choices": [{"delta": {"content": "b"}, "error": error, "finish_reason": "error"}]}],
        "chunk": [{"choices": [{"delta": {"content": "b"}}], "error": error}],
        "after [DONE]": [{"choices": [{"delta": {"content": "b"}}]}, "[DONE]", {"error": error}],
    }
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    chunks: list[object] = [{"choices": [{"delta": {"content": "a"}}]}, *lasts[place]]
    events = [f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n".encode() for one in chunks]
    async with sending(head, *events) as url:
        await start_worker(vllm_urls=url, tries=1)
        answer = await client.result(await client.enqueue(REQUEST))
    assert (answer.outcome, answer.text, answer.error) == ("error", "ab", "no such thing (invalid_request)")


async def test_an_answer_whose_events_end_in_one_line_end_is_read_while_it_flows(
    client: Client, start_worker: StartWorker
) -> None:
    """The server sends nothing more after the text until a reader has it."""
    shown = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        head, *events = answer_that_ends("stop").replace(b"\n\n", b"\n").split(b"data: ")
        writer.write(head + b"".join(b"data: " + event.strip() + b"\n" for event in events[:3]))
        if request.startswith(b"POST"):  # not a probe
            await shown.wait()
        writer.write(b"data: " + events[3].strip() + b"\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        await start_worker(vllm_urls=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", tries=1)
        request_id = await client.enqueue(REQUEST)
        async with asyncio.timeout(60):
            async for entry in client.follow(request_id):
                if getattr(entry, "content", ""):
                    shown.set()
        assert (await client.result(request_id)).text == "a"

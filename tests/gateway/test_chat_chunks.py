"""The chunks of a chat completion that are made from a log, compared with those that vLLM sent."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from openai import APIError
from openai_reading import read_by_openai, without_nothing

from worker.contract.entries import (
    AnyEntry,
    Cancelled,
    Claimed,
    Delta,
    Done,
    Failed,
    Opened,
    Queued,
    Restarted,
    Resumed,
    Started,
    Unknown,
    Usage,
    parse,
    to_fields,
)
from worker.contract.ids import QUEUED, SEAL, EntryId
from worker.gateway.problems import Problem
from worker.gateway.protocols.chat_chunks import ChatChunks, error_in
from worker.gateway.protocols.protocol import without_events
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.stream.sse import SSEDecoder

Object = dict[str, Any]

_TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"
_INDEX: dict[str, Object] = json.loads((_TRANSCRIPTS / "index.json").read_text())
WHOLE = [name for name, entry in _INDEX.items() if entry["events"] > 2 and name != "engine_death_mid_stream"]
OPENED = Opened(id=EntryId(1, 1), response_id="c", model="m", created=5, role="assistant")
DONE = Done(id=SEAL, finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3))


def recorded(name: str) -> tuple[Object, bytes]:
    request: Object = json.loads((_TRANSCRIPTS / f"{name}.request.json").read_bytes())
    return request, (_TRANSCRIPTS / f"{name}.body").read_bytes()


def log_of(request: Object, body: bytes) -> list[AnyEntry]:
    """The log that a worker writes of a response, as a reader gets it."""
    parser = ChunkParser(
        n=request.get("n", 1),
        keep_prompt_ids=request.get("return_token_ids", False),
        keep_usage=request.get("stream_options", {}).get("continuous_usage_stats", False),
    )
    written = [fields for data in SSEDecoder().feed(body) for fields in parser.parse(data)]
    end = Done(
        id=SEAL, finish_reason=parser.finish_reason, usage=cast("Usage", parser.usage), model=parser.model,
        extra=parser.extra,
    )  # fmt: skip
    begin: list[AnyEntry] = [Queued(id=QUEUED, digest="d"), Started(id=EntryId(1, 0))]
    answer = [parse(f"1-{number}", fields) for number, fields in enumerate(written, 1)]
    return [*begin, *answer, parse(str(SEAL), to_fields(end))]


def encoded(log: list[AnyEntry], request: Object | None = None) -> list[bytes]:
    encoder = ChatChunks.of(request or {}).new_encoder()
    return [encoder.encode(entry) for entry in log]


def chunks_in(body: bytes) -> list[Object]:
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    return [json.loads(event) for event in events if event != b"[DONE]"]


def texts_in(body: bytes) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks_in(body))


def delta(n: int, text: str, attempt: int = 1, **more: Any) -> Delta:  # noqa: ANN401 - fields
    return Delta(id=EntryId(attempt, n), content=text, token_ids=[n], **more)


def error_of(body: bytes) -> str:
    """The code of the error with which a stream ends."""
    *_, last = chunks_in(body)
    assert body.endswith(b"data: [DONE]\n\n")
    return str(last["error"]["code"])


@pytest.mark.parametrize("name", WHOLE)
def test_the_chunks_are_those_of_vllm(name: str) -> None:
    request, body = recorded(name)
    ours = b"".join(encoded(log_of(request, body), request))
    shown = [[without_nothing(without_nothing(chunk)) for chunk in chunks_in(one)] for one in (ours, body)]
    assert shown[0] == shown[1]
    assert ours.endswith(b"data: [DONE]\n\n")
    assert all(line.startswith(b"data: ") for line in ours.split(b"\n") if line)


@pytest.mark.parametrize("name", WHOLE)
def test_openais_client_reads_the_same_from_the_gateway_as_from_vllm(name: str) -> None:
    request, body = recorded(name)
    ours = b"".join(encoded(log_of(request, body), request))
    assert without_nothing(read_by_openai(ours)) == without_nothing(read_by_openai(body))


@pytest.mark.parametrize("name", ["plain", "n2", "tool_call_auto", "reasoning", "usage"])
def test_what_a_reader_has_and_the_rest_join_to_the_whole_at_every_event(name: str) -> None:
    request, body = recorded(name)
    log = log_of(request, body)
    whole = b"".join(encoded(log, request))
    for have in range(whole.count(b"\n\n") + 1):
        rest, skip = b"", have
        for piece in encoded(log, request):
            shown, skip = without_events(piece, skip)
            rest += shown
        assert b"".join(event + b"\n\n" for event in whole.split(b"\n\n")[:have]) + rest == whole


def test_what_only_the_worker_requested_is_left_out() -> None:
    log: list[AnyEntry] = [OPENED, delta(2, "a"), delta(3, ""), delta(4, "b", finish_reason="stop"), DONE]
    body = b"".join(encoded(log))
    assert b"token_ids" not in body
    assert b"usage" not in body
    assert len(chunks_in(body)) == 3, "a chunk of token ids alone is none"
    wanted = b"".join(encoded(log, {"return_token_ids": True, "stream_options": {"include_usage": True}}))
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks_in(wanted)[1:-1]] == [[2], [3], [4]]
    assert chunks_in(wanted)[-1]["usage"]["total_tokens"] == 3


def test_usage_in_every_chunk_is_sent_only_to_who_wants_it_at_the_end_too() -> None:
    log: list[AnyEntry] = [OPENED, delta(2, "a", extra={"chunk": {"usage": {"total_tokens": 2}}}), DONE]
    both = {"include_usage": True, "continuous_usage_stats": True}
    for options, count in ({"continuous_usage_stats": True}, 0), ({"include_usage": True}, 1), (both, 2):
        assert b"".join(encoded(log, {"stream_options": options})).count(b'"usage"') == count


def test_an_answer_without_usage_has_no_chunk_without_choices() -> None:
    log: list[AnyEntry] = [OPENED, delta(2, "a"), Done(id=SEAL)]
    assert all(
        chunk["choices"] for chunk in chunks_in(b"".join(encoded(log, {"stream_options": {"include_usage": True}})))
    )


def test_a_resumed_answer_is_one_stream_with_one_id() -> None:
    log: list[AnyEntry] = [
        OPENED, delta(2, "a"), Claimed(id=EntryId(2, 0)), Resumed(id=EntryId(2, 1), after="1-2"),
        Opened(id=EntryId(2, 2), response_id="d", model="m", created=9, role="assistant"), delta(3, "b", 2), DONE,
    ]  # fmt: skip
    body = b"".join(encoded(log))
    assert texts_in(body) == "ab"
    assert {chunk["id"] for chunk in chunks_in(body)} == {"c"}
    assert sum("role" in chunk["choices"][0]["delta"] for chunk in chunks_in(body)) == 1


def test_an_answer_that_begins_again_before_any_text_shows_no_difference() -> None:
    begin: list[AnyEntry] = [OPENED, delta(2, ""), Claimed(id=EntryId(2, 0)), Restarted(id=EntryId(2, 1))]
    log: list[AnyEntry] = [
        *begin,
        Opened(id=EntryId(2, 2), response_id="d", model="n", created=9),
        delta(3, "b", 2),
        DONE,
    ]
    body = b"".join(encoded(log))
    assert texts_in(body) == "b"
    assert chunks_in(body)[-1]["model"] == "n"


@pytest.mark.parametrize(
    "again",
    [
        [Claimed(id=EntryId(2, 0)), Restarted(id=EntryId(2, 1))],
        [Claimed(id=EntryId(2, 0)), Opened(id=EntryId(2, 1))],  # a failover has lost the deltas
        [Claimed(id=EntryId(2, 0)), delta(1, "a", 2)],
    ],
    ids=["restarted", "lost", "lost, without a head"],
)
def test_an_answer_that_begins_again_after_text_ends_with_an_error(again: list[AnyEntry]) -> None:
    encoder = ChatChunks().new_encoder()
    body = b"".join(encoder.encode(entry) for entry in [OPENED, delta(2, "a"), *again])
    assert encoder.is_over
    assert error_of(body) == "stream_restarted"
    assert not encoder.encode(delta(3, "b", 2))
    with pytest.raises(APIError):
        read_by_openai(body)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (Failed(id=SEAL, code="gap_timeout", message="no token came"), "gap_timeout"),
        (Failed(id=SEAL, code="interrupted", message="the answer broke off"), "answer_interrupted"),
        (Cancelled(id=SEAL), "cancelled"),
        (Unknown(id=SEAL, name="of a later version"), "unknown"),
    ],
)
def test_every_end_but_done_is_an_error(end: AnyEntry, code: str) -> None:
    for log in ([OPENED, delta(2, "a"), end], [OPENED, delta(2, "a", finish_reason="stop"), end], [end]):
        body = b"".join(encoded(cast("list[AnyEntry]", log)))
        assert error_of(body) == code
        assert body.count(b'finish_reason":"stop') == (len(log) == 3 and b"stop" in body)
        with pytest.raises(APIError) as caught:
            read_by_openai(body)
        assert caught.value.code == code


def test_a_stream_that_the_gateway_must_end_is_an_error() -> None:
    for body in (ChatChunks().interrupted(), ChatChunks().failed(Problem(410, "gone", "it is gone"))):
        assert error_of(body) in {"interrupted", "gone"}
    assert error_in(ChatChunks().failed(Problem(410, "gone", "it is gone"))) == ("gone", "it is gone")
    assert error_in(b'data: {"id":"c"}\n\n') is None


@pytest.mark.parametrize(
    "request_",
    [
        {"n": "2"},
        {"n": sys.maxsize},
        {"n": None},
        {"n": True},
        {"stream_options": []},
        {"stream_options": None},
        {"n": -1},
    ],
)
def test_options_of_a_wrong_type_make_no_failure(request_: Object) -> None:
    assert 2 <= len(chunks_in(b"".join(encoded([OPENED, delta(2, "a"), DONE], request_)))) <= 130

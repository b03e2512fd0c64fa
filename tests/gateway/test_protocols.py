"""The property that every protocol has: a stream that was cut at any entry, and its rest, join to the whole."""

import msgspec
import pytest
from example_logs import LOGS
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.contract.entries import JSON, AnyEntry, Delta
from worker.contract.ids import BEFORE_ALL, SEAL, EntryId
from worker.gateway.problems import Problem
from worker.gateway.protocols.chat_chunks import ChatChunks
from worker.gateway.protocols.native import NativeEvents, NativeMessages
from worker.gateway.protocols.protocol import StreamProtocol, without_events

PROTOCOLS: list[StreamProtocol] = [
    NativeEvents(), NativeMessages(), ChatChunks(), ChatChunks(n=2, include_usage=True, token_ids=True),
]  # fmt: skip
EVERY_PROTOCOL = pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)


def pieces_of(protocol: StreamProtocol, log: list[AnyEntry], after: EntryId = BEFORE_ALL) -> list[bytes]:
    """What each entry after one adds, as a replica encodes that has not served the stream before."""
    encoder = protocol.new_encoder()
    if protocol.starts_anywhere:
        return [encoder.encode(entry) for entry in log if entry.id > after]
    return [piece for entry in log for piece in [encoder.encode(entry)] if entry.id > after]


@EVERY_PROTOCOL
@pytest.mark.parametrize("log", LOGS.values(), ids=LOGS)
def test_a_stream_that_is_cut_at_any_entry_joins_to_the_whole(protocol: StreamProtocol, log: list[AnyEntry]) -> None:
    whole = pieces_of(protocol, log)
    assert any(whole)
    for number, entry in enumerate(log):
        assert whole[: number + 1] + pieces_of(protocol, log, entry.id) == whole


@pytest.mark.parametrize("log", LOGS.values(), ids=LOGS)
def test_a_chat_stream_that_is_cut_at_any_event_joins_to_the_whole(log: list[AnyEntry]) -> None:
    protocol = ChatChunks(n=2, include_usage=True)
    whole = b"".join(pieces_of(protocol, log))
    events = [event + b"\n\n" for event in whole.split(b"\n\n")[:-1]]
    for count in range(len(events) + 1):
        rest, left = [], count
        for piece in pieces_of(protocol, log):
            kept, left = without_events(piece, left)
            rest.append(kept)
        assert b"".join(events[:count] + rest) == whole


LOGPROBS: list[JSON] = [None, {"content": []}]


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    return Delta(
        id=EntryId(draw(st.integers(1, SEAL.attempt)), draw(st.integers(0, SEAL.n))),
        content=draw(st.text()),
        reasoning=draw(st.text()),
        tool_calls=draw(st.lists(st.just({"index": 0, "function": {"arguments": "{"}}), max_size=2)),
        index=draw(st.integers(0, 3)),
        finish_reason=draw(st.sampled_from(["", "stop"])),
        stop_reason=draw(st.none() | st.integers(0, 9) | st.text()),
        logprobs=draw(st.sampled_from(LOGPROBS)),
        token_ids=draw(st.lists(st.integers(0, 200_000), max_size=3)),
        extra=draw(st.just({}) | st.just({"delta": {"refusal": "no"}})),
    )


@settings(max_examples=50)
@given(deltas())
def test_a_delta_is_encoded_as_its_dict(delta: Delta) -> None:
    piece = NativeEvents().new_encoder().encode(delta)
    assert msgspec.json.decode(piece) == msgspec.json.decode(delta.to_json())


@settings(max_examples=50)
@given(st.lists(deltas(), min_size=1, max_size=5))
def test_an_event_is_two_lines_whatever_the_text_holds(entries: list[Delta]) -> None:
    protocol = NativeEvents()
    encoder = protocol.new_encoder()
    frame = protocol.frame([encoder.encode(entry) for entry in entries], entries[-1].id)
    lines = frame.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    assert len(lines) == 4
    assert lines[0] == f"id: {entries[-1].id}".encode()
    assert msgspec.json.decode(lines[1].removeprefix(b"data: ")) == [
        msgspec.json.decode(entry.to_json()) for entry in entries
    ]


def test_a_log_that_is_gone_closes_an_event_source_at_its_next_try() -> None:
    """The event has the seal's id, with which the next request is answered with 204."""
    gone = NativeEvents().failed(Problem(410, "gone", "the log has expired")).decode().split("\n")
    assert gone[:2] == ["event: gone", f"id: {SEAL}"]
    problem = NativeEvents().failed(Problem(500, "internal", "no")).decode().split("\n")
    assert problem[:2] == ["event: problem", f"id: {SEAL}"]


@pytest.mark.parametrize("status", [429, 503])
def test_after_a_temporary_problem_an_event_source_goes_on_from_where_it_is(status: int) -> None:
    busy = NativeEvents().failed(Problem(status, "unavailable", "later"))
    assert b"event: busy\ndata: {" in busy
    assert b"id:" not in busy

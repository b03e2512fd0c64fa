"""The cursor of an event stream: pure, bytes in, whole events out."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from worker.http.cursors import RepeatedCalls, ResumeBackoff, StreamCursor

EVENTS = [
    b": queued 12\n\n",
    b'data: {"choices":[{"delta":{"content":"\xc3\xa9"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n',
    b": \n\n",
    b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n',
    b"data: [DONE]\n\n",
]
WHOLE = b"".join(EVENTS)
INTERRUPTED = b'data: {"error":{"message":"stops","type":"server_error","param":null,"code":"interrupted"}}\n\n'


@given(st.lists(st.integers(0, len(WHOLE))))
def test_a_stream_in_any_pieces_is_passed_on_whole(cuts: list[int]) -> None:
    cursor = StreamCursor(is_chat=True)
    edges = [0, *sorted(cuts), len(WHOLE)]
    pieces = [cursor.feed(WHOLE[begin:end]) for begin, end in pairwise(edges)]
    assert b"".join(pieces) == WHOLE
    assert all(piece.endswith(b"\n\n") for piece in pieces if piece)
    assert (cursor.frames, cursor.is_over) == (4, True)


@given(st.integers(0, len(WHOLE)))
def test_a_cut_at_any_byte_loses_and_doubles_nothing(cut: int) -> None:
    cursor = StreamCursor(is_chat=True)
    first = cursor.feed(WHOLE[:cut])
    cursor.reconnected()
    after = int(cursor.headers().get("Relay-After", "0"))
    frames = [event for event in EVENTS if event.startswith(b"data:")]
    rest = cursor.feed(b"".join(frames[after:]))
    assert (first + rest).replace(b": queued 12\n\n", b"").replace(b": \n\n", b"") == b"".join(frames)


def test_the_end_of_a_gateway_is_not_passed_on() -> None:
    cursor = StreamCursor(is_chat=True)
    assert cursor.feed(EVENTS[1] + INTERRUPTED + EVENTS[2]) == EVENTS[1]
    assert (cursor.frames, cursor.is_interrupted, cursor.is_over) == (1, True, False)
    cursor.reconnected()
    assert cursor.feed(EVENTS[2]) == EVENTS[2]


def test_an_error_of_the_answer_is_its_last_event() -> None:
    cursor = StreamCursor(is_chat=True)
    error = INTERRUPTED.replace(b"interrupted", b"stream_restarted")
    assert cursor.feed(error) == error
    assert cursor.is_over


def test_a_text_that_looks_like_the_end_is_text() -> None:
    cursor = StreamCursor(is_chat=True)
    text = b'data: {"choices":[{"delta":{"content":"data: [DONE] {\\"error\\":{\\"code\\":\\"interrupted\\"}}"}}]}\n\n'
    assert cursor.feed(text) == text
    assert not cursor.is_over
    assert not cursor.is_interrupted


def test_a_native_stream_goes_on_after_its_last_id() -> None:
    cursor = StreamCursor(is_chat=False)
    assert cursor.headers() == {}
    cursor.feed(b'id: 1-0\ndata: [{"id":"1-0"}]\n\nid: 1-4\ndata: [{"id":"1-3"},{"id":"1-4"}]\n\nid: 1-5\nda')
    assert cursor.headers() == {"Last-Event-ID": "1-4"}
    assert not cursor.is_over


def test_tries_are_ever_rarer_and_end() -> None:
    backoff = ResumeBackoff(10)
    delays = [backoff.delay(0) or 0 for _ in range(12)]
    assert 0.05 <= delays[0] <= 0.075
    assert 5 <= delays[-1] <= 7.5
    assert (backoff.delay(0, "8") or 0) >= 8
    assert (backoff.delay(10, "86400") or 0) <= 15
    assert backoff.delay(10.1) is None
    backoff.received(event=False)
    assert (backoff.delay(11) or 0) >= 5, "a heartbeat makes no try early"
    backoff.received(event=True)
    assert (backoff.delay(12) or 1) <= 0.075


def test_a_repeated_call_of_an_sdk_gets_the_key_of_a_failed_one_once() -> None:
    calls = RepeatedCalls()
    first, other = calls.key_for(b"body", "0"), calls.key_for(b"body", "")
    assert first != other
    calls.failed(b"body", first)
    assert calls.key_for(b"body", "0") not in {first, other}, "a new call of the user"
    assert calls.key_for(b"another", "1") != first
    assert calls.key_for(b"body", "1") == first
    assert calls.key_for(b"body", "1") != first

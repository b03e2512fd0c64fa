"""The decoder of server-sent events as data: the standard's examples, every cut of the same bytes, and its limits."""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.vllm.stream.sse import EventTooLarge, SSEDecoder

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"
BODIES = sorted(path.stem for path in TRANSCRIPTS.glob("*.body"))
STREAMS = [name for name in BODIES if (TRANSCRIPTS / f"{name}.body").read_bytes().startswith(b"data:")]


def recorded(name: str) -> bytes:
    return (TRANSCRIPTS / f"{name}.body").read_bytes()


def decoded(*pieces: bytes) -> list[bytes]:
    decoder = SSEDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def byte_by_byte(body: bytes) -> Iterable[bytes]:
    return (body[place : place + 1] for place in range(len(body)))


def by_the_standard(body: bytes) -> list[bytes]:
    """The data of each event: section 9.2.6 of the HTML standard, sentence by sentence and a character at a time."""
    text = body.decode()
    lines = []
    line = ""
    place = 0
    while place < len(text):
        if text[place] in "\r\n":
            lines.append(line)
            line = ""
            place += 2 if text[place : place + 2] == "\r\n" else 1
        else:
            line += text[place]
            place += 1
    # What is left in `line` has no end: it is dropped, and so is the event that it belongs to.
    return list(events_of(lines))


def events_of(lines: list[str]) -> Iterator[bytes]:  # noqa: C901 - the rules, one after the other
    buffer = ""
    unfinished = ""  # JSON that stands there without `data:`
    for line in lines:
        if unfinished and not line.startswith(("data:", "event:", "error:")):
            unfinished += "\n" + line
            if depth(unfinished) <= 0:
                yield unfinished.strip(" \t").encode()
                unfinished = ""
            continue
        unfinished = ""
        field, _, value = line.partition(":")
        text = line.strip(" \t")
        if field == "data":
            if is_object(buffer.removesuffix("\n")):  # it needs no blank line
                yield buffer.removesuffix("\n").encode()
                buffer = ""
            buffer += value.removeprefix(" ") + "\n"
        elif line == "":
            if buffer != "":
                yield buffer.removesuffix("\n").encode()
            buffer = ""
        elif (
            text and text[0] in "{[" and (text[-1] in "}]" or depth(text) > 0)
        ):  # it is no field: servers put errors there
            if is_object(buffer.removesuffix("\n")):
                yield buffer.removesuffix("\n").encode()
                buffer = ""
            if buffer == "" and depth(text) > 0:
                unfinished = text
            elif buffer == "":
                yield text.encode()


def depth(text: str) -> int:
    """How many brackets are open at the end of JSON. No string spans lines."""
    bare = re.sub(r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"', "", text)
    return sum(map(bare.count, "{[")) - sum(map(bare.count, "}]"))


def is_object(text: str) -> bool:
    try:
        return text == "[DONE]" or (text[0] == "{" and isinstance(json.loads(text), dict))
    except (ValueError, IndexError):
        return False


# Examples


@pytest.mark.parametrize(
    ("lines", "events"),
    [
        ([b'{"a":1}', b'{"b":2}'], [b'{"a":1}', b'{"b":2}']),
        ([b'{"a":1}', b"[DONE]"], [b'{"a":1}', b"[DONE]"]),
        ([b'{"a":-1e999}', b'{"a":"\\ud83d"}'], [b'{"a":-1e999}', b'{"a":"\\ud83d"}']),
        ([b'{"a":', b"1}"], [b'{"a":\n1}']),
        ([b'{"a":1}', b"{"], [b'{"a":1}', b"{"]),
        ([b"1", b'{"a":1}', b'{"b":2}'], [b'1\n{"a":1}\n{"b":2}']),
        ([b'{"a":', b"{}", b"}"], [b'{"a":\n{}\n}']),
        ([b"1", b"2"], [b"1\n2"]),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_whole_chunks_on_the_lines_of_one_event_are_events(lines: list[bytes], events: list[bytes], end: bytes) -> None:
    body = b"".join(b"data: " + line + end for line in lines) + end
    assert decoded(body) == decoded(*byte_by_byte(body)) == events
    assert decoded(b"data: a\n\n", body, b"data: a\n\n") == [b"a", *events, b"a"]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n"])
def test_the_last_event_needs_no_blank_line(end: bytes) -> None:
    for start in (b"", b"data: a\n\n", b"data: {}\r\n"):
        for pieces in ([start + b'data: {"a":1}' + end], byte_by_byte(start + b'data: {"a":1}' + end)):
            decoder = SSEDecoder()
            for piece in pieces:
                decoder.feed(piece)
            assert decoder.end()[-1] == b'{"a":1}'
            assert decoder.end() == []


@pytest.mark.parametrize("rest", [b'data: {"a":', b'data: {"a":1}x', b"data", b": {}", b"", b"id: {}"])
def test_an_event_that_is_cut_off_is_dropped(rest: bytes) -> None:
    decoder = SSEDecoder()
    assert (decoder.feed(b"data: a\n\n" + rest), decoder.end()) == ([b"a"], [])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_that_end_in_one_line_end_come_out_when_the_next_begins(end: bytes) -> None:
    decoder = SSEDecoder()
    lines = [b'{"a":1}', b'{"b":2}', b'{"c":3}', b"[DONE]"]
    told = [decoder.feed(b"data: " + line + end) for line in lines]
    assert told == [[], [b'{"a":1}'], [b'{"b":2}'], [b'{"c":3}', b"[DONE]"]]
    assert decoder.end() == []


@pytest.mark.parametrize("rest", [b'data: {"c":', b'data: {"c":\n', b"dat", b'data: {"c":1}x\n'])
def test_a_cut_last_line_costs_only_itself(rest: bytes) -> None:
    body = b'data: {"a":1}\ndata: {"b":2}\n' + rest
    for pieces in ([body], byte_by_byte(body)):
        decoder = SSEDecoder()
        assert [event for piece in pieces for event in decoder.feed(piece)] + decoder.end() == [b'{"a":1}', b'{"b":2}']
        assert decoder.skipped.strip() == rest.removeprefix(b"data: ").strip()


BARE = [
    (b'{"a":1}\n', [b'{"a":1}']),
    (b' {"a":1} \n', [b'{"a":1}']),
    (b'{\n "a": 1\n}\n', [b'{\n "a": 1\n}']),
    (b'[\n{\n "a": "}"\n}]\n', [b'[\n{\n "a": "}"\n}]']),
    (b'{"a":[\n1,\n\n2]}\n', [b'{"a":[\n1,\n\n2]}']),
    (b'{"a":1}\n{"b":"\\""}\n', [b'{"a":1}', b'{"b":"\\""}']),
    (b'data: {"x":1}\n{"a":1}\n', [b'{"x":1}', b'{"a":1}']),
    (b"{ a log line\ndata: 1\n\n", [b"1"]),
    (b"[INFO] a log line\ndata: 1\n\n", [b"1"]),
    (b'data: 1\n{"a":1}\n\n', [b"1"]),
]


@pytest.mark.parametrize(("body", "events"), BARE)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_json_without_data_is_an_event_as_soon_as_it_is_whole(body: bytes, events: list[bytes], end: bytes) -> None:
    for start in (b"", b"data: a\n\n", b": a comment\n\n"):
        cut = (start + body).replace(b"\n", end)
        wanted = [b"a", *events] if b"a\n" in start and start.startswith(b"data") else events
        assert decoded(cut) == decoded(*byte_by_byte(cut)) == wanted


def test_what_began_as_json_and_was_cut_off_can_be_quoted() -> None:
    decoder = SSEDecoder()
    assert (decoder.feed(b'{"error": {\n"message": "no'), decoder.end()) == ([], [])
    assert decoder.skipped == b'{"error": {\n"message": "no\n'


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b'data: {"a":1}\nevent: error\ndata: {"b":2}\n\n', [b'{"a":1}', b'{"error":{"b":2}}']),
        (b'event: error\ndata: {"a":1}\nevent: message\ndata: {"b":2}\n', [b'{"error":{"a":1}}']),
        (b'data: {"a":1}\nerror: {"b":2}\n', [b'{"a":1}', b'{"error":{"b":2}}']),
        (b'data: {"a":1}\nevent: error\n\n', [b'{"error":{"a":1}}']),
    ],
)
def test_errors_between_chunks_that_end_in_one_line_end_are_found(body: bytes, events: list[bytes]) -> None:
    assert decoded(body) == decoded(*byte_by_byte(body)) == events


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [b"YHOO\n+2\n10"]),
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n",
            [b"first event", b"second event"],
        ),
        (b"data: first\n\ndata:  with a space of its own\n\n", [b"first", b" with a space of its own"]),
        (b"data\n\ndata\ndata\n\ndata:", [b"", b"\n"]),
        (b"data:test\n\ndata: test\n\n", [b"test", b"test"]),
        (b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n", [b"73857293", b"2153"]),
    ],
)
def test_the_examples_of_the_standard_are_read(body: bytes, events: list[bytes]) -> None:
    assert decoded(body) == decoded(*byte_by_byte(body)) == by_the_standard(body) == events


@pytest.mark.parametrize(
    "line",
    [b"retry: 100", b"id: data: x", b": data: x", b"dat: x", b"datax: x", b" data: x", b"Data: x", b"data : x", b"x"],
)
def test_only_a_field_named_data_counts(line: bytes) -> None:
    assert decoded(line + b"\n\n" + line + b"\ndata: y\n\n") == [b"y"]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_each_end_of_line_ends_lines_and_events(end: bytes) -> None:
    body = end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])
    assert decoded(body) == decoded(*byte_by_byte(body)) == [b"a\nb", b"c"]


def test_an_event_that_ends_in_cr_comes_out_at_once() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: a\r\r") == [b"a"]
    assert decoder.feed(b"data: b\r\n\r") == [b"b"]
    assert decoder.feed(b"\ndata: c\r\n\r\n") == [b"c"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_no_other_separator_ends_a_line(mark: str) -> None:
    event = f'{{"content":"a{mark}b"}}'.encode()
    assert decoded(*byte_by_byte(b"data: " + event + b"\n\n")) == [event]


def test_a_character_may_come_in_pieces() -> None:
    event = "世界 🙂 café".encode()
    body = b"data: " + event + b"\n\n"
    for cut in range(len(body)):
        assert decoded(body[:cut], body[cut:]) == [event]


def test_bytes_that_are_not_utf8_are_passed_on() -> None:
    assert decoded(b"data: \xff\xfe\n\n") == [b"\xff\xfe"]


@pytest.mark.parametrize("start", [b"\xef", b"\xef\xbb", b"\xef\xbbx", b"x"])
def test_a_line_that_begins_like_a_bom_is_a_line_like_others(start: bytes) -> None:
    body = start + b"\ndata: a\n\n"
    assert decoded(body) == decoded(*byte_by_byte(body)) == [b"a"]


@pytest.mark.parametrize("rest", [b"data: b", b"data: b\n", b"data: b\ndata: c\n", b"\xef\xbb"])
def test_an_event_that_the_end_cuts_off_is_dropped(rest: bytes) -> None:
    assert decoded(b"data: a\n\n", rest) == [b"a"]


def test_empty_reads_change_nothing() -> None:
    assert decoded(b"", b"da", b"", b"ta: a\r", b"", b"\n\r", b"", b"\n", b"") == [b"a"]


def test_events_after_done_come_out() -> None:
    assert decoded(b"data: [DONE]\n\ndata: more\n\n") == [b"[DONE]", b"more"]


# Real streams


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_reads_the_same_in_one_piece_and_in_bytes(name: str) -> None:
    body = recorded(name)
    whole = decoded(body)
    # vLLM writes each event as `data: <json>` and an empty line, and JSON holds no LF.
    assert whole == [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    assert whole[-1] == b"[DONE]"
    assert decoded(*byte_by_byte(body)) == whole


@pytest.mark.parametrize(("name", "end"), [*((name, b"\n") for name in STREAMS), ("length", b"\r\n"), ("n2", b"\r")])
def test_a_recorded_stream_reads_the_same_at_every_cut(name: str, end: bytes) -> None:
    """The first and the last events: those between them have the shape of their neighbours."""
    events = recorded(name).split(b"\n\n")
    body = b"\n\n".join(events[:4] + events[4:][-4:]).replace(b"\n", end)
    whole = decoded(body)
    assert whole
    for cut in range(len(body)):
        assert decoded(body[:cut], body[cut:]) == whole


@pytest.mark.parametrize(
    "body",
    [
        b"data: a\n\ndata: b\n\ndata: c\n\n", b"data: \n\ndata: \n\n", b"data: a\n\n\ndata: b\n\n",
        b"data: a\n\n: c\n\ndata: b\n\n", b"data: a\ndata: b\n\n", b"data: a\n\ndata:b\n\n", b"data: a\n\n\n\n",
        b"data: a\n\ndata\n\n", b"data: a\n\nid: 1\ndata: b\n\n", b"data: a\r\n\r\ndata: b\n\n",
    ],
)  # fmt: skip
def test_events_in_one_piece_are_read_by_the_standard(body: bytes) -> None:
    assert decoded(b"data: 0\n\n", body) == [b"0", *by_the_standard(body)]


# Streams at random

_TEXT = st.text(st.sampled_from('abc: {}"\\\u2028\u2029\u0085\x0b\x0c\x1c\ufeffé世🙂\t\0'), max_size=8)
_FIELD = st.sampled_from(["data:", "data: ", "data:  ", "data", ":", ": ", "id: ", "event:", "retry", "dat", "data :"])
_LINE = st.one_of(st.tuples(_FIELD, _TEXT).map("".join), _TEXT, st.just(""), st.just("data: x"))
_END = st.sampled_from(["\n", "\r", "\r\n"])


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    lines = draw(st.lists(st.tuples(_LINE, _END).map("".join), max_size=24))
    return ("".join(lines) + draw(_LINE)).encode()


@given(_streams(), st.randoms(use_true_random=False))
def test_any_stream_is_read_by_the_standard_however_it_is_cut(body: bytes, chance: random.Random) -> None:
    wanted = by_the_standard(body)
    cuts = sorted(chance.randrange(len(body) + 1) for _ in range(chance.randrange(12)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert decoded(body) == wanted
    assert decoded(*pieces) == wanted
    assert decoded(*byte_by_byte(body)) == wanted


# Limits


def held(decoder: SSEDecoder) -> int:
    """The bytes in the decoder's buffers; each data line counts one more."""
    return sum(map(len, decoder._pending)) + sum(len(line) + 1 for line in decoder._data)


def fed_until_too_large(decoder: SSEDecoder, piece: bytes) -> int:
    """The most that the decoder buffered until it refused this piece, sent again and again."""
    most = 0
    for _ in range(10_000):
        try:
            assert decoder.feed(piece) == []
        except EventTooLarge as error:
            assert "1000 bytes" in str(error)  # noqa: PT017 - what it held before is wanted as well
            return most
        most = max(most, held(decoder))
    raise AssertionError(f"{held(decoder)} bytes are held, and nothing was said")


def test_an_event_of_exactly_the_limit_is_taken_and_one_byte_more_is_not() -> None:
    for size, pieces in ((994, 1), (1000, 1), (1000, 1000)):
        body = b"data:" + b"x" * size + b"\n\n"
        decoder = SSEDecoder(max_event_bytes=1005)  # a line that has no end yet counts with its `data:`
        step = -(-len(body) // pieces)
        events = [e for at in range(0, len(body), step) for e in decoder.feed(body[at : at + step])]
        assert events == [b"x" * size]
    for body in (b"data:" + b"x" * 1001 + b"\n\n", b"data:" + b"x" * 500 + b"\ndata:" + b"x" * 500 + b"\n\n"):
        with pytest.raises(EventTooLarge):
            SSEDecoder(max_event_bytes=1000).feed(body)


@pytest.mark.parametrize("piece", [b"x", b"data: xx", b": keep-alive", "世".encode(), b"\x00" * 999])
def test_a_line_without_end_is_refused_at_the_limit(piece: bytes) -> None:
    assert fed_until_too_large(SSEDecoder(max_event_bytes=1000), piece) <= 1001


@pytest.mark.parametrize("line", [b"data: x\n", b"data:\n", b"data\n", b"data:" + b"x" * 90 + b"\r\n", b"data: \r"])
def test_an_event_without_end_is_refused_at_the_limit_however_small_its_lines(line: bytes) -> None:
    assert 900 <= fed_until_too_large(SSEDecoder(max_event_bytes=1000), line) <= 1001


def test_lines_in_one_read_are_refused_as_well() -> None:
    with pytest.raises(EventTooLarge):
        SSEDecoder(max_event_bytes=1000).feed(b"data:\n" * 1100)


def test_the_limit_is_for_one_event_and_not_for_the_stream() -> None:
    decoder = SSEDecoder(max_event_bytes=100)
    body = b"data: " + b"x" * 80 + b"\n\n: comment\n\n"
    assert sum(len(decoder.feed(body)) for _ in range(100)) == 100
    assert len(decoder.feed(body * 100)) == 100
    assert sum(len(decoder.feed(piece)) for piece in byte_by_byte(body * 20)) == 20


def test_comments_and_other_fields_are_not_kept() -> None:
    decoder = SSEDecoder(max_event_bytes=100)
    for _ in range(1000):
        assert decoder.feed(b": keep-alive\n\nid: 1\nevent: x\n") == []
        assert held(decoder) == 0

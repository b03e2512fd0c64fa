"""The answer that a reader of a log puts together, compared with what openai's own client makes of the same bytes.

The streams are those that were recorded (`tests/transcripts`) and those that were made up (`tests/streams.py`). A new
one is a file there or a line here.
"""

import json
from itertools import chain
from pathlib import Path
from typing import cast

import pytest
from openai import APIError
from openai_reading import content_of, read_by_openai, without_nothing
from streams import DONE, STREAMS, Object, Stream, event

from worker.contract.answer import Answer
from worker.contract.entries import AnyEntry, Done, Usage, parse, to_fields
from worker.contract.feed import read_message
from worker.contract.ids import SEAL, EntryId
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.stream.sse import SSEDecoder

_TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"
_INDEX: dict[str, Object] = json.loads((_TRANSCRIPTS / "index.json").read_text())
RECORDED = [name for name, answer in _INDEX.items() if answer["content_type"].startswith("text/event-stream")]


def each_byte(body: bytes) -> list[bytes]:
    return [body[at : at + 1] for at in range(len(body))]


def entries_of(*pieces: bytes, n: int = 1) -> list[AnyEntry]:
    """The log of an answer that arrives in these pieces, as a reader gets it.

    Raises:
        UpstreamError: when the answer is not whole.
    """
    decoder, parser = SSEDecoder(), ChunkParser(n=n)
    events = [*(data for piece in pieces for data in decoder.feed(piece)), *decoder.end()]
    written = [fields for data in events for fields in parser.parse(data)]
    parser.check_complete()
    end = Done(id=SEAL, finish_reason=parser.finish_reason, usage=cast("Usage", parser.usage), model=parser.model)
    log = [*((EntryId(1, number), fields) for number, fields in enumerate(written, 1)), (SEAL, to_fields(end))]
    read = [
        parse(str(entry_id), {name.encode(): value.encode() for name, value in fields.items()})
        for entry_id, fields in log
    ]
    assert [*chain(*(read_message(json.dumps([[str(one), fields]]).encode()) for one, fields in log))] == read
    return read


def read(*pieces: bytes, n: int = 1) -> Object:
    """The completion that a reader puts together of that log."""
    return Answer(entries_of(*pieces, n=n)).completion()


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_stream_is_read_as_openai_reads_it(name: str) -> None:
    body = (_TRANSCRIPTS / f"{name}.body").read_bytes()
    request = json.loads((_TRANSCRIPTS / f"{name}.request.json").read_text())
    n = request.get("n", 1)
    try:
        by_openai = read_by_openai(body)
    except APIError:
        with pytest.raises(UpstreamError):
            read(body, n=n)
        return
    ours = read(body, n=n)
    assert content_of(ours | {"usage": by_openai["usage"] and ours["usage"]}) == content_of(by_openai)
    assert (ours["id"], ours["model"], ours["created"]) == tuple(by_openai[name] for name in ("id", "model", "created"))
    assert read(*each_byte(body), n=n) == ours


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_a_made_up_stream_is_read_correctly(stream: Stream) -> None:
    try:
        by_openai = content_of(read_by_openai(stream.body))
    except Exception as error:  # noqa: BLE001 - its accumulation may raise anything
        by_openai = [{"fails": repr(error)}]
    ours = read(stream.body)
    if stream.right is None:
        assert content_of(ours) == by_openai
    else:
        right = [without_nothing({"finish_reason": "stop"} | stream.right)]
        assert content_of(ours) == right
        assert by_openai != right, "openai's client has what is right: the line need not say it"
    assert read(*each_byte(stream.body)) == ours


@pytest.mark.parametrize("stream", [stream for stream in STREAMS if stream.right is None], ids=str)
def test_openai_reads_the_chunks_of_entries_as_the_same_answer(stream: Stream) -> None:
    log = entries_of(stream.body)
    answer = Answer(log)
    # The beginning is sent once: openai's client joins roles.
    chunks = [entry.chunk(answer.opened) for n, entry in enumerate(log) if entry.type != "opened" or n == 0]
    again = read_by_openai(b"".join(event(chunk) for chunk in chunks if chunk) + DONE)
    assert content_of(again | {"usage": answer.usage}) == content_of(answer.completion())
    assert again["id"] == answer.completion()["id"]

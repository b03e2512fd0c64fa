"""Recorded answers of vLLM, and chunks that are made by hand, as entries of a log."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from worker.contract import entries
from worker.contract.entries import Delta, Entry, Fields
from worker.contract.ids import EntryId
from worker.vllm.chunks.parser import ChunkParser
from worker.vllm.errors import UpstreamError
from worker.vllm.stream.sse import SSEDecoder

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"
INDEX: dict[str, dict[str, Any]] = json.loads((TRANSCRIPTS / "index.json").read_bytes())
WHOLE = [name for name, entry in INDEX.items() if entry["events"] > 2 and name != "engine_death_mid_stream"]
Object = dict[str, Any]


def recorded(name: str) -> bytes:
    return (TRANSCRIPTS / f"{name}.body").read_bytes()


def request_of(name: str) -> Object:
    request: Object = json.loads((TRANSCRIPTS / f"{name}.request.json").read_bytes())
    return request


def parser_for(name: str, kind: type[ChunkParser] = ChunkParser) -> ChunkParser:
    request = request_of(name)
    return kind(
        n=request.get("n", 1),
        keep_prompt_ids=request.get("return_token_ids", False),
        keep_usage=request.get("stream_options", {}).get("continuous_usage_stats", False),
    )


def payloads(body: bytes) -> list[bytes]:
    return [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]


def plainly(body: bytes) -> list[Object]:
    return [json.loads(payload) for payload in payloads(body) if payload != b"[DONE]"]


def fields_of(parser: ChunkParser, pieces: Iterable[bytes]) -> list[Fields]:
    decoder = SSEDecoder()
    return [fields for piece in pieces for event in decoder.feed(piece) for fields in parser.parse(event)]


def read(fields: Iterable[Fields]) -> list[Entry]:
    """The entries as a reader of the log has them: numbered, through bytes."""
    raw = ({name.encode(): value.encode() for name, value in one.items()} for one in fields)
    return [entries.parse(str(EntryId(1, n)), one) for n, one in enumerate(raw, 1)]


def parsed(*chunks: object, n: int = 1, done: bool = True) -> tuple[ChunkParser, list[Entry]]:
    """The entries of these chunks, each a JSON value or the bytes of an event's data."""
    parser = ChunkParser(n=n)
    events = [chunk if isinstance(chunk, bytes) else msgspec.json.encode(chunk) for chunk in chunks]
    fields = [fields for event in [*events, b"[DONE]"][: None if done else -1] for fields in parser.parse(event)]
    return parser, read(fields)


def chunk(delta: object, finish_reason: str | None = None, **choice: object) -> Object:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "reciter"}
    return head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason} | choice]}


def only_delta(*chunks: object) -> Delta:
    deltas = [entry for entry in parsed(*chunks)[1] if isinstance(entry, Delta)]
    assert len(deltas) == 1
    return deltas[0]


def error_of(*chunks: object, n: int = 1, done: bool = True) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        parsed(*chunks, n=n, done=done)[0].check_complete()
    return caught.value


def pieces_of(chunks: list[Object], index: int) -> list[Object]:
    return [choice for one in chunks for choice in one["choices"] if choice["index"] == index]


def calls_in(pieces: list[Object]) -> list[Object]:
    """The tool calls of a choice, as OpenAI's clients put them together."""
    calls: dict[int, Object] = {}
    for piece in (call for choice in pieces for call in choice["delta"].get("tool_calls") or []):
        call = calls.setdefault(piece["index"], {"index": piece["index"], "function": {"arguments": ""}})
        call |= {name: piece[name] for name in ("id", "type") if name in piece}
        if "name" in piece["function"]:
            call["function"]["name"] = piece["function"]["name"]
        call["function"]["arguments"] += piece["function"].get("arguments", "")
    return list(calls.values())

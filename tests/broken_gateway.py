"""A server that streams as the gateway does, and breaks each connection as a test says. The answer is 20 words."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

WORDS = tuple(f"word{number} é " for number in range(20))
TEXT = "".join(WORDS)

End: TypeAlias = Literal["whole", "reset", "clean", "interrupted", "silent"]


@dataclass(frozen=True)
class Plan:
    """What the server does with one request."""

    events: int = 1000
    """How many events it sends before the end."""
    end: End = "whole"
    status: int = 200
    before: bool = False
    """Whether it closes the connection before the head."""
    headers: tuple[str, ...] = ()
    torn: bytes = b""
    """A part of an event, sent before a reset."""


@dataclass
class BrokenGateway:
    plans: list[Plan]
    """One for each request in turn; the last one is for all others."""
    url: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)
    """The headers of each request, with names in lower case."""
    answer_id: Callable[[str], str] = lambda key: hashlib.sha256(key.encode()).hexdigest()[:48]
    """The X-Request-Id for an Idempotency-Key."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
        with suppress(OSError):
            writer.close()
            await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        await reader.readexactly(int(headers.get("content-length", 0)))
        plan = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
        self.requests.append(headers)
        if plan.before:
            return
        chat = first.startswith("POST")
        if plan.status != 200:
            body = json.dumps({"error": {"message": "no", "type": "", "param": None, "code": "no"}})
            more = "".join(f"{line}\r\n" for line in plan.headers)
            writer.write(
                f"HTTP/1.1 {plan.status} No\r\nContent-Type: application/json\r\n{more}"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
            )
            await writer.drain()
            return
        events = _chat_events() if chat else _native_events()
        position = _number(headers.get("relay-after" if chat else "last-event-id", "0"))
        if not chat and position == len(events):
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            return
        answer_id = self.answer_id(headers.get("idempotency-key", ""))
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Request-Id: {answer_id}\r\n"
            "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        sent = events[position : position + plan.events]
        for event in [": queued 1\n\n", *sent]:
            writer.write(_chunk(event.encode()))
            await writer.drain()
        if plan.torn:
            writer.write(_chunk(plan.torn))
            await writer.drain()
        if plan.end == "interrupted":
            problem = {"error": {"message": "stops", "type": "server_error", "param": None, "code": "interrupted"}}
            writer.write(_chunk(f"data: {json.dumps(problem)}\n\n".encode()))
        if plan.end == "silent":
            await reader.read()
        elif plan.end != "reset":
            writer.write(b"0\r\n\r\n")
            await writer.drain()


@asynccontextmanager
async def broken_gateway(*plans: Plan) -> AsyncIterator[BrokenGateway]:
    gateway = BrokenGateway(list(plans) or [Plan()])
    server = await asyncio.start_server(gateway.answer, "127.0.0.1", 0)
    gateway.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield gateway
    finally:
        server.close()


def _chat_events() -> list[str]:
    """One event for the role, one for each word, the finish and `[DONE]`."""
    shared = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "reciter"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in WORDS)]
    chunks = [shared | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append(shared | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return [*(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks), "data: [DONE]\n\n"]


def _native_events() -> list[str]:
    return [
        f"id: {number}\ndata: [{json.dumps({'id': str(number), 'type': 'delta', 'content': word})}]\n\n"
        for number, word in enumerate(WORDS, 1)
    ]


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)

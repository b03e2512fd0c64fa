"""Sends one answer of the simulated vLLM, at its speed and with its faults."""

import asyncio
import json

import msgspec

from .framing import DONE, comment, frame
from .record import Served
from .replies import Chunk, Reply
from .requests import (
    ChatRequest,
    Fault,
    Json,
    Options,
    RefusedError,
    Scenario,
    TextRequest,
    bad_request,
    error_body,
    late_error,
)
from .scheduler import Scheduler, ServerClock
from .wire import HttpConnection

__all__ = ["Responder", "send_error_event"]

_JSON = "application/json"
_EVENTS = "text/event-stream; charset=utf-8"
_PAGE = b"<!DOCTYPE html>\n<html><head><title>Welcome</title></head><body><h1>It works!</h1></body></html>\n"
_ENGINE_DEAD = error_body(
    500,
    "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    kind="InternalServerError",
)
_REFUSALS: dict[str, Json] = {
    "429": error_body(429, "Too many requests. Please retry later.", kind="RateLimitError"),
    "503": error_body(503, "The server is overloaded. Please retry later.", kind="ServiceUnavailableError"),
    "500": _ENGINE_DEAD,
}
_PREFILL = ("Token id 999999 is out of vocabulary", "kv_transfer_params.prompt_token_ids")


class Responder:
    """Sends one answer, with the faults of its scenario."""

    def __init__(
        self,
        connection: HttpConnection,
        served: Served,
        request: ChatRequest,
        scenario: Scenario,
        options: Options,
        reply: Reply,
        *,
        scheduler: Scheduler,
        clock: ServerClock,
    ) -> None:
        self._connection = connection
        self._served = served
        self._request = request
        self._scenario = scenario
        self._options = options
        self._reply = reply
        self._scheduler = scheduler
        self._clock = clock
        self._has_begun = False
        self._pending = scenario.fault
        """The fault that was not applied yet."""

    async def send(self) -> None:
        fault = self._scenario.fault
        if fault in _REFUSALS:
            self._strike(fault)
            after = self._scenario.retry_after
            headers = {} if after is None else {"retry_after": f"{after:g}"}
            await self._respond(int(fault), _JSON, msgspec.json.encode(_REFUSALS[fault]), **headers)
            return
        if fault == "refuse":
            self._strike(fault)
            return
        if fault == "prefill" and not (isinstance(self._request, TextRequest) and self._request.stream):
            self._strike(fault)
            raise bad_request(*_PREFILL)
        if fault == "hang":
            self._strike(fault)
            await _wait_forever()
        streams = bool(self._request.stream) and fault not in {"html", "json"}
        if streams and self._options.max_num_seqs is not None:
            self._begin()  # vLLM sends the head of a stream before the request waits for others
        async with self._scheduler.turn():
            self._served.scheduled = self._clock.now()
            await self._clock.sleep(self._scenario.first_token)
            if fault == "html":
                self._strike(fault)
                await self._respond(200, "text/html; charset=utf-8", _PAGE)
            elif streams:
                await self._stream()
            else:
                await self._send_complete()

    def _strike(self, fault: Fault) -> None:
        self._pending = None
        self._served.fault = fault

    async def _respond(self, status: int, content_type: str, body: bytes, **headers: str) -> None:
        self._served.status = status
        self._served.first_chunk = self._clock.now()
        await self._connection.respond(status, content_type, body, **headers)

    def _begin(self) -> None:
        """Send the head of the stream, once."""
        if not self._has_begun:
            self._has_begun = True
            self._connection.begin(_EVENTS)
            self._served.status = 200

    async def _send_complete(self) -> None:
        error = late_error(self._request)
        if error is not None:
            raise RefusedError(400, error)
        reply = self._reply
        if self._scenario.rate:
            await self._clock.sleep(max(reply.lengths) / self._scenario.rate)
        if self._pending == "json":
            self._strike("json")
        self._served.texts, self._served.reasonings = reply.contents, reply.reasonings
        self._served.arguments = reply.arguments
        self._served.tokens = sum(reply.lengths)
        await self._respond(200, _JSON, msgspec.json.encode(reply.complete()))
        self._served.finished = self._served.fault is None

    async def _stream(self) -> None:
        self._begin()
        error = late_error(self._request)
        if self._pending == "prefill":
            self._strike(self._pending)
            error = error_body(400, _PREFILL[0])
        if error is not None:
            await self._end_with(error)
            return
        reply = self._reply
        self._served.texts, self._served.reasonings, self._served.arguments = [[""] * reply.choices for _ in range(3)]
        for body in reply.opening():
            await self._send_event(body)
        began = self._clock.now()
        for number, chunks in enumerate(reply.rounds()):
            due = began + number / self._scenario.rate if self._scenario.rate else 0
            # Yield even without a pause, so that other streams continue and a close by the client is noticed.
            await self._clock.sleep(max(0, due - self._clock.now()))
            for chunk in chunks:
                if await self._ended_by_fault():
                    return
                await self._send_chunk(chunk)
            self._served.tokens = sum(reply.tokens)
        if not await self._ended_by_fault():
            await self._finish()

    async def _send_chunk(self, chunk: Chunk) -> None:
        # Record the chunk first: the client may have it while this task waits for a slow connection.
        self._served.chunks += 1
        self._served.texts[chunk.choice] += chunk.content
        self._served.reasonings[chunk.choice] += chunk.reasoning
        self._served.arguments[chunk.choice] += chunk.arguments
        await self._send_event(chunk.body)

    async def _send_event(self, body: Json) -> None:
        shapes = self._scenario.shapes
        if "sloppy" in shapes:
            await self._send_frame(msgspec.json.encode(self._reply.oddity(self._served.chunks)))
        await self._send_frame(msgspec.json.encode(body))

    async def _send_frame(self, payload: bytes) -> None:
        first = self._served.first_chunk is None
        await self._connection.send(frame(payload, self._scenario.shapes, first=first))
        if first:
            self._served.first_chunk = self._clock.now()

    async def _finish(self) -> None:
        for body in self._reply.closing():
            await self._send_event(body)
        self._served.finished = True
        if self._pending == "no_done":
            self._strike("no_done")
        else:
            await self._send_frame(DONE)
        self._connection.finish()

    async def _end_with(self, error: Json) -> None:
        # With json.dumps, as in vLLM, which writes spaces.
        await self._send_frame(json.dumps(error).encode())
        await self._send_frame(DONE)
        self._connection.finish()

    async def _ended_by_fault(self) -> bool:
        """Apply the fault once its number of chunks was sent. Returns whether the fault ended the answer."""
        fault = self._pending
        if fault is None or fault == "no_done" or self._served.chunks != self._scenario.after:
            return False
        self._strike(fault)
        if fault == "stall":
            await _wait_forever()
        elif fault == "freeze":
            while True:
                await self._clock.sleep(self._options.keep_alive)
                await self._connection.send(comment(self._scenario.shapes))
        elif fault == "malformed":
            await self._send_frame(b'{"id":"chatcmpl-0","object":"chat.completion.chunk","choices":[{"index":0,"del')
            return False
        elif fault == "reset":
            self._connection.reset()
        elif fault == "error_under_200":
            await self._end_with(_ENGINE_DEAD)
        elif fault == "abort":
            for body in self._reply.aborted():
                await self._send_event(body)
            await self._send_frame(DONE)
            self._connection.finish()
        else:
            self._connection.finish()
        return True


async def send_error_event(connection: HttpConnection, error: object) -> None:
    """Answer with status 200 and an error event, as vLLM does with an error that it notices after the head was sent."""
    connection.begin(_EVENTS)
    # With json.dumps, as in vLLM, which writes spaces.
    await connection.send(frame(json.dumps(error).encode(), frozenset()))
    await connection.send(frame(DONE, frozenset()))
    connection.finish()


async def _wait_forever() -> None:
    await asyncio.Event().wait()

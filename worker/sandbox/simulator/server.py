"""The simulated vLLM: its routes, the speed and the faults of its streams, and the records of its answers."""

import asyncio
import hmac
import json
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Self
from uuid import uuid4
from weakref import WeakSet

import msgspec

from .framing import DONE, comment, frame
from .record import Served, digest
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
    parse_chat_request,
    parse_json,
)
from .texts import TextReply, detokenize, parse_text_request, tokenize
from .wire import HttpConnection, HttpRequest

__all__ = ["Options", "Scenario", "Served", "Simulator", "serve_forever"]

KEPT = 10_000
"""How many records a server keeps, and how many prompts whose requests it counts."""

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
_COMPLETIONS = "/v1/completions"
_METHODS = {
    "/v1/chat/completions": "POST",
    _COMPLETIONS: "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/models": "GET",
    "/health": "GET",
}


class Simulator:
    """A simulated vLLM, which runs inside `async with`."""

    def __init__(self, options: Options | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.options = options or Options()
        self.served: deque[Served] = deque(maxlen=KEPT)
        """The records of the latest 10,000 completions, oldest first. The record of a running one is updated."""
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._connections: WeakSet[HttpConnection] = WeakSet()
        self._count = 0
        self._tries: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """The base URL, without `/v1`. The port is known once the server runs."""
        return f"http://{self._host}:{self._port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, self._host, self._port, backlog=2048)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        tasks = [task for connection in self._connections if (task := connection.drop()) is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    def refuse(self) -> None:
        """Accept no further connections and close the idle ones, as vLLM does first on SIGTERM."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.retire()

    def _accept(self) -> HttpConnection:
        connection = HttpConnection(self._handle)
        self._connections.add(connection)
        return connection

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        method = None if request.path in self.options.lacks else _METHODS.get(request.path)
        if request.path.startswith("/v1/") and not self._authorized(request):
            await _respond(connection, 401, {"error": "Unauthorized"})
        elif method is None:
            await _respond(connection, 404, {"detail": "Not Found"})
        elif method != request.method:
            await _respond(connection, 405, {"detail": "Method Not Allowed"}, allow=method)
        elif request.path == "/health":
            await connection.respond(200, _JSON, b"")
        elif request.path == "/v1/models":
            await _respond(connection, 200, _models(self.options))
        elif request.path in {"/tokenize", "/detokenize"}:
            convert = tokenize if request.path == "/tokenize" else detokenize
            try:
                await _respond(connection, 200, convert(parse_json(request.body), self.options))
            except RefusedError as error:
                await _respond(connection, error.status, error.body)
        else:
            await self._complete(request, connection)

    def _authorized(self, request: HttpRequest) -> bool:
        given = request.headers.get("authorization", "")
        key = self.options.api_key
        return key is None or hmac.compare_digest(given.encode(), f"Bearer {key}".encode())

    async def _complete(self, request: HttpRequest, connection: HttpConnection) -> None:
        self._count += 1
        served = Served(order=self._count, route=request.path, request={}, started=time.monotonic())
        self.served.append(served)
        try:
            served.request = parse_json(request.body)
            parse_request = parse_text_request if request.path == _COMPLETIONS else parse_chat_request
            parsed, scenario = parse_request(served.request, self.options)
            scenario = msgspec.structs.replace(scenario, fault=self._fault_for(parsed, scenario))
            reply = (TextReply if isinstance(parsed, TextRequest) else Reply)(parsed, scenario, self.options)
            served.prompt, served.after = digest(reply.question), len(reply.begun)
            self._record(served)
            await _Responder(connection, served, parsed, scenario, self.options, reply).send()
        except RefusedError as error:
            served.status = error.status
            await _respond(connection, error.status, error.body)
        except asyncio.CancelledError:
            served.closed_early = True
            raise
        finally:
            served.ended = time.monotonic()
            self._record(served)

    def _fault_for(self, request: ChatRequest, scenario: Scenario) -> Fault | None:
        fault = scenario.fault if self._meets_fault(request, scenario) else scenario.then
        return None if fault == "prefill" and not request.given else fault

    def _meets_fault(self, request: ChatRequest, scenario: Scenario) -> bool:
        if scenario.fault is None or scenario.times is None:
            return scenario.fault is not None
        if scenario.fault == "prefill" and not request.given:
            return False
        if len(self._tries) > KEPT:
            self._tries.clear()
        prompt = digest(request.prompt)
        self._tries[prompt] += 1
        return self._tries[prompt] <= scenario.times

    def _record(self, served: Served) -> None:
        if self.options.record is not None:
            with self.options.record.open("ab") as file:
                file.write(msgspec.json.encode(served) + b"\n")


async def serve_forever(
    options: Options, *, host: str, port: int, ready: Callable[[str], None] = lambda _url: None
) -> None:
    """Serve until cancelled; `ready` is called with the base URL once connections are accepted."""
    async with Simulator(options, host=host, port=port) as simulator:
        ready(simulator.url)
        await _wait_forever()


class _Responder:
    """Sends one answer, with the faults of its scenario."""

    def __init__(
        self,
        connection: HttpConnection,
        served: Served,
        request: ChatRequest,
        scenario: Scenario,
        options: Options,
        reply: Reply,
    ) -> None:
        self._connection = connection
        self._served = served
        self._request = request
        self._scenario = scenario
        self._options = options
        self._reply = reply
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
        await asyncio.sleep(self._scenario.first_token)
        if fault == "html":
            self._strike(fault)
            await self._respond(200, "text/html; charset=utf-8", _PAGE)
        elif self._request.stream and fault != "json":
            await self._stream()
        else:
            await self._send_complete()

    def _strike(self, fault: Fault) -> None:
        self._pending = None
        self._served.fault = fault

    async def _respond(self, status: int, content_type: str, body: bytes, **headers: str) -> None:
        self._served.status = status
        self._served.first_chunk = time.monotonic()
        await self._connection.respond(status, content_type, body, **headers)

    async def _send_complete(self) -> None:
        error = late_error(self._request)
        if error is not None:
            raise RefusedError(400, error)
        reply = self._reply
        if self._scenario.rate:
            await asyncio.sleep(max(reply.lengths) / self._scenario.rate)
        if self._pending == "json":
            self._strike("json")
        self._served.texts, self._served.reasonings = reply.contents, reply.reasonings
        self._served.arguments = reply.arguments
        self._served.tokens = sum(reply.lengths)
        await self._respond(200, _JSON, msgspec.json.encode(reply.complete()))
        self._served.finished = self._served.fault is None

    async def _stream(self) -> None:
        self._connection.begin(_EVENTS)
        self._served.status = 200
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
        began = time.monotonic()
        for number, chunks in enumerate(reply.rounds()):
            due = began + number / self._scenario.rate if self._scenario.rate else 0
            # Yield even without a pause, so that other streams continue and a close by the client is noticed.
            await asyncio.sleep(max(0, due - time.monotonic()))
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
            self._served.first_chunk = time.monotonic()

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
                await asyncio.sleep(self._options.keep_alive)
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


async def _wait_forever() -> None:
    await asyncio.Event().wait()


async def _respond(connection: HttpConnection, status: int, body: object, **headers: str) -> None:
    await connection.respond(status, _JSON, msgspec.json.encode(body), **headers)


def _models(options: Options) -> Json:
    permission = {
        "id": f"modelperm-{uuid4().hex[:16]}",
        "object": "model_permission",
        "created": int(time.time()),
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    model = {
        "id": options.model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "vllm",
        "root": options.model,
        "parent": None,
        "max_model_len": options.max_model_len,
        "permission": [permission],
    }
    return {"object": "list", "data": [model]}

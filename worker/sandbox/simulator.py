"""The simulated vLLM: its routes, the pace of its streams, the faults to order, and the record of what it sent."""

import asyncio
import hmac
import json
import time
from collections import Counter, deque
from collections.abc import Callable
from hashlib import blake2b
from types import TracebackType
from typing import Self
from uuid import uuid4
from weakref import WeakSet

import msgspec

from worker.sandbox.framing import DONE, comment, framed
from worker.sandbox.replies import Chunk, Reply
from worker.sandbox.requests import (
    ChatRequest,
    Fault,
    Json,
    Options,
    Orders,
    RefusedError,
    error_body,
    parse,
    too_many_logprobs,
    understand,
)
from worker.sandbox.wire import Connection, Request

__all__ = ["Options", "Orders", "Served", "Simulator", "serve_forever"]

KEPT = 10_000
"""Records, and prompts whose tries are counted, that a server remembers."""

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
_METHODS = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}


class Served(msgspec.Struct, kw_only=True):
    """What was sent for one chat completion. Times are monotonic seconds."""

    order: int
    """Requests are numbered from 1 as they come."""
    request: Json
    """The body; empty if it was not a JSON object."""
    status: int | None = None
    """Of HTTP; None while nothing is answered."""
    fault: str | None = None
    """The fault that struck."""
    texts: list[str] = []
    """The content sent so far, by choice."""
    reasonings: list[str] = []
    """The reasoning sent so far, by choice."""
    chunks: int = 0
    """Delta chunks sent, finish chunks included."""
    tokens: int = 0
    """Tokens generated for all choices, end tokens included."""
    finished: bool = False
    """Whether a good answer was sent whole (a missing [DONE] is no matter)."""
    closed_early: bool = False
    """Whether the connection was closed from outside before the answer ended."""
    started: float
    first_chunk: float | None = None
    ended: float | None = None


class Simulator:
    """A simulated vLLM, running inside `async with`."""

    def __init__(self, options: Options | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.options = options or Options()
        self.served: deque[Served] = deque(maxlen=KEPT)
        """The latest 10,000 chat completions asked for, oldest first; the record of a running one grows."""
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._connections: WeakSet[Connection] = WeakSet()
        self._count = 0
        self._tries: Counter[bytes] = Counter()

    @property
    def url(self) -> str:
        """The base URL, without `/v1`; the port is known once it runs."""
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

    def _accept(self) -> Connection:
        connection = Connection(self._handle)
        self._connections.add(connection)
        return connection

    async def _handle(self, request: Request, connection: Connection) -> None:
        method = _METHODS.get(request.path)
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
        else:
            await self._complete(request, connection)

    def _authorized(self, request: Request) -> bool:
        given = request.headers.get("authorization", "")
        key = self.options.api_key
        return key is None or hmac.compare_digest(given.encode(), f"Bearer {key}".encode())

    async def _complete(self, request: Request, connection: Connection) -> None:
        self._count += 1
        served = Served(order=self._count, request={}, started=time.monotonic())
        self.served.append(served)
        try:
            served.request = parse(request.body)
            asked, orders = understand(served.request, self.options)
            if not self._meets_fault(asked, orders):
                orders = msgspec.structs.replace(orders, fault=None)
            await _Answer(connection, served, asked, orders, self.options).give()
        except RefusedError as error:
            served.status = error.status
            await _respond(connection, error.status, error.body)
        except asyncio.CancelledError:
            served.closed_early = True
            raise
        finally:
            served.ended = time.monotonic()
            self._write_down(served)

    def _meets_fault(self, request: ChatRequest, orders: Orders) -> bool:
        if orders.fault is None or orders.times is None:
            return orders.fault is not None
        if len(self._tries) > KEPT:
            self._tries.clear()
        prompt = blake2b(msgspec.json.encode(request.messages), digest_size=16).digest()
        self._tries[prompt] += 1
        return self._tries[prompt] <= orders.times

    def _write_down(self, served: Served) -> None:
        if self.options.record is not None:
            with self.options.record.open("ab") as file:
                file.write(msgspec.json.encode(served) + b"\n")


async def serve_forever(
    options: Options, *, host: str, port: int, ready: Callable[[str], None] = lambda _url: None
) -> None:
    """Serve until cancelled; `ready` is called with the base URL once connections are accepted."""
    async with Simulator(options, host=host, port=port) as simulator:
        ready(simulator.url)
        await _for_ever()


class _Answer:
    """One answer on its way: good, or broken as ordered."""

    def __init__(
        self, connection: Connection, served: Served, request: ChatRequest, orders: Orders, options: Options
    ) -> None:
        self._connection = connection
        self._served = served
        self._request = request
        self._orders = orders
        self._options = options
        self._pending = orders.fault
        """The fault that has yet to strike."""

    async def give(self) -> None:
        fault = self._orders.fault
        if fault in _REFUSALS:
            await self._refuse(fault)
            return
        if fault == "refuse":
            self._strike(fault)
            return
        if fault == "hang":
            self._strike(fault)
            await _for_ever()
        await asyncio.sleep(self._orders.first_token)
        if fault == "html":
            self._strike(fault)
            await self._respond(200, "text/html; charset=utf-8", _PAGE)
        elif self._request.stream and fault != "json":
            await self._stream()
        else:
            await self._whole()

    def _strike(self, fault: Fault) -> None:
        self._pending = None
        self._served.fault = fault

    async def _refuse(self, fault: Fault) -> None:
        self._strike(fault)
        after = self._orders.retry_after
        headers = {} if after is None else {"retry_after": f"{after:g}"}
        await self._respond(int(fault), _JSON, msgspec.json.encode(_REFUSALS[fault]), **headers)

    async def _respond(self, status: int, content_type: str, body: bytes, **headers: str) -> None:
        self._served.status = status
        self._served.first_chunk = time.monotonic()
        await self._connection.respond(status, content_type, body, **headers)

    async def _whole(self) -> None:
        error = too_many_logprobs(self._request)
        if error is not None:
            raise RefusedError(400, error)
        reply = Reply(self._request, self._orders, self._options)
        if self._orders.rate:
            await asyncio.sleep(max(reply.lengths) / self._orders.rate)
        if self._pending == "json":
            self._strike("json")
        self._served.texts, self._served.reasonings = reply.contents, reply.reasonings
        self._served.tokens = sum(reply.lengths)
        await self._respond(200, _JSON, msgspec.json.encode(reply.complete()))
        self._served.finished = self._served.fault is None

    async def _stream(self) -> None:
        self._connection.begin(_EVENTS)
        self._served.status = 200
        error = too_many_logprobs(self._request)
        if error is not None:
            await self._end_with(error)
            return
        reply = Reply(self._request, self._orders, self._options)
        self._served.texts, self._served.reasonings = [[""] * reply.choices for _ in range(2)]
        for body in reply.opening():
            await self._event(body, reply)
        began = time.monotonic()
        for number, chunks in enumerate(reply.rounds()):
            due = began + number / self._orders.rate if self._orders.rate else 0
            # Yields in any case: other streams go on, and a close by the client is noticed.
            await asyncio.sleep(max(0, due - time.monotonic()))
            for chunk in chunks:
                if await self._breaks(reply):
                    return
                await self._send(chunk, reply)
            self._served.tokens = sum(reply.tokens)
        if not await self._breaks(reply):
            await self._close(reply)

    async def _send(self, chunk: Chunk, reply: Reply) -> None:
        # Recorded first: the client may have it while this waits for a slow connection.
        self._served.chunks += 1
        self._served.texts[chunk.choice] += chunk.content
        self._served.reasonings[chunk.choice] += chunk.reasoning
        await self._event(chunk.body, reply)

    async def _event(self, body: Json, reply: Reply) -> None:
        shapes = self._orders.shapes
        if "sloppy" in shapes:
            await self._frame(msgspec.json.encode(reply.oddity(self._served.chunks)))
        await self._frame(msgspec.json.encode(body))

    async def _frame(self, payload: bytes) -> None:
        first = self._served.first_chunk is None
        await self._connection.send(framed(payload, self._orders.shapes, first=first))
        if first:
            self._served.first_chunk = time.monotonic()

    async def _close(self, reply: Reply) -> None:
        for body in reply.closing():
            await self._event(body, reply)
        self._served.finished = True
        if self._pending == "no_done":
            self._strike("no_done")
        else:
            await self._frame(DONE)
        self._connection.finish()

    async def _end_with(self, error: Json) -> None:
        # vLLM words these with json.dumps, hence the spaces.
        await self._frame(json.dumps(error).encode())
        await self._frame(DONE)
        self._connection.finish()

    async def _breaks(self, reply: Reply) -> bool:
        """Whether the answer ended here by the ordered fault, which strikes once its number of chunks is sent."""
        fault = self._pending
        if fault is None or fault == "no_done" or self._served.chunks != self._orders.after:
            return False
        self._strike(fault)
        if fault == "stall":
            await _for_ever()
        elif fault == "freeze":
            while True:
                await asyncio.sleep(self._options.keep_alive)
                await self._connection.send(comment(self._orders.shapes))
        elif fault == "malformed":
            await self._frame(b'{"id":"chatcmpl-0","object":"chat.completion.chunk","choices":[{"index":0,"del')
            return False
        elif fault == "reset":
            self._connection.reset()
        elif fault == "error_under_200":
            await self._end_with(_ENGINE_DEAD)
        elif fault == "abort":
            for body in reply.aborted():
                await self._event(body, reply)
            await self._frame(DONE)
            self._connection.finish()
        else:
            self._connection.finish()
        return True


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _respond(connection: Connection, status: int, body: object, **headers: str) -> None:
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

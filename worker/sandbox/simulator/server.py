"""The simulated vLLM: its routes, its limits and its shutdown, and the records of its answers."""

import asyncio
import hmac
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Self
from uuid import uuid4
from weakref import WeakSet

import msgspec

from .record import Served, digest
from .replies import Reply
from .requests import (
    ChatRequest,
    Fault,
    Json,
    Options,
    RefusedError,
    Scenario,
    TextRequest,
    error_body,
    parse_chat_request,
    parse_json,
)
from .responder import Responder, send_error_event
from .scheduler import Scheduler, ServerClock
from .texts import TextReply, detokenize, parse_text_request, tokenize
from .wire import HttpConnection, HttpRequest

__all__ = ["Options", "Scenario", "Served", "Simulator", "serve_forever"]

KEPT = 10_000
"""How many records a server keeps, and how many prompts whose requests it counts."""

_JSON = "application/json"
_METRICS = "text/plain; version=1.0.0; charset=utf-8"
_FULL = error_body(
    503,
    "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.",
    kind="Service Unavailable",
)
_RATE_LIMITED = error_body(429, "Too many requests. Please retry later.", kind="RateLimitError")
_SHUT_DOWN = error_body(500, "cannot schedule new futures after shutdown", kind="InternalServerError")
_COMPLETIONS = "/v1/completions"
_METHODS = {
    "/v1/chat/completions": "POST",
    _COMPLETIONS: "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/models": "GET",
    "/health": "GET",
    "/metrics": "GET",
}


class Simulator:
    """A simulated vLLM, which runs inside `async with`."""

    def __init__(
        self,
        options: Options | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: ServerClock | None = None,
    ) -> None:
        self.options = options or Options()
        self._clock = clock or ServerClock()
        self.scheduler = Scheduler(self._clock, self.options.max_num_seqs)
        self.served: deque[Served] = deque(maxlen=KEPT)
        """The records of the latest 10,000 completions, oldest first. The record of a running one is updated."""
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._connections: WeakSet[HttpConnection] = WeakSet()
        self._count = 0
        self._tries: Counter[str] = Counter()
        self._is_draining = False

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

    def change(self, **options: object) -> None:
        """Change options while the server runs, such as `max_num_seqs`; begun answers keep the former ones."""
        self.options = msgspec.structs.replace(self.options, **options)
        self.scheduler.resize(self.options.max_num_seqs)

    async def drain(self, *, closing: float = 0) -> None:
        """Shut down as vLLM does on SIGTERM with `--shutdown-timeout`. Returns when no connection is accepted any more.

        Requests that were admitted are answered to their end. Further ones get a 500, while /health still answers 200.
        The server closes its port `closing` seconds after the last answer.
        """
        self._is_draining = True
        await self.scheduler.wait_idle()
        await self._clock.sleep(closing)
        self.refuse()

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
        elif request.path == "/metrics":
            await connection.respond(200, _METRICS, self._metrics())
        elif request.path == "/v1/models":
            await _respond(connection, 200, _models(self.options))
        elif self._is_draining and request.path in {"/tokenize", "/detokenize"}:
            await _respond(connection, 500, _SHUT_DOWN)
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
        served = Served(
            order=self._count, route=request.path, request={}, started=self._clock.now(),
            traceparent=request.headers.get("traceparent", ""),
        )  # fmt: skip
        self.served.append(served)
        try:
            served.request = parse_json(request.body)
            parse_request = parse_text_request if request.path == _COMPLETIONS else parse_chat_request
            parsed, scenario = parse_request(served.request, self.options)
            scenario = msgspec.structs.replace(scenario, fault=self._fault_for(parsed, scenario))
            self._check_admission(parsed)
            reply = (TextReply if isinstance(parsed, TextRequest) else Reply)(parsed, scenario, self.options)
            served.prompt, served.after = digest(reply.question), len(reply.begun)
            self._record(served)
            responder = Responder(
                connection, served, parsed, scenario, self.options, reply,
                scheduler=self.scheduler, clock=self._clock,
            )  # fmt: skip
            with self.scheduler.admit():
                await responder.send()
        except RefusedError as error:
            served.status = error.status
            if error.status == 200:
                await send_error_event(connection, error.body)
            else:
                await _respond(connection, error.status, error.body, **error.headers)
        except asyncio.CancelledError:
            served.closed_early = True
            raise
        finally:
            served.ended = self._clock.now()
            self._record(served)

    def _check_admission(self, request: ChatRequest) -> None:
        """Raise RefusedError if the server is full or shutting down. A full one checks that first, as vLLM does."""
        options = self.options
        if options.max_num_queued_reqs is not None and self.scheduler.admitted >= options.max_num_queued_reqs:
            if options.full_status == 429:
                after = options.full_retry_after
                headers = {} if after is None else {"retry_after": f"{after:g}"}
                raise RefusedError(429, _RATE_LIMITED, headers)
            raise RefusedError(200 if options.full_status == 200 and request.stream else 503, _FULL)
        if self._is_draining:
            raise RefusedError(500, _SHUT_DOWN)

    def _metrics(self) -> bytes:
        """What vLLM's own metrics tell about load."""
        lines = []
        for name, value, documentation in (
            ("running", self.scheduler.running, "Number of requests in model execution batches."),
            ("waiting", self.scheduler.waiting, "Number of requests waiting to be processed."),
        ):
            metric = f"vllm:num_requests_{name}"
            lines += [f"# HELP {metric} {documentation}", f"# TYPE {metric} gauge"]
            lines += [f'{metric}{{engine="0",model_name="{self.options.model}"}} {float(value)}']
        return "".join(f"{line}\n" for line in lines).encode()

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

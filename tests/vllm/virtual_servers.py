"""An event loop in virtual time, and vLLM servers in it that fail, fill up, drain and come back."""

import asyncio
import json
import random
import selectors
from collections.abc import AsyncIterator, Callable
from typing import Literal, cast

import httpx

from worker.vllm.http.connection import HttpResponse, ResponseBody
from worker.vllm.http.target import Target
from worker.vllm.http.transport import Transport

Mode = Literal["works", "away", "silent", "draining", "no_backend", "errors", "limits_rate", "cuts"]

_BUSY: tuple[int, str, dict[str, str]] = 503, "The engine is currently busy and cannot accept new requests.", {}
_REFUSALS: dict[Mode, tuple[int, str, dict[str, str]]] = {
    "draining": (500, "cannot schedule new futures after shutdown", {}),
    "no_backend": _BUSY,
    "errors": (500, "the engine is dead", {}),
    "limits_rate": (429, "Too many requests", {"retry-after": "3"}),
}


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer as soon as there is nothing to do."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        """See asyncio."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class _Jump(selectors.DefaultSelector):
    """Waits for nothing."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            self._loop.jump(timeout)
        return super().select(0)


class VirtualServer:
    """A server with a number of places and a queue behind them; `mode` is what it does to requests from now on."""

    def __init__(self, rng: random.Random, *, places: int, queue: int, model: str, has_metrics: bool) -> None:
        self.mode: Mode = "works"
        self.model = model
        self.places = places
        self.requests = 0
        self.running = self.waiting = 0
        self.has_metrics = has_metrics
        self._queue = queue
        self._rng = rng
        self._free = asyncio.Event()

    async def get(self, path: str) -> tuple[int, str]:
        """The status and the body of a page."""
        await asyncio.sleep(0.005)
        if self.mode == "away":
            raise httpx.ConnectError("refused") from ConnectionRefusedError()
        if self.mode == "silent":
            await asyncio.sleep(1000)
        if path == "/metrics" and self.has_metrics:
            return 200, f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting {self.waiting}\n"
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": self.model}]})
        return (200, "") if path == "/health" else (404, "")

    async def post(self) -> HttpResponse:
        """The response to a request for an answer."""
        self.requests += 1
        await asyncio.sleep(0.005)
        if self.mode == "away":
            raise httpx.ConnectError("refused") from ConnectionRefusedError()
        if self.mode == "silent":
            await asyncio.sleep(1000)
        refusal = _REFUSALS.get(self.mode)
        if refusal is None and self.running + self.waiting >= self.places + self._queue:
            refusal = _BUSY
        if refusal is not None:
            status, message, headers = refusal
            content = json.dumps({"error": {"message": message}}).encode()
            return _response(status, _Pieces(content), [(k.encode(), v.encode()) for k, v in headers.items()])
        self.waiting += 1
        try:
            while self.running >= self.places:
                self._free = self._free if not self._free.is_set() else asyncio.Event()
                await self._free.wait()
            self.running += 1
        finally:
            self.waiting -= 1
        return _response(200, _Answer(self, self._rng.uniform(0.2, 3)), [])

    def release(self) -> None:
        """Free a place."""
        self.running -= 1
        self._free.set()


class _Pieces(httpx.AsyncByteStream):
    """A body that is all there."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content

    async def aclose(self) -> None:
        """See httpx."""


class _Answer:
    """The body of a stream: a token, a pause, and the end, unless the server fails meanwhile."""

    def __init__(self, server: VirtualServer, seconds: float) -> None:
        self._server = server
        self._steps = [
            (0.02, _chunk("Seed")),
            (seconds, _chunk("er", finish_reason="stop")),
            (0.0, b"data: [DONE]\n\n"),
        ]
        self._holds = True

    async def read_into(self, on_data: Callable[[bytes], bool]) -> bool:
        """See `ResponseBody`."""
        if not self._steps:
            return False
        pause, piece = self._steps.pop(0)
        await asyncio.sleep(pause)
        if self._server.mode in ("away", "cuts"):
            raise httpx.RemoteProtocolError("the server closed the connection")
        if self._server.mode == "silent":
            await asyncio.sleep(1000)
        on_data(piece)
        return True

    async def aclose(self) -> None:
        """See `ResponseBody`."""
        if self._holds:
            self._holds = False
            self._server.release()


class VirtualTransport(Transport):
    """Sends requests to virtual servers, by the host in the URL."""

    def __init__(self, servers: dict[str, VirtualServer]) -> None:
        super().__init__()
        self._servers = servers

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx."""
        status, text = await self._servers[request.url.host].get(request.url.path)
        return httpx.Response(status, text=text)

    async def post(self, target: Target, content: bytes, connect_limit: float) -> HttpResponse:  # noqa: ARG002
        """See `Transport`."""
        return await self._servers[target.origin[1]].post()


def _response(status: int, body: object, headers: list[tuple[bytes, bytes]]) -> HttpResponse:
    return HttpResponse(status, headers, cast("ResponseBody", body))


def _chunk(content: str, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}
    chunk = {"id": "1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}
    return b"data: %b\n\n" % json.dumps(chunk).encode()

"""The sending end of one connection. It drives ASGI's `send()` and `receive()` in callbacks, without a task.

An idle stream then needs one suspended task and no queue, and a frame is written in the step in which it arrives. This
works with `send()` and `receive()` that wait for nothing but futures, as those of uvicorn do; middleware between must
be plain ASGI, and not Starlette's BaseHTTPMiddleware, which needs a task.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

from .connection_parts import LeanFlowControl
from .protocols.protocol import Frame, Message, StreamProtocol

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Connection: TypeAlias = tuple[Scope, Receive, Send]
"""What ASGI gives for one connection."""

ABORT = "vllm_relay.abort"
"""The key of a scope with the server's function that destroys the connection, if the server offers one."""

RAW_SEND = "vllm_relay.raw_send"
"""The key of a scope with the server's own `send`: frames bypass the middleware."""

WIRE = "vllm_relay.wire"
"""The key of a scope with a `Wire`, if frames may go around the server's `send`."""

DEFERRED = "vllm_relay.deferred"
"""The key of a scope with a list: the outermost application calls what is in it once everything inside has returned.

A stream that has begun does not need the middleware and the router around it, whose suspended coroutines take as much
memory as the rest of an idle stream. What is added meanwhile is called once the request is counted and logged.
"""

_Stepped: TypeAlias = Coroutine["asyncio.Future[Any] | None", None, Any]


_KEPT = frozenset({"type", "method", "path", "http_version", "client", "route"})


def forget_request(scope: Scope) -> None:
    """Drop what a scope holds of a request whose response has begun: a browser's headers alone take 3 KiB.

    What the server and the access log need stays, and all that the gateway has put there.
    """
    kept = {name: value for name, value in scope.items() if name in _KEPT or name.startswith("vllm_relay.")}
    headers = scope.get("headers")
    if isinstance(headers, list):
        headers.clear()  # the server has the same list
    scope.clear()
    scope.update(kept)


class Wire(NamedTuple):
    """The connection itself, whose response is chunked. A write to it is cheaper than a call of the server's `send`."""

    transport: asyncio.WriteTransport
    flow: LeanFlowControl


class Outlet:
    """Sends frames over one connection, and notices when the client leaves.

    Args:
        on_change: called when the client must read before more is written, when it has, and when it has left.
    """

    __slots__ = (
        "_abort",
        "_flow",
        "_held",
        "_loop",
        "_on_change",
        "_protocol",
        "_receive",
        "_send",
        "blocked_at",
        "direct",
        "is_gone",
        "sent_at",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, protocol: StreamProtocol, on_change: Callable[[], object]
    ) -> None:
        self._protocol = protocol
        self._receive = receive
        self._send = cast("Callable[[Message], _Stepped]", send)
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._abort: Callable[[], object] | None = scope.get(ABORT)
        wire: Wire | None = scope.get(WIRE)
        self._flow = wire.flow if wire is not None else None
        self.direct: Callable[[bytes], object] | None = wire.transport.write if wire is not None else None
        """Writes the chunk of a frame around the server's `send`, if that is possible. Call it only while writes do not
        block. It raises `RuntimeError` if the connection is closed, which `receive` will report."""
        self._held: list[Message] = []
        """Messages to send after the one that waits."""
        self.is_gone = False
        """Whether the client has left."""
        self.blocked_at = 0.0
        """Since when a write waits for the client to read, by the event loop's clock; 0 if none does."""
        self.sent_at = self._loop.time()
        """When this stream was last written to, except for live frames; by the event loop's clock."""

    def watch(self) -> None:
        """Begin to notice when the client leaves, and when it must read before more is written."""
        if self._flow is not None:
            self._flow.on_pause = self._on_pause
            if self._flow.write_paused:
                self._on_pause()
        self._read(cast("_Stepped", self._receive()))

    def write(self, message: Message) -> bool:
        """Send a message. Returns false if it waits for the client to read: send nothing before `on_change` is called.

        A client that has left gets nothing, which is no error.
        """
        if self.is_gone:
            return True
        if self.blocked_at:
            self._held.append(message)
            return False
        coroutine = self._send(message)
        try:
            waits_for = coroutine.send(None)
        except StopIteration:
            return not self.blocked_at
        except OSError:
            self._leave()
            return True
        self.blocked_at = self._loop.time()
        self._resume_after(waits_for, coroutine, self._continue_write)
        return False

    def write_by(self, send: Send, message: Message) -> bool:
        """Send a message as `write` does, by another `send`: the head of a response goes through the middleware."""
        own, self._send = self._send, cast("Callable[[Message], _Stepped]", send)
        try:
            return self.write(message)
        finally:
            self._send = own

    def write_frame(self, frame: Frame) -> bool:
        """Send a frame of a log as `write` does."""
        if self.direct is None or self.is_gone or self.blocked_at:
            if frame.message is None:
                frame.message = self._protocol.message(frame.data)
            return self.write(frame.message)
        try:
            self.direct(frame.chunk)
        except RuntimeError:
            return True
        return not self.blocked_at

    def abort(self) -> bool:
        """Destroy the connection, and drop what was not sent yet. Returns whether the server offers this."""
        if self._abort is not None:
            self._abort()
        return self._abort is not None

    def stop(self) -> None:
        """Call `on_change` no more."""
        self._on_change = _do_nothing
        if self._flow is not None and self._flow.on_pause == self._on_pause:  # the next response may have begun
            self._flow.on_pause = None

    def _on_pause(self) -> None:
        if self._flow is not None and not self.blocked_at:
            self.blocked_at = self._loop.time()
            self._flow.drain().add_done_callback(self._on_writable)
            self._on_change()

    def _on_writable(self, _drained: object = None) -> None:
        self.blocked_at = 0.0
        self.sent_at = self._loop.time()
        held, self._held = self._held, []
        if [self.write(message) for message in held].count(False) == 0:  # `all` would stop at the first
            self._on_change()

    def _continue_write(self, coroutine: _Stepped, _waited_for: object = None) -> None:
        try:
            waits_for = coroutine.send(None)
        except StopIteration:
            self._on_writable()
        except OSError:
            self.blocked_at = 0.0
            self._leave()
        else:
            self._resume_after(waits_for, coroutine, self._continue_write)

    def _read(self, coroutine: _Stepped, _waited_for: object = None) -> None:
        while True:
            try:
                waits_for = coroutine.send(None)
            except StopIteration as stop:
                if stop.value["type"] in {"http.disconnect", "websocket.disconnect"}:
                    self._leave()
                    return
                # The body of the request, or a message of a WebSocket, which has no meaning here.
                coroutine = cast("_Stepped", self._receive())
            else:
                self._resume_after(waits_for, coroutine, self._read)
                return

    def _leave(self) -> None:
        self.is_gone = True
        self._on_change()

    def _resume_after(
        self, waits_for: "asyncio.Future[Any] | None", coroutine: _Stepped, step: Callable[..., None]
    ) -> None:
        if waits_for is None:
            self._loop.call_soon(step, coroutine)
            return
        waits_for._asyncio_future_blocking = False  # noqa: SLF001 - tells the future, as a task does, that it is awaited
        waits_for.add_done_callback(partial(step, coroutine))


def _do_nothing(*_: object) -> None:
    pass

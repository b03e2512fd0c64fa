"""The sending end of one connection. It drives ASGI's `send()` and `receive()` in callbacks, without a task.

An idle stream then needs one suspended task and no queue, and a frame is written in the step in which it arrives. This
works with `send()` and `receive()` that wait for nothing but futures, as those of uvicorn do; middleware between must
be plain ASGI, and not Starlette's BaseHTTPMiddleware, which needs a task.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeAlias, cast

from ..contract.ids import BEFORE_ALL
from .protocols.protocol import Frame, Message

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Connection: TypeAlias = tuple[Scope, Receive, Send]
"""What ASGI gives for one connection."""

ABORT = "vllm_relay.abort"
"""The key of a scope under which the server offers to destroy the connection: a function without arguments."""

RAW_SEND = "vllm_relay.raw_send"
"""The key of a scope with the server's own `send`: frames bypass the middleware."""

DEFERRED = "vllm_relay.deferred"
"""The key of a scope with a list: the outermost application calls what is in it once everything inside has returned.

A stream that has begun does not need the middleware and the router around it, whose suspended coroutines take as much
memory as the rest of an idle stream.
"""

_Stepped: TypeAlias = Coroutine["asyncio.Future[Any] | None", None, Any]


class Outlet:
    """Sends frames over one connection, and notices when the client leaves.

    Args:
        on_change: called when a blocked write has finished, or when the client has left.
    """

    __slots__ = ("_abort", "_held", "_loop", "_on_change", "_receive", "_send", "blocked_at", "is_gone", "sent_at")

    def __init__(self, scope: Scope, receive: Receive, send: Send, on_change: Callable[[], object]) -> None:
        self._receive = receive
        self._send = cast("Callable[[Message], _Stepped]", send)
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._abort: Callable[[], object] | None = scope.get(ABORT)
        self._held: list[Message] = []
        """Messages to send after the one that waits."""
        self.is_gone = False
        """Whether the client has left."""
        self.blocked_at = 0.0
        """Since when a write waits for the client to read, by the event loop's clock; 0 if none does."""
        self.sent_at = self._loop.time()
        """When this stream was last written to, except for live frames; by the event loop's clock."""

    def watch(self) -> None:
        """Begin to notice when the client leaves."""
        self._read(cast("_Stepped", self._receive()))

    def write(self, message: Message) -> bool:
        """Send a message. Returns false if it waits for the client to read: send nothing before `on_change` is called.

        A client that has left gets nothing, which is no error.
        """
        return self.write_frame(Frame(BEFORE_ALL, b"", message))

    def write_by(self, send: Send, message: Message) -> bool:
        """Send a message as `write` does, by another `send`: the head of a response goes through the middleware."""
        own, self._send = self._send, cast("Callable[[Message], _Stepped]", send)
        try:
            return self.write(message)
        finally:
            self._send = own

    def write_frame(self, frame: Frame) -> bool:
        """Send a frame of a log as `write` does. This runs for each entry and reader, so nothing is called for it."""
        if self.is_gone:
            return True
        if self.blocked_at:
            self._held.append(frame.message)
            return False
        coroutine = self._send(frame.message)
        try:
            waits_for = coroutine.send(None)
        except StopIteration:
            return True
        except OSError:
            self._leave()
            return True
        return self._wait(waits_for, coroutine)

    def abort(self) -> None:
        """Destroy the connection. What was not sent yet is dropped, if the server offers `ABORT`."""
        if self._abort is not None:
            self._abort()

    def stop(self) -> None:
        """Call `on_change` no more."""
        self._on_change = _do_nothing

    def _wait(self, waits_for: "asyncio.Future[Any] | None", coroutine: _Stepped) -> bool:
        self.blocked_at = self._loop.time()
        self._resume_after(waits_for, coroutine, self._continue_write)
        return False

    def _continue_write(self, coroutine: _Stepped) -> None:
        try:
            waits_for = coroutine.send(None)
        except StopIteration:
            self.blocked_at = 0.0
            self.sent_at = self._loop.time()
            held, self._held = self._held, []
            if [self.write(message) for message in held].count(False) == 0:  # `all` would stop at the first
                self._on_change()
        except OSError:
            self.blocked_at = 0.0
            self._leave()
        else:
            self._resume_after(waits_for, coroutine, self._continue_write)

    def _read(self, coroutine: _Stepped) -> None:
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
        self, waits_for: "asyncio.Future[Any] | None", coroutine: _Stepped, step: Callable[[_Stepped], None]
    ) -> None:
        if waits_for is None:
            self._loop.call_soon(step, coroutine)
            return
        waits_for._asyncio_future_blocking = False  # noqa: SLF001 - tells the future, as a task does, that it is awaited
        waits_for.add_done_callback(lambda _: step(coroutine))


def _do_nothing() -> None:
    pass

"""Parts of a connection. They replace larger ones, so that idle streams take less memory."""

import asyncio
from collections.abc import Callable
from typing import Any


class LeanEvent:
    """An `asyncio.Event` without a deque, which takes 700 bytes, and whose `wait` needs no coroutine."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self, *, is_set: bool = False) -> None:
        self._is_set = is_set
        self._waiters: tuple[asyncio.Future[None], ...] = ()

    def is_set(self) -> bool:
        """Whether the event is set."""
        return self._is_set

    def set(self) -> None:
        """Finish all futures of `wait`."""
        self._is_set = True
        waiters, self._waiters = self._waiters, ()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        """Let later calls of `wait` wait again."""
        self._is_set = False

    def wait(self) -> "asyncio.Future[None]":
        """Return a future that is done once the event is set."""
        waiter = asyncio.get_running_loop().create_future()
        if self._is_set:
            waiter.set_result(None)
        else:
            self._waiters = (*(other for other in self._waiters if not other.done()), waiter)
        return waiter


class LeanFlowControl:
    """uvicorn's `FlowControl`, with a `LeanEvent` and without a dict."""

    __slots__ = ("_transport", "_writable", "is_broken", "on_pause", "read_paused", "write_paused")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._writable = LeanEvent(is_set=True)
        self.read_paused = False
        self.write_paused = False
        self.is_broken = False
        """Whether the connection was lost before the other end had everything."""
        self.on_pause: Callable[[], object] | None = None
        """Called in the step in which the transport's write buffer becomes full."""

    def drain(self) -> "asyncio.Future[None]":
        """Return a future that is done once the transport takes more."""
        return self._writable.wait()

    def pause_reading(self) -> None:
        """Read nothing from the client."""
        if not self.read_paused:
            self.read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the client again."""
        if self.read_paused:
            self.read_paused = False
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """Called by the transport when its write buffer is full."""
        self.write_paused = True
        self._writable.clear()
        if self.on_pause is not None:
            self.on_pause()

    def resume_writing(self) -> None:
        """Called by the transport when its write buffer is no longer full."""
        self.write_paused = False
        self._writable.set()


class LeanPipeline(list[Any]):
    """A deque of requests that wait for the one before, as far as uvicorn needs it. An empty deque takes 700 bytes."""

    __slots__ = ()

    def appendleft(self, item: object) -> None:
        """Add a request. `pop` returns the oldest."""
        self.insert(0, item)

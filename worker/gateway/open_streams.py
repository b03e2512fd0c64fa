"""The open streams of a process: they share a timer for heartbeats and dead connections, and end together at a stop."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

from ..client.errors import ClientError
from ..telemetry.events import NO_TELEMETRY, Telemetry
from ..telemetry.stream_events import CaughtUp, FollowerDropped, StreamClosed, StreamEnd, StreamOpened
from .log_cursor import LogCursor
from .outlets import DEFERRED, Outlet, Scope
from .problems import Problem, log_reason
from .protocols.protocol import Message, StreamProtocol
from .tails import Tails

QueuePosition = Callable[[str], Awaitable[int | None]]
"""Returns how many jobs wait before a request; None if that is not known."""

_CHECKED_AT_ONCE = 200
"""How many streams are checked in one step, during which entries wait."""


async def _unknown(_: str) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPace:
    """The times of open streams, in seconds."""

    heartbeat: float = 12.0
    """The silence after which a stream gets a comment."""
    write_timeout: float = 30.0
    """The time after which a client that reads nothing loses its connection."""
    tick: float = 1.0
    """The time between two checks of all streams."""


class ClientStream(ABC):
    """One open stream. Its task sleeps while entries are written live."""

    __slots__ = ("_catch_ups", "_streams", "_waiter", "end", "has_position", "outlet", "problem", "protocol", "scope")

    def __init__(self, streams: "OpenStreams", protocol: StreamProtocol, outlet: Outlet) -> None:
        self.protocol = protocol
        self.outlet = outlet
        self.end: StreamEnd = "done"
        self.problem: Problem | None = None
        """The problem that has ended the stream early."""
        self.has_position = False
        """Whether the client knows its place in the queue."""
        self.scope: asyncio.Timeout | None = None
        """What the stream does can be cancelled while this is not None."""
        self._streams = streams
        self._waiter: asyncio.Future[None] | None = None
        self._catch_ups = 0

    @property
    @abstractmethod
    def last_sent_at(self) -> float:
        """When something was last sent, by the event loop's clock."""

    @property
    @abstractmethod
    def waiting_request(self) -> str:
        """The id of the request whose place in its queue the client is told; empty if it does not wait."""

    @abstractmethod
    async def follow(self) -> Problem | None:
        """Write everything up to the end. Returns the problem that ends the stream early."""

    @abstractmethod
    def leave(self) -> None:
        """Stop following."""

    async def finish(self, last: bytes) -> None:
        """Send the last bytes, and end the response."""
        await self.send({"type": "http.response.body", "body": last, "more_body": False})

    async def send(self, message: Message) -> None:
        """Send a message, and wait until it is sent."""
        self.outlet.write(message)
        await self.wait_writable()

    async def catch_up(self, cursor: LogCursor, *, is_new: bool = False) -> None:
        """Let a cursor catch up with its log. Raises the errors of `Client.follow`."""
        time = asyncio.get_running_loop().time
        began, self._catch_ups = time(), self._catch_ups + 1
        await cursor.catch_up(is_new=is_new)
        self._streams.telemetry.emit(
            CaughtUp(self.protocol.name, "slow" if self._catch_ups > 1 else "opened", time() - began)
        )

    def wait(self) -> "asyncio.Future[None]":
        """Return what waits until `wake` is called. It is no coroutine, which an idle stream would keep in memory."""
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        return waiter

    async def wait_writable(self) -> None:
        """Wait until a frame can be written. See `CursorOwner`."""
        while self.outlet.blocked_at and not self.outlet.is_gone:
            await self.wait()

    def wake(self) -> None:
        """Let the stream's task go on. See `CursorOwner`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def stop(self, end: StreamEnd) -> None:
        """End the stream early."""
        if self.scope is not None:
            self.end = end
            self.scope.reschedule(0.0)
            self.scope = None


class OpenStreams:
    """All open streams of a process.

    Args:
        tails: the logs that they follow.
        position: returns the place of a request in its queue.
        pace: the times.
        telemetry: receives events.
    """

    def __init__(
        self, tails: Tails, *, position: QueuePosition = _unknown, pace: StreamPace | None = None,
        telemetry: Telemetry = NO_TELEMETRY,
    ) -> None:  # fmt: skip
        self.tails = tails
        self.telemetry = telemetry
        self.is_ending = False
        """Whether the process stops: a stream that begins now ends at once."""
        self.position = position
        self._pace = pace or StreamPace()
        self._streams: dict[ClientStream, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.Task[None] | None = None
        self._finish_within = self._pace.write_timeout
        """Seconds that a client has to read the end of its stream."""

    def __len__(self) -> int:
        return len(self._streams)

    async def start(self, stream: ClientStream, scope: Scope) -> None:
        """Run a stream up to its end, here or where the outermost application has no middleware in memory."""
        deferred: list[Callable[[], Awaitable[None]]] | None = scope.get(DEFERRED)
        if deferred is None:
            await self.run(stream)
        else:
            deferred.append(partial(self.run, stream))

    async def run(self, stream: ClientStream) -> None:
        """Run a stream up to its end. The head of its response was sent."""
        name = stream.protocol.name
        self._streams[stream] = None
        self.telemetry.emit(StreamOpened(name))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pace.tick, self._check)
        try:
            last = await self._follow(stream)
            if stream.end == "stalled":
                await self._drop(stream)
            elif not stream.outlet.is_gone:
                async with asyncio.timeout(self._finish_within):
                    await stream.finish(last)
        except TimeoutError:
            stream.end = "stalled"
            await self._drop(stream)
        finally:
            stream.outlet.stop()
            del self._streams[stream]
            self.telemetry.emit(StreamClosed(name, stream.end))
            if not self._streams:
                self.tails.meter.report()

    def end_all(self, within: float) -> None:
        """End every stream as its protocol needs it when the process stops, within so many seconds; returns at once.

        Streams that begin later end as they begin.
        """
        self.is_ending = True
        self._finish_within = min(within, self._finish_within)
        for stream in list(self._streams):
            stream.stop("shutdown")

    async def aclose(self) -> None:
        """Stop the timer. Call this after the last stream has ended."""
        if self._timer is not None:
            self._timer.cancel()
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)

    async def _drop(self, stream: ClientStream) -> None:
        """Destroy a connection whose client reads nothing."""
        self.telemetry.emit(FollowerDropped(stream.protocol.name))
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):  # uvicorn logs an error if the response ends before the connection
                while stream.outlet.abort() and not stream.outlet.is_gone:
                    await stream.wait()

    async def _follow(self, stream: ClientStream) -> bytes:
        """Follow; returns what ends the stream."""
        scope = asyncio.timeout(None)
        try:
            async with scope:
                stream.scope = scope
                if self.is_ending:
                    stream.stop("shutdown")
                stream.outlet.watch()
                stream.problem = await stream.follow()
        except TimeoutError:
            if not scope.expired():
                raise
            return stream.protocol.interrupted() if stream.end == "shutdown" else b""
        finally:
            stream.scope = None
            stream.leave()
        if stream.problem is None:
            return b""
        stream.end = "problem"
        log_reason(stream.problem, self.telemetry)
        return stream.protocol.failed(stream.problem)

    def _check(self, streams: list[ClientStream] | None = None) -> None:
        """Drop the clients that read nothing, and send heartbeats."""
        streams = list(self._streams) if streams is None else streams
        loop = asyncio.get_running_loop()
        now, untold = loop.time(), list[ClientStream]()
        for stream in islice(streams, _CHECKED_AT_ONCE):
            blocked_at = stream.outlet.blocked_at
            if blocked_at:
                if now - blocked_at > self._pace.write_timeout:
                    stream.stop("stalled")
                continue
            if stream.scope is None:
                continue
            is_silent = now - stream.last_sent_at > self._pace.heartbeat
            if (is_silent or not stream.has_position) and stream.waiting_request:
                untold.append(stream)
            elif is_silent:
                self._beat(stream, "ping")
        if untold and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self._tell_positions(untold))
        if rest := streams[_CHECKED_AT_ONCE:]:
            self._timer = loop.call_later(0.001, self._check, rest)
            return
        self.tails.meter.report()
        self._timer = loop.call_later(self._pace.tick, self._check) if self._streams else None

    def _beat(self, stream: ClientStream, text: str) -> None:
        if stream.scope is None or stream.outlet.blocked_at:
            return
        stream.outlet.sent_at = asyncio.get_running_loop().time()
        if heartbeat := stream.protocol.heartbeat(text):
            stream.outlet.write(stream.protocol.message(heartbeat))

    async def _tell_positions(self, streams: list[ClientStream]) -> None:
        for stream in streams:
            request_id = stream.waiting_request
            if not request_id:  # it was started since the check
                continue
            try:
                position = await self.position(request_id)
            except ClientError:
                position = None
            if stream.waiting_request:  # it may have been started meanwhile
                stream.has_position = True
                self._beat(stream, "ping" if position is None else f"queued {position}")

"""The event stream of many requests over one connection, because a browser has only six connections to a host.

An event is `[{"request": id, "entries": [entry, …]}]`. Its id is a cursor with the place in every log:
`<request>:<entry id>` or `<request>:end`, separated by commas.
"""

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import ClassVar

import msgspec

from ..client.errors import ClientError
from ..contract.ids import BEFORE_ALL, SEAL, EntryId
from .event_cursors import parse_cursor
from .ids import FIRST
from .log_cursor import LogCursor
from .open_streams import ClientStream, OpenStreams
from .outlets import Connection, Outlet
from .problems import Problem, log_reason, problem_of
from .protocols.native import NativeEvents, NativeMessages, error_object
from .protocols.protocol import Frame

MOST_REQUESTS = 64
"""The most requests that one connection follows at a time."""

_REFRESH = 2.0
"""Seconds after which a connection that follows all requests of its caller looks for new ones."""

_ENDED_KEPT = 256
"""The most ended requests that a connection knows, so that it does not follow them again."""

_ENDED_NAMED = 8
"""The most ended requests in the cursor of a connection that follows all requests of its caller.

A caller that comes back follows those that run and those that its cursor names without an end, so the cursor needs no
ended ones. The latest few stay, since a request may look as if it runs for a moment.
"""

_OWN_ID = re.compile(r"[0-9a-f]{48}")
_END = "end"

ListRunning = Callable[[Sequence[str]], Awaitable[Sequence[str]]]
"""Forgets requests that have ended, and returns the ids of the caller's running requests."""


def short_id(request_id: str) -> str:
    """The name of a request in a cursor: what `id_of_first` needs of a gateway's id, and the whole of every other."""
    return request_id[:FIRST] if _OWN_ID.fullmatch(request_id) else request_id


def parse_cursors(text: str) -> dict[str, EntryId]:
    """Read the place in each log from a cursor; a log that is not named begins at its start.

    Raises:
        Problem: when the text is no cursor (400).
    """
    if text in {"", "0", "-1", "0-0"}:
        return {}
    places: dict[str, EntryId] = {}
    for part in text.split(","):
        name, colon, place = part.rpartition(":")
        if not colon or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name, re.ASCII):
            raise Problem(400, "invalid_cursor", "the cursor is not one of this stream", param="after")
        places[name] = SEAL if place == _END else parse_cursor(place)
    return places


class _ManyEvents(NativeEvents):
    """The events of many logs."""

    name: ClassVar[str] = "multiplexed"


class RequestsStream(ClientStream):
    """The open stream of many logs.

    Args:
        places: where to begin in each log, by the short ids.
        list_running: returns further requests to follow, from time to time. Without it, the stream ends with the last
            of `request_ids`.
    """

    __slots__ = ("_cursors", "_ended", "_followed", "_list_running", "_over", "_places")

    def __init__(
        self, streams: OpenStreams, connection: Connection, request_ids: Sequence[str], places: Mapping[str, EntryId],
        list_running: ListRunning | None = None,
    ) -> None:  # fmt: skip
        protocol = _ManyEvents()
        super().__init__(streams, protocol, Outlet(*connection, protocol, self.on_change))
        self._places = dict(places)
        """Where the reader is in each log, by the short ids."""
        self._cursors: dict[str, LogCursor] = {}
        self._followed: dict[str, str] = {}
        """The places in the logs that are followed, as the cursor has them, by the short ids."""
        self._ended: deque[str] = deque(maxlen=MOST_REQUESTS if list_running is None else _ENDED_NAMED)
        """The ended requests in the cursor."""
        self._list_running = list_running
        self._over: list[str] = []
        """The requests that have ended since `list_running` was called."""
        self._add(request_ids)

    @property
    def last_sent_at(self) -> float:
        return max(self.outlet.sent_at, *(cursor.last_frame_at for cursor in self._cursors.values()), 0.0)

    @property
    def waiting_request(self) -> str:
        return ""

    def on_change(self) -> None:
        """See `Outlet`. A cursor notices by itself that its client must read, when it writes."""
        if self.outlet.is_gone:
            self.stop("left")
        elif not self.outlet.blocked_at:
            for cursor in list(self._cursors.values()):
                cursor.on_writable()
        self.wake()

    async def follow(self) -> Problem | None:
        refresh = asyncio.create_task(self._refresh(self._list_running)) if self._list_running else None
        try:
            while self._cursors or refresh:
                for request_id, cursor in list(self._cursors.items()):
                    error: Exception | None = await self._catch_up(cursor) if cursor.is_behind else None
                    if error is None and cursor.is_over:
                        error = cursor.error
                    if error is not None and problem_of(error).is_temporary:
                        return problem_of(error)  # the client comes back, to the same place in every log
                    if error is not None or cursor.is_over:
                        await self._end(request_id, error)
                is_idle = not any(cursor.is_behind or cursor.is_over for cursor in self._cursors.values())
                if is_idle and (self._cursors or refresh):
                    await self.wait()
        finally:
            if refresh is not None:
                refresh.cancel()
        return None

    def leave(self) -> None:
        for cursor in self._cursors.values():
            cursor.leave()

    def _add(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            place = self._places.get(short_id(request_id), BEFORE_ALL)
            if place == SEAL and self._list_running is None:
                self._ended.append(f"{short_id(request_id)}:{_END}")
            if request_id in self._cursors or place == SEAL or len(self._cursors) >= MOST_REQUESTS:
                continue
            if place != BEFORE_ALL:
                self._followed[short_id(request_id)] = f"{short_id(request_id)}:{place}"
            self._cursors[request_id] = LogCursor(
                self._streams.tails, request_id, NativeMessages(), self, self._writer(request_id), position=place
            )

    def _writer(self, request_id: str) -> Callable[[Frame], bool]:
        begin = b'data: [{"request":%b,"entries":' % msgspec.json.encode(request_id)
        name, places, followed = short_id(request_id), self._places, self._followed

        def write(frame: Frame) -> bool:
            places[name] = frame.last
            followed[name] = f"{name}:{_END if frame.last == SEAL else frame.last}"
            data = b"id: %b\n%b%b}]\n\n" % (self._cursor(), begin, frame.data)
            return self.outlet.write(self.protocol.message(data))

        return write

    def _cursor(self) -> bytes:
        """The cursor after the last frame. Each frame has it, so it must not grow with what was followed before."""
        return ",".join([*self._ended, *self._followed.values()]).encode()

    async def _catch_up(self, cursor: LogCursor) -> ClientError | None:
        try:
            await self.catch_up(cursor)
        except ClientError as error:
            return error
        return None

    async def _end(self, request_id: str, error: Exception | None) -> None:
        """Forget a log that has ended. An error is reported in an event, and the others go on."""
        self._cursors.pop(request_id).leave()
        self._followed.pop(short_id(request_id), None)
        self._ended.append(f"{short_id(request_id)}:{_END}")
        if self._list_running is not None:
            self._over.append(request_id)
        ended = [name for name, place in self._places.items() if place == SEAL]
        for name in ended[:-_ENDED_KEPT]:
            del self._places[name]
        if error is not None:
            self._places[short_id(request_id)] = SEAL
            problem = problem_of(error)
            log_reason(problem, self._streams.telemetry)
            data = msgspec.json.encode({"request": request_id, **error_object(problem)})
            event = b"event: %b\nid: %b\ndata: %b\n\n" % (
                b"gone" if problem.status in {404, 410} else b"problem", self._cursor(), data,
            )  # fmt: skip
            await self.send(self.protocol.message(event))

    async def _refresh(self, list_running: ListRunning) -> None:
        while True:
            await asyncio.sleep(_REFRESH)
            over, self._over = self._over, []
            try:
                self._add(await list_running(over))
            except (ClientError, Problem):
                self._over += over
                continue
            self.wake()

"""The listening socket and the connections that it accepts: uvicorn's protocols, without its server and its signals."""

import asyncio
import socket
import time
from email.utils import formatdate

from starlette.types import ASGIApp
from uvicorn.server import ServerState

from .connections import BoundedProtocol, Bounds, protocol_config
from .tasks import end_tasks

_LARGEST_MESSAGE = 64 * 1024
"""Bytes of a WebSocket message that a client may send."""

_BACKLOG = 2048

_LONGEST_TURN = 0.05
"""Seconds for which a turn of the event loop counts at most when the last connections are waited for."""

_SEND_BUFFER = 256 * 1024
"""Bytes that the kernel takes for a client that does not read; it doubles the number. By default it takes 4 MiB."""


def bind(host: str, port: int, write_timeout: float) -> socket.socket:
    """A socket that listens at an address. What it accepts inherits its options.

    Raises:
        OSError: when the address is in use, or does not belong to this machine.
    """
    family, *_, address = next(iter(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: unacknowledged data, and a window that stays closed
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_timeout * 1000))
        listening.bind(address)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


class HttpListener:
    """Serves an application at a socket, until `close` and `finish`."""

    def __init__(self, app: ASGIApp, listening: socket.socket, bounds: Bounds, keep_alive_timeout: float) -> None:
        self._config = protocol_config(app, timeout_keep_alive=keep_alive_timeout, ws_max_size=_LARGEST_MESSAGE)
        self._bounds = bounds
        self._socket = listening
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self._dating: asyncio.TimerHandle | None = None

    @property
    def port(self) -> int:
        """The port, which the system has chosen if 0 was given."""
        return int(self._socket.getsockname()[1])

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._state.connections)

    async def start(self) -> None:
        """Begin to accept connections."""
        self._set_date()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: BoundedProtocol(self._config, self._state, self._bounds), sock=self._socket, backlog=_BACKLOG
        )

    def close(self) -> None:
        """Accept no more connections, and close those that are idle."""
        if self._server is not None:
            self._server.close()

    def close_idle(self) -> None:
        """Close connections without a request. Others close after their response."""
        for connection in list(self._state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.shutdown()

    async def finish(self, within: float, last_steps: float) -> int:
        """Wait for the open connections, and cut those that are left; returns how many that were.

        They have `within` seconds, and after that `last_steps` seconds. Of the latter, a turn of the event loop counts
        for at most 0.05 s: ending a response takes some turns, and each may take a second on a busy machine.
        """
        before = time.monotonic()
        until = before + within
        while self._state.connections and last_steps > 0:
            self.close_idle()
            await asyncio.sleep(0.02)
            now = time.monotonic()
            last_steps -= min(max(0.0, now - max(before, until)), _LONGEST_TURN)
            before = now
        left = list(self._state.connections)
        for connection in left:
            if (transport := connection.transport) is not None:
                transport.abort()
        await end_tasks(self._state.tasks)
        if self._dating is not None:
            self._dating.cancel()
        return len(left)

    def _set_date(self) -> None:
        date = (b"date", formatdate(time.time(), usegmt=True).encode())
        # In place: a WebSocket keeps the list that it found.
        self._state.default_headers[:] = [date, *self._config.encoded_headers]
        self._dating = asyncio.get_running_loop().call_later(1, self._set_date)

"""WebSockets of clients that do not read, and handshakes that are refused."""

import asyncio
import socket
from contextlib import suppress

import pytest
from gateway_fixtures import Served, StartGateway
from redis.asyncio import Redis
from test_connections import exchange, parts
from uvicorn.protocols.utils import ClientDisconnected
from waits import eventually
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from written_log import START, WrittenLog

from worker import Delta
from worker.contract.ids import EntryId
from worker.gateway.websocket_connections import WebSocketConnection

UPGRADE = b" HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
VERSION = b"Sec-WebSocket-Version: 13\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
PIECES = 100
PIECE = "x" * 100_000
"""All pieces together are more than the buffers of a connection take."""


class SlowClient:
    """Follows a request, and reads nothing; or so little that the connection lives, and the gateway waits."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect(("127.0.0.1", port))
        self._socket.sendall(b"GET /requests/r/ws" + UPGRADE + VERSION + KEY + b"\r\n")
        self._socket.setblocking(False)

    async def drip(self) -> None:
        """Read 5 KB a second."""
        with suppress(ConnectionError):
            while await asyncio.get_running_loop().sock_recv(self._socket, 500):  # noqa: ASYNC110 - it reads slowly
                await asyncio.sleep(0.1)

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("drips", [True, False], ids=["reads slowly", "reads nothing"])
@pytest.mark.parametrize("is_live", [True, False], ids=["live", "backlog"])
async def test_a_websocket_whose_client_does_not_keep_up_is_destroyed(
    start_gateway: StartGateway, redis: Redis, monkeypatch: pytest.MonkeyPatch, *, is_live: bool, drips: bool
) -> None:
    """By the gateway itself: the kernel's timeout, which only Linux has, does not end a connection that lives."""
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    gateway = await start_gateway(write_timeout=2)
    log = WrittenLog(redis)
    pieces = [Delta(id=EntryId(1, n), content=PIECE) for n in range(1, PIECES)]
    await log.write(START, *([] if is_live else pieces))
    client = SlowClient(gateway.port)
    dripping = asyncio.create_task(client.drip()) if drips else None

    async def is_open() -> bool:
        return len(gateway.gateway.services.streams) == 1

    await eventually(is_open)
    if is_live:
        await log.append(*pieces)

    async def is_destroyed() -> bool:
        return not len(gateway.gateway.services.streams) and not gateway.gateway.connections

    await eventually(is_destroyed)
    if dripping is not None:
        dripping.cancel()
        await asyncio.wait([dripping])
    client.close()


@pytest.mark.parametrize("cause", ["a long message", "no pong"])
async def test_a_message_after_the_server_has_closed_by_itself_is_one_to_a_client_that_has_left(
    gateway: Served, redis: Redis, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """The stream receives the end only in a later step of the event loop, and may write before."""
    connections, connect_as_before = list[WebSocketConnection](), WebSocketConnection.handle_connect

    def handle_connect(connection: WebSocketConnection, event: Request) -> None:
        connections.append(connection)
        connect_as_before(connection, event)

    monkeypatch.setattr(WebSocketConnection, "handle_connect", handle_connect)
    await WrittenLog(redis).write(START)
    async with connect(f"ws://127.0.0.1:{gateway.port}/requests/r/ws") as opened:
        await opened.recv()
        (connection,) = connections
        if cause == "no pong":
            connection.keepalive_timeout()
        else:
            connection.data_received(Frame(Opcode.TEXT, b"x" * 3_000_000).serialize(mask=True))
        with pytest.raises(ClientDisconnected):
            await connection.send({"type": "websocket.send", "text": "[]"})
        with pytest.raises(ConnectionClosed):
            await opened.recv()
        assert opened.close_code == (1011 if cause == "no pong" else 1009)


@pytest.mark.parametrize("path", ["/events", "/nowhere", "/v1/models", "/requests"])
async def test_a_websocket_where_there_is_none_is_closed_with_a_code(gateway: Served, path: str) -> None:
    """Browsers see nothing of the status of a refused handshake."""
    async with connect(f"ws://127.0.0.1:{gateway.port}{path}", proxy=None) as websocket:
        with pytest.raises(ConnectionClosed):
            await websocket.recv()
    assert (websocket.close_code, websocket.close_reason) == (4404, "there is nothing at this path")


@pytest.mark.parametrize(
    "head", [VERSION, KEY, KEY + VERSION.replace(b"13", b"12"), VERSION + b"Sec-WebSocket-Key: short\r\n"], ids=str
)
async def test_a_malformed_handshake_is_refused_in_the_shape_of_all_errors(gateway: Served, head: bytes) -> None:
    status, error = parts(await exchange(gateway.port, b"GET /requests/r/ws" + UPGRADE + head + b"\r\n"))
    assert (status, error["code"]) == (400, "invalid_handshake")

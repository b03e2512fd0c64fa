"""A TCP proxy before Redis or vLLM that breaks connections as ordered. It uses asyncio and nothing of the product.

Before Redis it understands commands, however the client cuts them into writes: a MULTI with all up to its EXEC counts
as one command, so that a pattern finds an XADD inside it. Before anything else each piece that was read is a command.
"""

import asyncio
import enum
import re
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_READ = 64 * 1024


class _Action(enum.Enum):
    CUT_BEFORE = enum.auto()
    DROP_REPLY = enum.auto()
    HOLD = enum.auto()
    HOLD_REPLY = enum.auto()


class Order:
    """What happens to the next commands that match.

    `met` is set when the first has arrived, `done` when the order was carried out for all.
    """

    def __init__(self, action: _Action, command: bytes, reply: bytes, times: int) -> None:
        self.action = action
        self.command = re.compile(command, re.DOTALL)
        self.reply = re.compile(reply, re.DOTALL)
        self.met = asyncio.Event()
        self.done = asyncio.Event()
        self.released = asyncio.Event()
        self._left = times

    def count_one(self) -> None:
        """Note that the order was carried out for one more command."""
        self._left -= 1
        if self._left <= 0:
            self.done.set()

    def release(self) -> None:
        """Pass a held command or reply on."""
        self.released.set()


class Proxy:
    """Passes everything on until ordered otherwise. Use it as a context manager.

    Args:
        port: where the server listens on 127.0.0.1.
        resp: whether it is a Redis.
    """

    def __init__(self, port: int, *, resp: bool = True) -> None:
        self.upstream = port
        self.resp = resp
        self.port = 0
        self.up = self.down = 0.0
        """Seconds that each piece is delayed on its way to the server, and on its way back."""
        self.accepted = 0
        """The number of connections so far."""
        self.open = asyncio.Event()
        self._orders: list[Order] = []
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.open.set()

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        await self.cut()

    @classmethod
    def before(cls, url: str) -> Self:
        """Build a proxy before the server of a URL; `redis://` means Redis."""
        parts = urlsplit(url)
        assert parts.port is not None
        return cls(parts.port, resp=parts.scheme == "redis")

    @property
    def redis_url(self) -> str:
        """The URL for clients of Redis."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def url(self) -> str:
        """The URL for clients of vLLM."""
        return f"http://127.0.0.1:{self.port}"

    def cut_before(self, command: bytes, *, times: int = 1) -> Order:
        """Cut the connection in place of passing a command on."""
        return self._order(Order(_Action.CUT_BEFORE, command, b"", times))

    def drop_reply(self, command: bytes, *, reply: bytes = b"", times: int = 1) -> Order:
        """Pass a command on, wait for the whole reply, and cut the connection in place of passing that on.

        Replies that do not match `reply` are passed on.
        """
        return self._order(Order(_Action.DROP_REPLY, command, reply, times))

    def hold(self, command: bytes) -> Order:
        """Keep a command back until it is released or the connection is cut."""
        return self._order(Order(_Action.HOLD, command, b"", 1))

    def hold_reply(self, command: bytes, *, reply: bytes = b"") -> Order:
        """Pass a command on, and keep its reply back until that is released or the connection is cut.

        Replies that do not match `reply` are passed on.
        """
        return self._order(Order(_Action.HOLD_REPLY, command, reply, 1))

    def half_open(self) -> None:
        """Pass nothing on, and keep every connection open, new ones too."""
        self.open.clear()

    def refuse(self) -> None:
        """Accept no new connection; the existing ones continue."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def cut(self) -> None:
        """Cut every existing connection."""
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def heal(self) -> None:
        """Pass everything on again, and forget every order."""
        for order in self._orders:
            order.release()
        self._orders.clear()
        self.up = self.down = 0.0
        self.open.set()
        if self._server is None:
            await self._listen()

    def order_for(self, command: bytes) -> Order | None:
        """The order for a command, if there is one."""
        self._orders = [order for order in self._orders if not order.done.is_set()]
        return next((order for order in self._orders if order.command.search(command)), None)

    def _order(self, order: Order) -> Order:
        self._orders.append(order)
        return order

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.accepted += 1
        try:
            await _Connection(self, reader, writer).run()
        except (asyncio.CancelledError, OSError):
            pass  # cut by the proxy or by either side: asyncio's streams would log a handler that ends with this error
        finally:
            writer.transport.abort()
            self._connections.discard(task)


class _Connection:
    """The connection of a client, and the connection to the server that belongs to it."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._owed = 0
        self._withheld: bytearray | None = None
        self._replied = asyncio.Condition()

    async def run(self) -> None:
        """Pass on in both directions until either ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._proxy.upstream)
        ways = {asyncio.ensure_future(self._ask(writer)), asyncio.ensure_future(self._answer(reader))}
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            self._writer.close()  # the last replies of the server still have to arrive
            await self._writer.wait_closed()
        finally:
            writer.transport.abort()
            self._writer.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pieces(self, reader: asyncio.StreamReader, *, up: bool) -> AsyncIterator[bytes]:
        while data := await reader.read(_READ):
            await asyncio.sleep(self._proxy.up if up else self._proxy.down)
            await self._proxy.open.wait()
            yield data

    async def _ask(self, server: asyncio.StreamWriter) -> None:
        splitter = _Commands(resp=self._proxy.resp)
        async for data in self._pieces(self._reader, up=True):
            for command, text, replies in splitter.feed(data):
                order = self._proxy.order_for(text)
                if order is not None:
                    order.met.set()
                    if order.action is _Action.CUT_BEFORE:
                        order.count_one()
                        self._writer.transport.abort()
                        return
                    if order.action is _Action.HOLD:
                        order.count_one()
                        await order.released.wait()
                    else:
                        await self._all_replied()
                        self._withheld = bytearray()
                self._owed += replies
                server.write(command)
                await server.drain()
                if self._withheld is not None and order is not None and await self._drops(order):
                    return

    async def _drops(self, order: Order) -> bool:
        """Wait for the reply, and pass it on at once or when it is released. Returns whether it was dropped."""
        await self._all_replied()
        kept = bytes(self._withheld or b"")
        if not order.done.is_set() and order.reply.search(kept):
            order.count_one()
            if order.action is _Action.DROP_REPLY:
                self._writer.transport.abort()
                return True
            await order.released.wait()
        self._withheld = None
        self._writer.write(kept)
        return False

    async def _answer(self, server: asyncio.StreamReader) -> None:
        buffer = bytearray()
        async for data in self._pieces(server, up=False):
            if self._withheld is None:
                self._writer.write(data)
                await self._writer.drain()
            else:
                self._withheld += data
            buffer += data
            self._owed = max(0, self._owed - self._count(buffer))
            async with self._replied:
                self._replied.notify_all()

    def _count(self, buffer: bytearray) -> int:
        """Remove and return the whole replies in what has arrived."""
        if not self._proxy.resp:
            buffer.clear()
            return 1
        count, start = 0, 0
        while (end := end_of(buffer, start)) is not None:
            count, start = count + 1, end
        del buffer[:start]
        return count

    async def _all_replied(self) -> None:
        async with self._replied:
            await self._replied.wait_for(lambda: not self._owed)


class _Commands:
    """Assembles what a client sends into whole commands. A transaction counts as one."""

    def __init__(self, *, resp: bool) -> None:
        self._resp = resp
        self._buffer = bytearray()
        self._transaction: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes, int]]:
        """Each whole command, its words in one line (a transaction: one line each), and how many replies it gets."""
        if not self._resp:
            yield data, data, 1
            return
        self._buffer += data
        while (end := end_of(self._buffer)) is not None:
            command = bytes(self._buffer[:end])
            del self._buffer[:end]
            verb = _words(command).partition(b" ")[0].upper()
            self._transaction.append(command)
            if verb not in {b"EXEC", b"DISCARD"} and (verb == b"MULTI" or len(self._transaction) > 1):
                continue
            whole, self._transaction = self._transaction, []
            yield b"".join(whole), b"\n".join(map(_words, whole)), len(whole)


def end_of(data: bytes | bytearray, start: int = 0) -> int | None:
    """The end of the RESP value that begins at `start`; None while it is incomplete."""
    line = data.find(b"\r\n", start)
    if line < 0:
        return None
    kind, end = data[start : start + 1], line + 2
    if kind == b"$":
        size = int(data[start + 1 : line])
        end += size + 2 if size >= 0 else 0
        return end if end <= len(data) else None
    if kind == b"*":
        for _ in range(int(data[start + 1 : line])):
            inner = end_of(data, end)
            if inner is None:
                return None
            end = inner
    return end


def _words(command: bytes) -> bytes:
    return b" ".join(command.split(b"\r\n")[2::2]) if command.startswith(b"*") else command.strip()

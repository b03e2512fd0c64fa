"""The load generator, a separate process: a vLLM that writes tokens at a given rate, each at its own time.

    load.py <board>

It prints its port. On standard input it reads the commands `pace <tokens/s> <tokens in a write>` and `end`, which ends
all streams. The process ends with its input. Tokens go to the streams in turn, each at its own time of a fixed
schedule. Bytes that the kernel does not accept wait, as they would in vLLM. A request that names the number of its
tokens gets all of them in one write.
"""

import ctypes
import gc
import os
import re
import select
import socket
import sys
import time
from pathlib import Path

from board import Board, Count
from chunks import MODELS, Stream, whole_answer

_LATE = 5_000_000
_TICK = 1_000_000
"""Nanoseconds between two polls of the sockets."""
_SHORTEST_SLEEP = 50_000
"""Nanoseconds. On a shared core, Redis and the reader run meanwhile. Tokens that are closer together are written one
right after the other."""
_MOST_UNSENT = 1 << 16
_PR_SET_TIMERSLACK = 29

_NUMBER = re.compile(rb"stream (\d+)(?: of (\d+) tokens)?")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Connection:
    """One connection of a client: the bytes that it sent, and those that it has not accepted yet."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.received = b""
        self.unsent = b""
        self.stream: Stream | None = None
        self.number = 0
        self.tokens = 0


class Load:
    """The whole process."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._counters = board.counters
        self._poll = select.epoll()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.setblocking(False)
        self._connections: dict[int, Connection] = {}
        self._streams: list[Connection] = []
        self._turn = 0
        self._begin(0.0, 1)
        self._poll.register(self._listener, select.EPOLLIN)
        self._poll.register(0, select.EPOLLIN)

    @property
    def port(self) -> int:
        """The port on which the process listens."""
        return int(self._listener.getsockname()[1])

    def _begin(self, rate: float, together: int) -> None:
        """Write so many tokens a second from now on, so many of a stream in one write."""
        self._gap = together * 1e9 / rate if rate else float("inf")
        self._together = together
        self._started = time.monotonic_ns()
        self._writes = 0

    def run(self) -> None:
        """Serve until standard input ends."""
        look = time.monotonic_ns()
        while True:
            due = self._started + self._writes * self._gap if self._streams else float("inf")
            now = time.monotonic_ns()
            if now >= look:
                if not self._serve(0 if due < now + _TICK else 0.001 if due < now + 4 * _TICK else 0.003):
                    return
                look = time.monotonic_ns() + (_TICK if self._streams else 0)
            elif due > now:
                time.sleep(max(min(due, look) - now, _SHORTEST_SLEEP) / 1e9)
            else:
                self._write(now)

    def _write(self, now: int) -> None:
        """Write the tokens that are due. Where there are too many, stop after a tick to poll the sockets."""
        streams, gap, started, together = self._streams, self._gap, self._started, self._together
        until = now + _TICK
        while streams and (due := started + self._writes * gap) <= now < until:
            self._writes += 1
            self._turn += 1
            if self._turn >= len(streams):
                self._turn = 0
            self._send(streams[self._turn], together, now)
            if now - due > _LATE:
                self._counters[Count.LATE] += together
            now = time.monotonic_ns()

    def _send(self, to: Connection, together: int, now: int) -> None:
        stream, board = to.stream, self._board
        assert stream is not None
        if len(to.unsent) > _MOST_UNSENT:
            self._counters[Count.WITHHELD] += together
            return
        first, place = to.tokens, to.number * board.ring
        for number in range(first, first + together):
            board.times[place + number % board.ring] = now
        to.tokens = first + together
        if together == 1:
            self._put(to, stream.token(first))
        else:
            self._put(to, b"".join(map(stream.token, range(first, to.tokens))))
        self._counters[Count.WRITTEN] += together

    def _put(self, to: Connection, data: bytes) -> None:
        if to.unsent:
            to.unsent += data
            return
        try:
            sent = to.peer.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:  # reading from the socket shows it too
            return
        if sent < len(data):
            to.unsent = data[sent:]
            self._poll.modify(to.peer, select.EPOLLIN | select.EPOLLOUT)

    def _serve(self, timeout: float) -> bool:
        """Poll the sockets. Returns false when standard input has ended."""
        for descriptor, events in self._poll.poll(timeout):
            if descriptor == 0:
                if not self._read_commands():
                    return False
            elif descriptor == self._listener.fileno():
                self._accept()
            else:
                self._advance(self._connections[descriptor], events)
        return True

    def _read_commands(self) -> bool:
        lines = os.read(0, 65536)
        for line in lines.decode().splitlines():
            match line.split():
                case ["pace", rate, together]:
                    self._begin(float(rate), int(together))
                case ["end"]:
                    for connection in self._streams:
                        assert connection.stream is not None
                        self._put(connection, connection.stream.ending)
                        connection.stream = None
                    self._streams.clear()
                    self._counters[Count.OPEN] = 0
        return bool(lines)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except BlockingIOError:
                return
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[peer.fileno()] = Connection(peer)
            self._poll.register(peer, select.EPOLLIN)

    def _advance(self, connection: Connection, events: int) -> None:
        if events & select.EPOLLOUT:
            rest, connection.unsent = connection.unsent, b""
            self._poll.modify(connection.peer, select.EPOLLIN)
            self._put(connection, rest)
        if events & ~select.EPOLLOUT:
            try:
                data = connection.peer.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(connection)
                return
            connection.received += data
            self._answer(connection)

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.peer.fileno()]
        self._poll.unregister(connection.peer)
        connection.peer.close()
        if connection.stream is not None:
            self._streams.remove(connection)
            self._counters[Count.OPEN] = len(self._streams)

    def _answer(self, connection: Connection) -> None:
        """Answer a request once all of it has arrived."""
        head, end, body = connection.received.partition(b"\r\n\r\n")
        length = int(found[1]) if (found := _LENGTH.search(head)) else 0
        if not end or len(body) < length:
            return
        connection.received = body[length:]
        number = _NUMBER.search(body)
        if head.startswith(b"POST /v1/chat/completions ") and number and number[2]:
            self._put(connection, whole_answer(int(number[1]), int(number[2])))
        elif head.startswith(b"POST /v1/chat/completions ") and number:
            connection.number = int(number[1])
            connection.tokens = 0
            connection.stream = Stream(connection.number)
            self._put(connection, connection.stream.opening)
            self._streams.append(connection)
            self._counters[Count.OPENED] += 1
            self._counters[Count.OPEN] = len(self._streams)
        elif head.startswith(b"GET /health "):
            self._put(connection, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        elif head.startswith(b"GET /v1/models "):
            self._put(connection, _json(MODELS))
        elif head.startswith(b"GET /version "):
            self._put(connection, _json(b'{"version":"0.32.0"}'))
        else:
            self._put(connection, b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")


def _json(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def main() -> None:
    """Serve until standard input ends."""
    # Linux wakes a sleeper 50 microseconds late by default: too coarse a clock for 20,000 tokens a second.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    load = Load(Board.attach(Path(sys.argv[1])))
    print(load.port, flush=True)  # noqa: T201 - the process that started this one reads the port
    gc.disable()
    load.run()


if __name__ == "__main__":
    main()

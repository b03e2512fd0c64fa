"""The reader, a separate process: it follows some of the logs with blocking XREADs, and records each delta's latency.

    reader.py <board> <port of Redis> <logs of one XREAD> <first stream> <end> <step>

The latency of a delta is from the load generator's write to the moment at which its XREAD has come back. It ends with
its standard input.
"""

import gc
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any, TypeAlias, cast

import hiredis
from board import Board, Count
from chunks import WORDS

_Entry: TypeAlias = tuple[bytes, list[bytes]]
_WORDS = [word.encode() for word in WORDS]


def key_of(stream: int) -> str:
    """The log of a stream of the load generator."""
    return f"chat:tokens:{{r{stream}}}"


class Connection:
    """Follows a few logs."""

    def __init__(self, board: Board, port: int, streams: range) -> None:
        self.peer = socket.create_connection(("127.0.0.1", port))
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._board = board
        self._replies = hiredis.Reader()
        self._streams = {key_of(stream).encode(): stream for stream in streams}
        self._last = dict.fromkeys(self._streams, b"0")
        self._seen = dict.fromkeys(self._streams, 0)
        self.send_xread()

    def send_xread(self) -> None:
        """Wait for entries after the last ones."""
        # The types of hiredis 3.5 allow a tuple of one element only.
        command: Any = (b"XREAD", b"COUNT", b"1000", b"BLOCK", b"0", b"STREAMS", *self._last, *self._last.values())
        self.peer.sendall(hiredis.pack_command(command))

    def read(self) -> None:
        """Handle the entries that have arrived."""
        self._replies.feed(self.peer.recv(1 << 20))
        now = time.monotonic_ns()
        while (reply := self._replies.gets()) is not False:
            if isinstance(reply, hiredis.HiredisError):
                raise reply
            for key, entries in cast("list[tuple[bytes, list[_Entry]]]", reply):
                for entry_id, fields in entries:
                    self._last[key] = entry_id
                    self._take(key, fields, now)
            self.send_xread()

    def _take(self, key: bytes, fields: list[bytes], now: int) -> None:
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        if values[b"type"] != b"delta" or b"content" not in values:
            return
        board, number = self._board, self._seen[key]
        self._seen[key] = number + 1
        if values[b"content"] != _WORDS[number % len(_WORDS)]:
            board.counters[Count.STRAY] += 1
        written = board.times[self._streams[key] * board.ring + number % board.ring]
        board.add(now, now - written)


def main() -> None:
    """Read until standard input ends."""
    board = Board.attach(Path(sys.argv[1]))
    port, together, first, end, step = map(int, sys.argv[2:])
    streams = range(first, end, step)
    poll = select.epoll()
    poll.register(0, select.EPOLLHUP)
    connections = {}
    for place in range(0, len(streams), together):
        connection = Connection(board, port, streams[place : place + together])
        connections[connection.peer.fileno()] = connection
        poll.register(connection.peer, select.EPOLLIN)
    gc.disable()
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == 0:
                return
            connections[descriptor].read()


if __name__ == "__main__":
    main()

"""The followers of the part `edge`, a separate process: many raw sockets that follow by server-sent events.

    edge_reader.py <port of the server> <followers> <logs>

It prints a line when every follower has its head. Then each line that it reads is answered with the counts so far as
JSON: the `time`, the `events`, and the latencies of a sample of the events since the line before, in nanoseconds. It
ends with its standard input.
"""

import gc
import json
import os
import re
import select
import socket
import sys
import time

from measure import many_files

_STAMP = re.compile(rb'"content":"(\d{20})"')
_EVERY = 7
"""Of so many reads one is sampled."""
_PATIENCE = 120.0


class SocketFollowers:
    """The whole process."""

    def __init__(self, port: int, followers: int, logs: int) -> None:
        self._poll = select.epoll()
        self._peers: dict[int, socket.socket] = {}
        self._port, self._followers, self._logs = port, followers, logs
        self._events = self._reads = 0
        self._latencies: list[int] = []

    def connect(self) -> None:
        """Open every connection, and read up to its head."""
        for number in range(self._followers):
            peer = socket.create_connection(("127.0.0.1", self._port), _PATIENCE)
            head = f"GET /requests/r{number % self._logs}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            peer.sendall(head.encode())
            self._peers[peer.fileno()] = peer
        for peer in self._peers.values():
            data = peer.recv(1 << 16)
            if b" 200 " not in data[:20]:
                raise SystemExit(f"the server answered {data[:200]!r}")
            self._events += data.count(b"\ndata: ")
            peer.setblocking(False)
            self._poll.register(peer, select.EPOLLIN)

    def run(self) -> None:
        """Read until standard input ends."""
        self._poll.register(0, select.EPOLLIN)
        while True:
            for number, _ in self._poll.poll():
                if number == 0:
                    if not os.read(0, 4096):
                        return
                    self._tell()
                else:
                    self._read(self._peers[number])

    def _read(self, peer: socket.socket) -> None:
        data = peer.recv(1 << 16)
        now = time.monotonic_ns()
        if not data:
            raise SystemExit("the server ended a stream")
        self._events += data.count(b"\ndata: ")
        self._reads += 1
        if self._reads % _EVERY == 0 and (stamp := _STAMP.search(data)):
            self._latencies.append(now - int(stamp[1]))

    def _tell(self) -> None:
        counts = {"time": time.monotonic_ns(), "events": self._events, "latencies": self._latencies}
        print(json.dumps(counts), flush=True)  # noqa: T201 - the answer
        self._latencies = []


def main() -> None:
    """Follow until standard input ends."""
    many_files()
    port, followers, logs = map(int, sys.argv[1:])
    reader = SocketFollowers(port, followers, logs)
    reader.connect()
    print("connected", flush=True)  # noqa: T201 - the process that started this one waits for it
    gc.disable()
    reader.run()


if __name__ == "__main__":
    main()

"""The client of the part `short`, a separate process: jobs at a steady pace, and a blocking XREAD of each one's log.

    short_client.py <port of Redis> <milliseconds of the ids of jobs>

It reads lines `<first job> <jobs> <jobs/s> <tokens>`, and answers each with a line of JSON: the time from each job's
XADD to its first delta, in nanoseconds. It ends with its standard input.
"""

import gc
import json
import select
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import hiredis
from chunks import MODEL
from reader import key_of

_Entry: TypeAlias = tuple[bytes, list[bytes]]
_PATIENCE = 60.0


def packed_job(milliseconds: int, number: int, tokens: int) -> bytes:
    """The XADD of a job whose answer has so many tokens.

    The number is in the id of the job's entry, so the last id that a group has delivered shows how many it has read.
    """
    messages = [{"role": "user", "content": f"stream {number} of {tokens} tokens"}]
    request = json.dumps({"model": MODEL, "messages": messages})
    fields = ("v", "1", "id", f"r{number}", "request", request)
    return pack("XADD", "chat:jobs", f"{milliseconds}-{number}", *fields)


def pack(*words: str) -> bytes:
    """A command, as it is sent to Redis."""
    # The types of hiredis 3.5 allow a tuple of one element only.
    command: Any = words
    packed: bytes = hiredis.pack_command(command)
    return packed


class Connection:
    """A connection to Redis."""

    def __init__(self, port: int) -> None:
        self.peer = socket.create_connection(("127.0.0.1", port))
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = hiredis.Reader()
        self.number = 0
        """The job whose log is read here."""
        self.sent = 0

    def send_xread(self, last: str) -> None:
        """Wait for entries of the log after the last ones."""
        self.peer.sendall(pack("XREAD", "BLOCK", "0", "STREAMS", key_of(self.number), last))

    def replies(self) -> Iterator[object]:
        """What has arrived."""
        self._replies.feed(self.peer.recv(1 << 20))
        while (reply := self._replies.gets()) is not False:
            if isinstance(reply, hiredis.HiredisError):
                raise reply
            yield reply


class Client:
    """The whole process."""

    def __init__(self, port: int, milliseconds: int) -> None:
        self._port = port
        self._milliseconds = milliseconds
        self._enqueuing = Connection(port)
        self._idle: list[Connection] = []
        self._reading: dict[int, Connection] = {}
        self._latencies: list[int] = []

    def run(self, first: int, jobs: int, rate: float, tokens: int) -> list[int]:
        """Enqueue so many jobs, each at its own time of a fixed schedule, and wait for the first delta of each."""
        self._latencies = []
        began, number = time.monotonic(), first
        while len(self._latencies) < jobs:
            now = time.monotonic()
            due = began + (number - first) / rate if number < first + jobs else began + jobs / rate + _PATIENCE
            if due <= now and number == first + jobs:
                raise SystemExit(f"{len(self._latencies)} of {jobs} jobs have a delta")
            if due <= now:
                self._enqueue(number, tokens)
                number += 1
            else:
                self._wait(due - now)
        return self._latencies

    def _enqueue(self, number: int, tokens: int) -> None:
        reading = self._idle.pop() if self._idle else Connection(self._port)
        reading.number = number
        self._reading[reading.peer.fileno()] = reading
        reading.send_xread("0")
        job = packed_job(self._milliseconds, number, tokens)
        reading.sent = time.monotonic_ns()
        self._enqueuing.peer.sendall(job)

    def _wait(self, seconds: float) -> None:
        peers = [self._enqueuing.peer.fileno(), *self._reading]
        for descriptor in select.select(peers, [], [], seconds)[0]:
            if reading := self._reading.get(descriptor):
                self._read(reading)
            else:
                list(self._enqueuing.replies())

    def _read(self, reading: Connection) -> None:
        for reply in reading.replies():
            now = time.monotonic_ns()
            ((_, entries),) = cast("list[tuple[bytes, list[_Entry]]]", reply)
            if any(b"delta" in fields and b"content" in fields for _, fields in entries):
                self._latencies.append(now - reading.sent)
                self._idle.append(self._reading.pop(reading.peer.fileno()))
            else:
                reading.send_xread(entries[-1][0].decode())


def main() -> None:
    """Serve until standard input ends."""
    client = Client(*map(int, sys.argv[1:]))
    gc.disable()
    for line in sys.stdin:
        first, jobs, rate, tokens = map(int, line.split())
        print(json.dumps(client.run(first, jobs, rate, tokens)), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()

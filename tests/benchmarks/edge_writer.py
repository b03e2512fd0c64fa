"""The writer of the part `edge`, a separate process: many logs at a steady rate, each delta with the time of its write.

    edge_writer.py <port of Redis> <logs>

It writes the due entries in one MULTI and publishes them as soon as Redis has accepted them. It prints a line when
every log has begun, and then reads commands: `pace <deltas/s of all logs>`, and `long <id> <deltas>`, which writes a
log that has ended. It answers each with a line, and ends with its standard input.
"""

import gc
import os
import select
import socket
import sys
import time
from typing import Any

import hiredis
from chunks import WORDS
from reader import key_of

from worker.contract.entries import to_json
from worker.contract.ids import SEAL
from worker.contract.keys import Keys

_TICK = 700_000
"""Nanoseconds; the beat of a busy worker (`worker/broker/publisher.py`)."""
_BEGUN = (b"type", b"started", b"v", b"1", b"queue", b"default", b"job", b"0-1", b"worker", b"w", b"owner", b"o")
_AT_ONCE = 1000


class StampingWriter:
    """The whole process."""

    def __init__(self, port: int, logs: int) -> None:
        self._redis = socket.create_connection(("127.0.0.1", port))
        self._redis.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = hiredis.Reader()
        self._logs = logs
        self._keys = [key_of(number).encode() for number in range(logs)]
        self._channels = [Keys().feed(f"r{number}").encode() for number in range(logs)]
        self._rate = 0.0
        self._began = self._written = self._due_before = 0

    def begin(self) -> None:
        """Write the first entry of every log."""
        self._exchange([(b"XADD", key, b"1-0", *_BEGUN, b"time", b"1") for key in self._keys])

    def run(self) -> None:
        """Write until standard input ends."""
        poll = select.poll()
        poll.register(0, select.POLLIN)
        look = time.monotonic_ns()
        while True:
            now = time.monotonic_ns()
            if now < look:
                time.sleep((look - now) / 1e9)
                continue
            look = max(look + _TICK, now)
            if poll.poll(0 if self._rate else None) and not self._read_commands():
                return
            self._write(int((now - self._began) * self._rate / 1e9) + self._due_before)

    def _read_commands(self) -> bool:
        lines = os.read(0, 4096).decode().splitlines()
        for line in lines:
            match line.split():
                case ["pace", rate]:
                    self._rate = float(rate)
                    self._began, self._due_before = time.monotonic_ns(), self._written
                case ["long", request_id, deltas]:
                    self._write_whole(request_id, int(deltas))
            print("did", flush=True)  # noqa: T201 - the process that started this one waits for it
        return bool(lines)

    def _write(self, upto: int) -> None:
        if upto <= self._written:
            return
        now = time.monotonic_ns()
        adds: list[tuple[bytes, ...]] = []
        messages: list[tuple[bytes, ...]] = []
        for delta in range(self._written, upto):
            number, log = divmod(delta, self._logs)
            stamp = f"{now:020d}"
            adds.append((b"XADD", self._keys[log], b"NOMKSTREAM", b"1-%d" % (number + 1), *_delta(stamp)))
            entry = to_json([[f"1-{number + 1}", {"type": "delta", "content": stamp}]])
            messages.append((b"PUBLISH", self._channels[log], entry.encode()))
        self._exchange([(b"MULTI",), *adds, (b"EXEC",)])
        self._exchange(messages)
        self._written = upto

    def _write_whole(self, request_id: str, deltas: int) -> None:
        key = key_of(0).replace("{r0}", f"{{{request_id}}}").encode()
        entries: list[tuple[bytes, ...]] = [(b"XADD", key, b"1-0", *_BEGUN, b"time", b"1")]
        texts = (WORDS[number % len(WORDS)] for number in range(deltas))
        entries += [(b"XADD", key, b"1-%d" % number, *_delta(text)) for number, text in enumerate(texts, 1)]
        entries.append((b"XADD", key, str(SEAL).encode(), b"type", b"done", b"attempt", b"1"))
        for first in range(0, len(entries), _AT_ONCE):
            self._exchange(entries[first : first + _AT_ONCE])

    def _exchange(self, commands: list[tuple[bytes, ...]]) -> None:
        # The types of hiredis 3.5 allow a tuple of one element only.
        packed: list[Any] = list(commands)
        self._redis.sendall(b"".join(map(hiredis.pack_command, packed)))
        waiting = len(commands)
        while waiting:
            self._replies.feed(self._redis.recv(1 << 20))
            while (reply := self._replies.gets()) is not False:
                if isinstance(reply, hiredis.HiredisError):
                    raise reply
                waiting -= 1


def _delta(content: str) -> tuple[bytes, ...]:
    return (b"type", b"delta", b"content", content.encode())


def main() -> None:
    """Write until standard input ends."""
    port, logs = map(int, sys.argv[1:])
    writer = StampingWriter(port, logs)
    writer.begin()
    print("begun", flush=True)  # noqa: T201 - the process that started this one waits for it
    gc.disable()
    writer.run()


if __name__ == "__main__":
    main()

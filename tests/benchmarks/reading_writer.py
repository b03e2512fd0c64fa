"""The writer of the reading side, a separate process: many logs at a steady rate, with or without the feed.

    reading_writer.py <board> <port of Redis> <logs> <feed: 0 or 1>

As the worker does, it writes the due entries in one MULTI, and publishes them in the next, once Redis has accepted
them. It prints a line when every log has begun. Then it reads `pace <deltas/s>` from standard input, and ends with it.
"""

import gc
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

import hiredis
from board import Board, Count
from chunks import TOKEN_IDS, WORDS
from reader import key_of

from worker.contract.entries import to_json
from worker.contract.keys import Keys

_TICK = 700_000
"""Nanoseconds; the beat of a busy worker (`worker/broker/publisher.py`)."""
_WORDS = [(word.encode(), f"[{token}]".encode()) for word, token in zip(WORDS, TOKEN_IDS, strict=True)]


class Writer:
    """The whole process."""

    def __init__(self, board: Board, port: int, logs: int, *, feed: bool) -> None:
        self._board = board
        self._logs = logs
        self._feed = feed
        self._redis = socket.create_connection(("127.0.0.1", port))
        self._redis.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = hiredis.Reader()
        self._keys = [key_of(number).encode() for number in range(logs)]
        self._channels = [Keys().feed(f"r{number}").encode() for number in range(logs)]
        self._unpublished: list[tuple[bytes, ...]] = []
        self._rate = 0.0
        self._began = 0
        self._written = self._due_before = 0

    def begin(self) -> None:
        """Write the first entry of every log."""
        begun = (b"type", b"started", b"v", b"1", b"queue", b"default", b"job", b"0-1", b"worker", b"w", b"owner", b"o")
        self._exchange([(b"XADD", key, b"1-0", *begun, b"time", b"1") for key in self._keys])

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
            if poll.poll(0) and not self._read_commands():
                return
            self._write(int((now - self._began) * self._rate / 1e9) + self._due_before)

    def _read_commands(self) -> bool:
        lines = os.read(0, 4096).decode().splitlines()
        for line in lines:
            self._rate = float(line.removeprefix("pace "))
            self._began, self._due_before = time.monotonic_ns(), self._written
        return bool(lines)

    def _write(self, upto: int) -> None:
        """Write the entries that are due, and publish those of the write before."""
        if upto <= self._written and not self._unpublished:
            return
        commands: list[tuple[bytes, ...]] = [(b"MULTI",)]
        messages, self._unpublished = self._unpublished, []
        now = time.monotonic_ns()
        for delta in range(self._written, upto):
            number, log = divmod(delta, self._logs)
            text, ids = _WORDS[number % len(_WORDS)]
            entry_id = b"1-%d" % (number + 1)
            self._board.times[log * self._board.ring + number % self._board.ring] = now
            fields = (b"type", b"delta", b"content", text, b"token_ids", ids)
            commands.append((b"XADD", self._keys[log], b"NOMKSTREAM", entry_id, *fields))
            if self._feed:
                entry = f'[["{entry_id.decode()}",{_JSON[number % len(_WORDS)]}]]'
                self._unpublished.append((b"PUBLISH", self._channels[log], entry.encode()))
        self._exchange([*commands, *messages, (b"EXEC",)])
        self._board.counters[Count.WRITTEN] = self._written = max(upto, self._written)

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


_JSON = [to_json({"type": "delta", "content": text.decode(), "token_ids": ids.decode()}) for text, ids in _WORDS]


def main() -> None:
    """Write until standard input ends."""
    board, port, logs, feed = sys.argv[1:]
    writer = Writer(Board.attach(Path(board)), int(port), int(logs), feed=feed == "1")
    writer.begin()
    print("begun", flush=True)  # noqa: T201 - the process that started this one waits for it
    gc.disable()
    writer.run()


if __name__ == "__main__":
    main()

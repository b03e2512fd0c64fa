"""Readers of many streams while one of three workers is drained: what each reads, and its longest wait for text.

.venv/bin/python tests/operation/drained_streams.py --streams 60
.venv/bin/python tests/operation/drained_streams.py --streams 60 --by SIGTERM
"""
# ruff: noqa: E402 - where the project is not installed, the imports below need the changed sys.path

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import click
from command import run
from installation import Installation, start_installation
from waits import eventually

from worker import Claimed, Client, Delta, Resumed
from worker.contract.entries import Object
from worker.sandbox.simulator.requests import answer_to

TOKENS, RATE = 240, 20
"""Twelve seconds of text, so that the drain meets all streams in the middle."""


@dataclass(slots=True)
class Reader:
    """One stream, as its reader sees it. `wait` is the longest time between two pieces of text in seconds."""

    request: Object
    text: str = ""
    wait: float = 0.0
    began: asyncio.Event = field(default_factory=asyncio.Event)
    was_resumed: bool = False
    was_claimed: bool = False
    outcome: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the text is that of an answer without an interruption."""
        return self.outcome == "done" and self.text == answer_to(self.request["messages"], tokens=TOKENS)

    async def read(self, client: Client) -> None:
        """Add the request, and read its answer to the end."""
        last = 0.0
        async for entry in client.follow(await client.enqueue(self.request)):
            if isinstance(entry, Delta):
                now = time.monotonic()
                self.wait, last = max(self.wait, now - last if last else 0.0), now
                self.text += entry.text
                self.began.set()
            self.was_claimed |= isinstance(entry, Claimed)
            self.was_resumed |= isinstance(entry, Resumed)
            if entry.type in ("done", "error", "cancelled"):
                self.outcome = entry.type


@dataclass(frozen=True, slots=True)
class Result:
    """What came of the drain. `states` are the lines of the command, `status` is that of the drained process."""

    readers: Sequence[Reader]
    states: Sequence[dict[str, Any]]
    status: int

    @property
    def longest_wait(self) -> float:
        return max(reader.wait for reader in self.readers)


async def drain_under_streams(streams: int, *, by_signal: bool = False, redis_server: Path | None = None) -> Result:
    """Drain one of three workers while all streams are in the middle of their answers."""
    async with start_installation(redis_server, streams=0, workers=0) as it:
        workers = [it.start_worker(WORKER_SLOTS=str(streams)) for _ in range(3)]
        await eventually(lambda: _are_ready(it, len(workers)))
        readers = [Reader(_request(number)) for number in range(streams)]
        reading = [asyncio.create_task(reader.read(it.client)) for reader in readers]
        await asyncio.gather(*[reader.began.wait() for reader in readers])
        leaving = workers[0]
        states: list[dict[str, Any]] = []
        if by_signal:
            leaving.terminate()
        else:
            name = await _name_of(it, leaving.pid)
            ended = await run("drain", name, "--wait", "--json", "--why", "measured", REDIS_URL=it.url)
            assert ended.status == 0, ended.err
            states = [json.loads(line) for line in ended.lines]
        status = await asyncio.to_thread(leaving.wait, 60)
        await asyncio.gather(*reading)
    return Result(readers, states, status)


def _request(number: int) -> Object:
    messages: list[Object] = [{"role": "user", "content": f"Tell me about the number {number}."}]
    return cast("Object", {"messages": messages, "simulate": {"tokens": TOKENS, "rate": RATE}})


async def _records(it: Installation) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in (await it.redis.hgetall("chat:workers")).values()]


async def _are_ready(it: Installation, count: int) -> bool:
    records = await _records(it)
    return len(records) == count and not any(record["starting"] for record in records)


async def _name_of(it: Installation, pid: int) -> str:
    return next(str(record["name"]) for record in await _records(it) if record["pid"] == pid)


@click.command()
@click.option("--streams", default=60, show_default=True)
@click.option("--by", type=click.Choice(["command", "SIGTERM"]), default="command", show_default=True)
def main(streams: int, by: str) -> None:
    """Measure the longest wait of a reader."""
    result = asyncio.run(drain_under_streams(streams, by_signal=by == "SIGTERM"))
    whole = sum(reader.is_whole for reader in result.readers)
    moved = sum(reader.was_resumed for reader in result.readers)
    click.echo(
        f"by {by}: whole texts {whole} of {len(result.readers)}, resumed by another worker {moved}; "
        f"longest wait of a reader {result.longest_wait:.2f} s; of one that stayed "
        f"{max((reader.wait for reader in result.readers if not reader.was_claimed), default=0):.2f} s"
    )


if __name__ == "__main__":
    main()

"""Readers of many streams while one of three workers is drained, or each is replaced: texts, and the longest wait.

.venv/bin/python tests/operation/drained_streams.py --streams 60
.venv/bin/python tests/operation/drained_streams.py --streams 60 --by SIGTERM
.venv/bin/python tests/operation/drained_streams.py --streams 60 --rolling
"""
# ruff: noqa: E402 - where the project is not installed, the imports below need the changed sys.path

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
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

_WORKERS = 3
TOKENS, RATE = 240, 20
"""Twelve seconds of text."""
_HALT_AFTER = TOKENS // 2 - 1
"""Tokens after which a server halts until the worker has left: no answer ends before, on whatever machine, not even one
that has continued at another worker."""
_EXIT_TIMEOUT = 300.0


@dataclass(slots=True)
class Reader:
    """One stream, as its reader sees it. `wait` is the longest time between two pieces of text in seconds."""

    request: Object
    text: str = ""
    wait: float = 0.0
    began: asyncio.Event = field(default_factory=asyncio.Event)
    was_resumed: bool = False
    was_claimed: bool = False
    """Whether another worker took the answer over after its first text."""
    was_claimed_unfinished: bool = False
    """Whether the answer had no finish_reason then. One that has it is sealed, and there is nothing to resume."""
    outcome: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the text is that of an answer without an interruption."""
        return self.outcome == "done" and self.text == answer_to(self.request["messages"], tokens=TOKENS)

    async def read(self, client: Client) -> None:
        """Add the request, and read its answer to the end."""
        last, is_finished = 0.0, False
        async for entry in client.follow(await client.enqueue(self.request)):
            if isinstance(entry, Delta):
                now = time.monotonic()
                self.wait, last = max(self.wait, now - last if last else 0.0), now
                self.text += entry.text
                self.began.set()
                is_finished |= bool(entry.finish_reason)
            if isinstance(entry, Claimed) and self.began.is_set():
                self.was_claimed = True
                self.was_claimed_unfinished |= not is_finished
            self.was_resumed |= isinstance(entry, Resumed)
            if entry.type in ("done", "error", "cancelled"):
                self.outcome = entry.type


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it. `states` are the lines of the command, `statuses` those of the processes that ended."""

    readers: Sequence[Reader]
    states: Sequence[dict[str, Any]]
    statuses: Sequence[int]

    @property
    def longest_wait(self) -> float:
        return max(reader.wait for reader in self.readers)


async def drain_under_streams(streams: int, *, by_signal: bool = False, redis_server: Path | None = None) -> Result:
    """Drain one of three workers while all streams are in the middle of their answers."""
    async with _streams_at_three_workers(streams, redis_server) as (it, readers, reading):
        for server in it.vllm:
            server.clock.allow(_HALT_AFTER)
        await asyncio.gather(*[reader.began.wait() for reader in readers])
        leaving = it.workers[0]
        states: list[dict[str, Any]] = []
        if by_signal:
            leaving.terminate()
        else:
            name = (await _records(it))[leaving.pid]["name"]
            ended = await run("drain", name, "--wait", "--json", "--why", "measured", REDIS_URL=it.url)
            assert ended.status == 0, ended.err
            states = [json.loads(line) for line in ended.lines]
        status = await asyncio.to_thread(leaving.wait, _EXIT_TIMEOUT)
        for server in it.vllm:
            server.clock.release()
        await asyncio.gather(*reading)
    return Result(readers, states, [status])


async def replace_under_streams(streams: int, redis_server: Path | None = None) -> Result:
    """Replace each of three workers in turn, as a deploy does: a new one takes jobs before an old one gets SIGTERM.

    A reader whose answer ends begins another one, until the last old worker has ended.
    """
    async with _streams_at_three_workers(streams, redis_server) as (it, readers, reading):
        statuses = list[int]()

        async def read_on(first: "asyncio.Task[None]") -> None:
            await first
            while len(statuses) < _WORKERS:
                readers.append(reader := Reader(_request(len(readers))))
                await reader.read(it.client)

        reading_on = [asyncio.create_task(read_on(task)) for task in reading]
        for leaving in it.workers[:]:
            new = _start_worker(it, streams)
            await eventually(partial(_takes_jobs, it, new.pid))
            await eventually(partial(_runs_jobs, it, leaving.pid))
            leaving.terminate()
            statuses.append(await asyncio.to_thread(leaving.wait, _EXIT_TIMEOUT))
        await asyncio.gather(*reading_on)
    return Result(readers, [], statuses)


@asynccontextmanager
async def _streams_at_three_workers(
    streams: int, redis_server: Path | None
) -> AsyncIterator[tuple[Installation, list[Reader], "list[asyncio.Task[None]]"]]:
    """Three workers, each with a slot for every stream, and the tasks of the readers."""
    async with start_installation(redis_server, streams=0, workers=0) as it:
        for worker in [_start_worker(it, streams) for _ in range(_WORKERS)]:
            await eventually(partial(_takes_jobs, it, worker.pid))
        readers = [Reader(_request(number)) for number in range(streams)]
        yield it, readers, [asyncio.create_task(reader.read(it.client)) for reader in readers]


def _start_worker(it: Installation, streams: int) -> "subprocess.Popen[bytes]":
    # A server that halts is not given up before the worker leaves.
    return it.start_worker(WORKER_SLOTS=str(streams), WORKER_GAP_TIMEOUT=str(_EXIT_TIMEOUT))


def _request(number: int) -> Object:
    messages: list[Object] = [{"role": "user", "content": f"Tell me about the number {number}."}]
    return cast("Object", {"messages": messages, "simulate": {"tokens": TOKENS, "rate": RATE}})


async def _records(it: Installation) -> dict[int, dict[str, Any]]:
    """The workers' records, by process."""
    records = [json.loads(raw) for raw in (await it.redis.hgetall("chat:workers")).values()]
    return {record["pid"]: record for record in records}


async def _takes_jobs(it: Installation, pid: int) -> bool:
    return not (await _records(it)).get(pid, {"starting": True})["starting"]


async def _runs_jobs(it: Installation, pid: int) -> bool:
    return bool((await _records(it))[pid]["running"])


def summary(what: str, result: Result) -> str:
    """The line that is printed. The last part is left out if every stream has moved."""
    whole = sum(reader.is_whole for reader in result.readers)
    moved = sum(reader.was_resumed for reader in result.readers)
    stayed = [reader.wait for reader in result.readers if not reader.was_claimed]
    return (
        f"{what}: whole texts {whole} of {len(result.readers)}, resumed by another worker {moved}; "
        f"longest wait of a reader {result.longest_wait:.2f} s"
        + (f"; of one that stayed {max(stayed):.2f} s" if stayed else "")
    )


@click.command()
@click.option("--streams", default=60, show_default=True)
@click.option("--by", type=click.Choice(["command", "SIGTERM"]), help="How the worker is drained.  [default: command]")
@click.option("--rolling", is_flag=True, help="Replace all three workers in turn, by SIGTERM.")
def main(streams: int, by: str | None, *, rolling: bool) -> None:
    """Measure the longest wait of a reader."""
    if rolling and by == "command":
        raise click.UsageError("--rolling replaces the workers by SIGTERM: leave out --by command")
    by = by or "command"
    measured = replace_under_streams(streams) if rolling else drain_under_streams(streams, by_signal=by == "SIGTERM")
    click.echo(summary("each worker replaced" if rolling else f"by {by}", asyncio.run(measured)))


if __name__ == "__main__":
    main()

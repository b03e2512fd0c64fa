"""The command `worker` as a process, with its two outputs and its exit status."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

import worker

_SOURCE = str(Path(worker.__file__).parents[1])
_TOO_LONG = 150.0
"""Seconds. Only a process that hangs takes so long: on a busy machine a command took a minute to start."""


@dataclass(frozen=True)
class Ended:
    """The result of a process."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def environment(**settings: str) -> dict[str, str]:
    """The environment of the tests, which has no settings, with these settings."""
    path = os.pathsep.join(filter(None, (settings.pop("PYTHONPATH", ""), _SOURCE)))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "100", **settings}


@asynccontextmanager
async def started(*arguments: str, stdin: bytes | None = None, **settings: str) -> AsyncIterator[Process]:
    """`worker <arguments>`, running; killed at the end if it still does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", *arguments,
        stdin=DEVNULL if stdin is None else PIPE, stdout=PIPE, stderr=PIPE, env=environment(**settings),
    )  # fmt: skip
    try:
        if process.stdin is not None:
            process.stdin.write(stdin or b"")
            process.stdin.close()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def rest(process: Process) -> Ended:
    """Wait for the end; returns the output that had not been read yet."""
    async with asyncio.timeout(_TOO_LONG):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, (out or b"").decode(), (err or b"").decode())  # None where there is no pipe


async def run(*arguments: str, stdin: bytes | None = None, **settings: str) -> Ended:
    """`worker <arguments>` from start to end."""
    async with started(*arguments, stdin=stdin, **settings) as process:
        return await rest(process)


async def line_with(stream: asyncio.StreamReader | None, text: str) -> str:
    """Read lines up to the one that holds a text."""
    assert stream is not None
    lines = list[str]()
    async with asyncio.timeout(_TOO_LONG):
        async for raw in stream:
            lines.append(raw.decode())
            if text in lines[-1]:
                return lines[-1]
    raise AssertionError(f"the output ended without {text!r}:\n{''.join(lines)}")


async def end_by_signal(
    *arguments: str, line: str, signum: signal.Signals, send: Callable[[int, int], None] = os.killpg
) -> tuple[Ended, list[psutil.Process]]:
    """Run `worker <arguments>` until it has printed a line with this text, and send it a signal.

    By default its whole group gets the signal, as by Ctrl-C in a terminal. Returns its end, and the processes that it
    had started by then.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", *arguments,
        stdout=PIPE, stderr=PIPE, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        await line_with(process.stdout, line)
        children = psutil.Process(process.pid).children(recursive=True)
        send(process.pid, signum)
        return await rest(process), children
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

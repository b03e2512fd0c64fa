"""A reader that closes the pipe, as `head` does, and standard streams that are closed from the start."""

import asyncio
import errno
import gc
import os
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner
from command import environment, rest
from conftest import StartSimulator, StartWorker
from redis.asyncio import Redis

from worker import Client
from worker.cli.main import main
from worker.sandbox.simulator.server import Simulator

BURIED = {"time": "1", "queue": "default", "job": "1-0", "reason": "bad", "fields": "{}"}


class _Head:
    """Prints a number of lines. Then every line fails as with a closed pipe."""

    def __init__(self, lines: int, echo: Callable[..., None]) -> None:
        self._left, self._echo = lines, echo

    def __call__(self, *arguments: object, **options: object) -> None:
        if not self._left:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self._left -= 1
        self._echo(*arguments, **options)


@pytest.mark.parametrize("lines", range(6))
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_check_closes_its_connections_however_many_lines_are_read(
    lines: int, form: tuple[str, ...], redis_url: str, simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """`worker check | head -2` printed that a task was destroyed while it was pending."""
    monkeypatch.setenv("WORKER_CONCURRENCY", "4")
    monkeypatch.setattr(click, "echo", _Head(lines, click.echo))
    ended = CliRunner().invoke(main, ["check", "--redis-url", redis_url, "--vllm-urls", simulator.url, *form])
    gc.collect()
    assert (ended.exit_code, ended.stderr, caplog.messages) == (1, "", [])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",), ("run", "--help"),
        ("check",),
        ("enqueue", "Hi"), ("enqueue", "Hi", "--json"),
        ("enqueue", "Hi", "--follow", "--json"),
        ("follow", "ended"), ("follow", "ended", "--json"),
        ("cancel", "unknown"), ("cancel", "unknown", "--json"),
        ("dead", "list"), ("dead", "list", "--json"),
        ("log",),
        ("demo",),
    ],
    ids=" ".join,
)  # fmt: skip
async def test_no_command_reports_a_closed_pipe(
    arguments: tuple[str, ...], redis_url: str, redis: Redis, client: Client,
    start_worker: StartWorker, start_simulator: StartSimulator,
) -> None:  # fmt: skip
    """Notes on standard error may stand there, but nothing about the pipe."""
    server = await start_simulator()
    await redis.xadd("chat:dead", BURIED)  # type: ignore[arg-type]
    await redis.xadd("chat:lifecycle", {"type": "finished", "id": "r"})
    if "ended" in arguments or "--follow" in arguments:
        await start_worker(server)
        await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]}, id="ended")
        await client.result("ended")
    reader, writer = os.pipe()
    os.close(reader)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", *arguments,
        stdout=writer, stderr=asyncio.subprocess.PIPE, env=environment(REDIS_URL=redis_url, VLLM_URLS=server.url),
    )  # fmt: skip
    os.close(writer)
    ended = await rest(process)
    assert (ended.status, [line for line in ended.err.splitlines() if not line.startswith("· ")]) == (1, [])


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
async def test_a_command_without_a_standard_stream_has_its_usual_exit_status(closed: str, redis_url: str) -> None:
    """The event loop ended the process by SIGABRT: the socket to Redis had the number of the missing stream."""
    process = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", f'exec "$0" -m worker status {closed}', sys.executable,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment(REDIS_URL=redis_url),
    )  # fmt: skip
    ended = await rest(process)
    assert (ended.status, ended.err) == (0, "")


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
async def test_a_worker_that_has_nowhere_to_log_works(
    closed: str, redis_url: str, client: Client, start_simulator: StartSimulator
) -> None:
    server = await start_simulator()
    process = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", f'exec "$0" -m worker run {closed}', sys.executable,
        env=environment(REDIS_URL=redis_url, VLLM_URLS=server.url),
    )  # fmt: skip
    try:
        answer = await client.result(await client.enqueue({"messages": [{"role": "user", "content": "Hi"}]}))
    finally:
        process.terminate()
        status = await process.wait()
    assert status == 0
    assert answer.outcome == "done"

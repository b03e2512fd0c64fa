"""`worker top` in a real terminal of 80 by 24: what it shows, and that it leaves the terminal as it was."""

import asyncio
import fcntl
import os
import pty
import signal
import struct
import sys
import termios
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
from command import environment, line_with, run
from command import started as command
from pending_jobs import append, pend
from readers import calls
from redis.asyncio import Redis
from waits import eventually

from worker.contract.keys import GROUP

_LEAVES_SCREEN = b"\x1b[?1049l"
"""What tells a terminal to show its former content again."""


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a pseudo-terminal: that of the person, and that of the program."""
    person, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(person, False)
    try:
        yield person, program
    finally:
        os.close(person)
        os.close(program)


@asynccontextmanager
async def started(url: str, program: int) -> AsyncIterator[Process]:
    """`worker top` at the program's end of a terminal; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "top", "--redis-url", url,
        stdin=program, stdout=program, stderr=program, env=environment(TERM="xterm-256color"), start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("was_stopped", [False, True], ids=["always ran", "was stopped"])
@pytest.mark.parametrize("ends_by", [b"q", b"\x03", signal.SIGTERM])
async def test_the_terminal_is_as_before_however_it_ends(
    redis: Redis, redis_url: str, ends_by: bytes | signal.Signals, *, was_stopped: bool
) -> None:
    await redis.xgroup_create("chat:jobs", GROUP, mkstream=True)
    request_id = await pend(redis, "pod-a")
    await append(redis, request_id, "1-0", "1-1")
    with terminal() as (person, program):
        former, seen = termios.tcgetattr(program), bytearray()

        async def is_seen(text: bytes) -> bool:
            with suppress(BlockingIOError):
                seen.extend(os.read(person, 1 << 16))
            return text in seen

        async with started(redis_url, program) as process:
            await eventually(lambda: is_seen(request_id.encode()))
            if was_stopped:
                seen.clear()
                for order in (signal.SIGSTOP, signal.SIGCONT):
                    process.send_signal(order)
                await eventually(lambda: is_seen(request_id.encode()))
            if not isinstance(ends_by, bytes):
                process.send_signal(ends_by)

            async def has_ended() -> bool:
                await is_seen(b"")  # a program that cannot write does not end
                if isinstance(ends_by, bytes):  # again and again: Textual drops keys while it starts
                    with suppress(BlockingIOError):
                        os.write(person, ends_by)
                return process.returncode is not None

            await eventually(has_ended)
            assert process.returncode == 0
        await eventually(lambda: is_seen(_LEAVES_SCREEN))
        assert termios.tcgetattr(program) == former


@pytest.mark.parametrize("pictures", [0, 10], ids=["is gone", "has long been gone"])
async def test_sigterm_ends_it_with_0_though_its_terminal_is_gone(pictures: int, redis: Redis, redis_url: str) -> None:
    """Textual 8.2.8 waits for ever once thirty writes to the terminal have not been made: after about ten seconds."""
    with terminal() as (person, program):
        seen = bytearray()

        async def is_shown() -> bool:
            with suppress(BlockingIOError):
                seen.extend(os.read(person, 1 << 16))
            return b"vllm-relay" in seen

        async with started(redis_url, program) as process:
            await eventually(is_shown)
            os.dup2(program, person)  # which closes the other end
            before = await calls(redis, "hgetall")

            async def has_drawn() -> bool:
                return await calls(redis, "hgetall") >= before + pictures

            await eventually(has_drawn, every=0.1)
            process.terminate()
            assert await process.wait() == 0


async def test_without_a_terminal_it_names_the_command_for_files(redis_url: str) -> None:
    ended = await run("top", REDIS_URL=redis_url)
    assert ended.status == 2
    assert "worker status" in ended.err


async def test_without_its_extra_it_is_the_status(redis_url: str, tmp_path: Path) -> None:
    missing = tmp_path / "textual.py"  # stands for a library that is not installed
    missing.write_text("raise ModuleNotFoundError(name='textual')")
    async with command("top", REDIS_URL=redis_url, PYTHONPATH=str(tmp_path)) as process:
        await line_with(process.stderr, "textual is missing: install the extra `top`")
        await line_with(process.stdout, "no fault is known")

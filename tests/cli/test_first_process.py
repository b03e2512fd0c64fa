"""Signals that come while the program still loads: to process 1 of a container, which has no handler, and Ctrl-C."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from waits import eventually

NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")

_SLOW = """
import os, pathlib, time
pathlib.Path(os.environ["LOADING"]).touch()
time.sleep(60)
"""


def may_be_first() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode == 0


@asynccontextmanager
async def still_loading(folder: Path, *before: str) -> AsyncIterator[Process]:
    """`worker run` in the middle of its imports: a slow click stands in for everything that is loaded."""
    (folder / "click.py").write_text(_SLOW)
    loading = folder / "loading"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{root}", "LOADING": str(loading)}
    process = await asyncio.create_subprocess_exec(
        *before, sys.executable, "-m", "worker", "run", env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:

        async def is_loading() -> bool:
            return loading.exists()

        await eventually(is_loading)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.skipif(not may_be_first(), reason="no process namespace can be made here")
async def test_a_sigterm_while_the_program_loads_ends_it(tmp_path: Path) -> None:
    async with still_loading(tmp_path, *NAMESPACE) as process:
        (first,) = psutil.Process(process.pid).children()
        first.terminate()
        assert await process.wait() == 0


async def test_ctrl_c_while_the_program_loads_ends_it_silently(tmp_path: Path) -> None:
    """The status is that of a shell."""
    async with still_loading(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert (process.returncode, err) == (130, b"")


async def test_ctrl_c_is_left_to_a_shell_that_ignores_it(tmp_path: Path) -> None:
    """As a shell does for `worker … &`."""
    async with still_loading(tmp_path, "env", "--ignore-signal=INT") as process:
        process.send_signal(signal.SIGINT)
        process.terminate()
        assert await process.wait() == -signal.SIGTERM

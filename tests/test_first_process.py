"""The program as process 1 of a container, for which Linux drops signals that it has no handler for."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import eventually

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


@pytest.mark.skipif(not may_be_first(), reason="no process namespace can be made here")
async def test_a_sigterm_while_the_program_loads_ends_it(tmp_path: Path) -> None:
    """D13: click stands for all that is loaded."""
    (tmp_path / "click.py").write_text(_SLOW)
    loading = tmp_path / "loading"
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "LOADING": str(loading)}
    process = await asyncio.create_subprocess_exec(*NAMESPACE, sys.executable, "-m", "worker", "run", env=environment)
    try:

        async def is_loading() -> bool:
            return loading.exists()

        await eventually(is_loading)
        (first,) = psutil.Process(process.pid).children()
        first.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

"""Fixtures of the tests with real clients: Node's packages, clients as processes, gateways as processes."""

import asyncio
import json
import os
import shutil
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pytest
from browsers import Browser, BrowserName, run_browser, why_missing
from nodes import HERE, NotInstalledError, installed_packages
from replicas import Replica, replica_process

__all__ = ["browser", "drivers", "node_packages", "replica", "start_client", "start_replica"]

ClientName = Literal["openai_python", "openai_node", "ai_sdk", "raw_fetch", "event_source"]
Object: TypeAlias = dict[str, Any]
_PATIENCE = 300.0
"""Seconds for a line of a client: Node alone may need many to start on a busy machine."""


@pytest.fixture(scope="session")
def node_packages() -> Path:
    """The `node_modules` of package.json. Without Node the test is skipped, except where EDGE_REQUIRED is set."""
    try:
        return installed_packages() / "node_modules"
    except NotInstalledError as error:
        if os.environ.get("EDGE_REQUIRED"):
            pytest.fail(f"EDGE_REQUIRED is set, and {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def drivers(node_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs of tests/edge/drivers, beside which Node finds its packages."""
    folder = tmp_path_factory.mktemp("drivers")
    shutil.copytree(HERE / "drivers", folder, dirs_exist_ok=True)
    (folder / "node_modules").symlink_to(node_packages)
    return folder


class RunningClient:
    """A client as a process. It prints a JSON line for each chunk, and one for the result or error of each call."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def line(self) -> Object | None:
        """The next line; None at the end."""
        assert self._process.stdout is not None
        async with asyncio.timeout(_PATIENCE):
            raw = await self._process.stdout.readline()
        if not raw:
            assert await self._process.wait() == 0, "the client broke down: its standard error has the reason"
            return None
        line = json.loads(raw)
        assert isinstance(line, dict)
        return line

    async def chunk(self, number: int) -> None:
        """Wait until the client has this many chunks."""
        while (line := await self.line()) is not None:
            if line.get("chunk") == number:
                return
            assert "chunk" in line or "opened" in line, f"the call ended before chunk {number}: {line}"
        pytest.fail(f"the client ended before chunk {number}")

    async def results(self) -> list[Object]:
        """What each of the calls gave that have not ended yet."""
        found = []
        while (line := await self.line()) is not None:
            if "chunk" not in line and "opened" not in line:
                found.append(line)
        return found


StartClient = Callable[..., Awaitable[RunningClient]]


@asynccontextmanager
async def _client(folder: Path, name: ClientName, order: Object) -> AsyncIterator[RunningClient]:
    program = [sys.executable, f"{name}.py"] if name == "openai_python" else ["node", f"{name}.mjs"]
    process = await asyncio.create_subprocess_exec(*program, cwd=folder, stdin=PIPE, stdout=PIPE, limit=1 << 24)
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
        yield RunningClient(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def start_client(drivers: Path) -> AsyncIterator[StartClient]:
    """Starts clients as processes, which end with the test. It takes the name, the base URL and the calls."""
    async with AsyncExitStack() as stack:

        async def start(
            name: ClientName, base_url: str, *calls: Object, retries: int = 0, headers: Object | None = None,
            api_key: str = "none", client_js: str = "",
        ) -> RunningClient:  # fmt: skip
            order = {"base_url": f"{base_url}/v1", "api_key": api_key, "retries": retries, "headers": headers or {}}
            order |= {"calls": calls, "client_js": client_js}
            return await stack.enter_async_context(_client(drivers, name, order))

        yield start


StartReplica = Callable[..., Awaitable[Replica]]


@pytest.fixture
async def start_replica(redis_url: str) -> AsyncIterator[StartReplica]:
    """Starts gateways as processes, and waits until they are ready. Settings are named as in `GatewaySettings`."""
    async with AsyncExitStack() as stack:

        async def start(port: int = 0, **settings: object) -> Replica:
            return await stack.enter_async_context(replica_process(redis_url, port, **settings))

        yield start


@pytest.fixture
async def replica(start_replica: StartReplica) -> Replica:
    return await start_replica()


@pytest.fixture(params=["chromium", "firefox"])
async def browser(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Browser]:
    name = cast("BrowserName", request.param)
    if reason := why_missing(name):
        if name == "chromium" and os.environ.get("EDGE_REQUIRED"):
            pytest.fail(f"EDGE_REQUIRED is set, and {reason}")
        pytest.skip(reason)
    profile = tmp_path / "profile"
    profile.mkdir()
    async with run_browser(name, profile) as browser:
        yield browser

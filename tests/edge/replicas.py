"""Gateways as processes of their own."""

import asyncio
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from command import environment
from waits import eventually

from worker.sandbox.embedded_redis import free_port


class Replica:
    """A gateway as a process of its own."""

    def __init__(self, port: int, process: Process) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    async def is_ready(self) -> bool:
        """Whether it takes requests. Raises AssertionError if the process has ended."""
        assert self.process.returncode is None, "the gateway ended: its standard error has the reason"
        async with httpx.AsyncClient() as http:
            try:
                return (await http.get(f"{self.url}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

    async def end(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        self.process.send_signal(number)
        return await self.process.wait()


@asynccontextmanager
async def replica_process(
    redis_url: str, port: int = 0, tree: Path | None = None, /, **settings: object
) -> AsyncIterator[Replica]:
    """A gateway that is ready; killed at the end if it still runs. Settings are named as in `GatewaySettings`.

    `tree` is the folder of another version of the repository, which the gateway runs.
    """
    port = port or free_port()
    given = {"listen": f"127.0.0.1:{port}", "no_auth": "true", "log_level": "warning", "drain_delay": 0} | settings
    variables = {f"GATEWAY_{name.upper()}": str(value) for name, value in given.items()}
    variables |= {"PYTHONPATH": str(tree)} if tree else {}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "gateway",
        stdin=DEVNULL, stdout=DEVNULL, env=environment(REDIS_URL=redis_url, **variables),
    )  # fmt: skip
    try:
        replica = Replica(port, process)
        await eventually(replica.is_ready)
        yield replica
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()

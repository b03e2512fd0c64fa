"""The gateway of `worker demo --web`: a process of the real program, whose page shows the answers of the demo."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..contract.keys import Keys
from .demo_workers import DemoFailed
from .orphans import guarded_folder

OPENED_WITHIN = 60.0
"""Seconds for which the demo waits until somebody opens the page."""
_STARTS_WITHIN = 30.0
_EXIT_TIMEOUT = 8.0


class DemoGateway:
    """A gateway process that serves this machine alone, without API keys."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str) -> None:
        self._process = process
        self.url = url

    def page(self, request_ids: Sequence[str]) -> str:
        """The URL of the page that follows these requests."""
        return f"{self.url}/#{','.join(request_ids)}"

    async def wait_ready(self) -> None:
        """Wait until the gateway serves.

        Raises:
            DemoFailed: when it ends, or does not serve in time.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_STARTS_WITHIN), httpx.AsyncClient() as http:
                while self._process.poll() is None:
                    with suppress(httpx.TransportError):
                        if (await http.get(f"{self.url}/readyz")).is_success:
                            return
                    await asyncio.sleep(0.05)
        raise DemoFailed("the gateway does not serve: start `worker gateway --no-auth` by hand to see why")


async def wait_until_opened(redis_url: str, keys: Keys, request_id: str) -> bool:
    """Wait until somebody follows a request, as the page does. Returns whether that was within the time."""
    try:
        async with asyncio.timeout(OPENED_WITHIN), Redis.from_url(redis_url, protocol=2) as redis:
            while not any(count for _, count in await redis.pubsub_numsub(keys.feed(request_id))):  # noqa: ASYNC110 - another process subscribes
                await asyncio.sleep(0.2)
    except (TimeoutError, RedisError):
        return False
    return True


@contextmanager
def start_gateway(redis_url: str, prefix: str) -> Iterator[DemoGateway]:
    """A gateway process, which ends with the context or with this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    own = {"REDIS_URL": redis_url, "WORKER_PREFIX": prefix, "GATEWAY_LISTEN": address, "GATEWAY_NO_AUTH": "true"}
    own |= {"GATEWAY_DRAIN_DELAY": "0", "GATEWAY_DRAIN_TIMEOUT": "0"}  # Ctrl-C does not wait for the answers
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("WORKER_", "GATEWAY_"))}
    rest["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), rest.get("PYTHONPATH"))))
    with guarded_folder("vllm-relay-demo-web-") as guard, (guard.folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - this program
            [sys.executable, "-m", __name__.partition(".")[0], "gateway"],
            env=rest | own,
            cwd=guard.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in a terminal is for the demo, which then ends its gateway
        )
        guard.add(process)
        try:
            yield DemoGateway(process, f"http://{address}")
        finally:
            try:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_TIMEOUT)
            finally:  # also after a second Ctrl-C
                process.kill()
                process.wait()

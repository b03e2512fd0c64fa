"""The gateway of `worker demo --web`: a process of the real program, whose page shows the answers of the demo."""

import asyncio
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..contract.keys import Keys
from .embedded_redis import free_port
from .programs import SandboxFailed, start_programs

OPENED_WITHIN = 60.0
"""Seconds for which the demo waits until somebody opens the page."""
_STARTS_WITHIN = 30.0


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
            SandboxFailed: when it ends, or does not serve in time.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_STARTS_WITHIN), httpx.AsyncClient() as http:
                while self._process.poll() is None:
                    with suppress(httpx.TransportError):
                        if (await http.get(f"{self.url}/readyz")).is_success:
                            return
                    await asyncio.sleep(0.05)
        raise SandboxFailed("the gateway does not serve: start `worker gateway --no-auth` by hand to see why")


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
    address = f"127.0.0.1:{free_port()}"
    own = {"REDIS_URL": redis_url, "WORKER_PREFIX": prefix, "GATEWAY_LISTEN": address, "GATEWAY_NO_AUTH": "true"}
    own |= {"GATEWAY_DRAIN_DELAY": "0", "GATEWAY_DRAIN_TIMEOUT": "0"}  # Ctrl-C does not wait for the answers
    with start_programs("demo-web") as programs:
        yield DemoGateway(programs.start_own("gateway", **own), f"http://{address}")

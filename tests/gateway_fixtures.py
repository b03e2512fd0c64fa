"""Fixtures of the gateway's tests: a gateway in the test's own process, and gateways as processes."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from loaded_python import LoadedPython
from waits import eventually

from worker.gateway.keys import hash_of
from worker.gateway.process import Gateway
from worker.gateway.settings import load_gateway_settings
from worker.sandbox.embedded_redis import free_port

SECRET = "0123456789abcdef0123456789abcdef"
KEY_A, KEY_B, KEY_ALL = "vr_key-of-a", "vr_key-of-b", "vr_key-of-the-operator"
KEYS = f"""
[[keys]]
name = "a"
hash = "{hash_of(KEY_A)}"

[[keys]]
name = "b"
hash = "sha256:{hash_of(KEY_B)}"
tenant = "b-tenant"

[[keys]]
name = "operator"
hash = "{hash_of(KEY_ALL)}"
all = true
"""
"""Keys for the setting `keys`. Together with `token_secret=SECRET` they take the place of `no_auth`."""


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway that serves at `url`."""

    url: str
    gateway: Gateway

    @property
    def port(self) -> int:
        return self.gateway.port


_PATIENCE = 60
"""Seconds without an answer of Redis, which a busy machine delays. A test of an outage sets its own."""

_ENDED_AFTER = 20.0
"""Seconds. A gateway that has not ended then hangs: where, is printed."""

StartGateway = Callable[..., Awaitable[Served]]


@pytest.fixture
async def start_gateway(redis_url: str) -> AsyncIterator[StartGateway]:
    """Starts gateways in the test's own process, without authentication by default. They stop when the test ends.

    Keyword arguments are settings, and `rooms`.
    """
    started: list[tuple[Gateway, asyncio.Task[None]]] = []

    async def start(*, keys: str = "", **settings: object) -> Served:
        given: dict[str, object] = {
            "redis_url": redis_url,
            "listen": "127.0.0.1:0",
            "drain_delay": 0,
            "patience": _PATIENCE,
        }
        given |= {"keys": keys, "token_secret": SECRET} if keys or "keys_file" in settings else {"no_auth": True}
        rooms = {"rooms": settings.pop("rooms")} if "rooms" in settings else {}
        gateway = Gateway(load_gateway_settings(**given | {"drain_timeout": 2} | settings), **rooms)  # type: ignore[arg-type]
        started.append((gateway, asyncio.create_task(gateway.run(handle_signals=False))))
        return Served(f"http://127.0.0.1:{gateway.port}", gateway)

    yield start
    for gateway, _ in started:
        gateway.stop()
    tasks = [task for _, task in started]
    _, hung = await asyncio.wait(tasks, timeout=_ENDED_AFTER) if tasks else (None, None)
    for task in hung or ():
        task.print_stack()
    await asyncio.gather(*tasks)


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> Served:
    """A gateway without authentication, in the test's own process."""
    return await start_gateway()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=30) as client:
        yield client


@dataclass(slots=True)
class GatewayProcess:
    """A gateway as a process of its own. `log` is the file with its standard error."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    async def ended(self, within: float = 60) -> int:
        """The exit status, once the process has ended."""
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), within)

    async def answers(self, path: str = "/healthz") -> bool:
        """Whether a path is answered with 200."""
        try:
            async with httpx.AsyncClient() as client:
                return (await client.get(self.url + path)).status_code == 200
        except httpx.TransportError:
            return False


StartGatewayProcess = Callable[..., Awaitable[GatewayProcess]]


@pytest.fixture
def start_gateway_process(redis_url: str, tmp_path: Path, loaded_python: LoadedPython) -> Iterator[StartGatewayProcess]:
    """Starts gateways as processes, without authentication by default, which get SIGTERM when the test ends.

    It returns once the gateway serves. `ready=False` does not wait for Redis.
    """
    started: list[subprocess.Popen[bytes]] = []

    async def start(*, ready: bool = True, keys: str = "", port: int = 0, **settings: object) -> GatewayProcess:
        port = port or free_port()
        given: dict[str, object] = {"listen": f"127.0.0.1:{port}", "drain_delay": 0, "drain_timeout": 2}
        given["patience"] = _PATIENCE
        given |= {"keys": keys, "token_secret": SECRET} if keys else {"no_auth": True}
        given |= {"log_format": "json"} | settings
        redis = str(given.pop("redis_url", redis_url))
        own = {f"GATEWAY_{name.upper()}": str(value) for name, value in given.items()}
        log = tmp_path / f"gateway-{len(started)}.log"
        with log.open("wb") as output:
            process = loaded_python.start(["-m", "worker", "gateway"], os.environ | own | {"REDIS_URL": redis}, output)
        started.append(process)
        found = GatewayProcess(process, port, log)

        async def serves() -> bool:
            assert process.poll() is None, found.log_text()
            return await found.answers("/readyz" if ready else "/healthz")

        await eventually(serves)
        return found

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(timeout=40)

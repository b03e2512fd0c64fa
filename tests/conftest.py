"""Fixtures for every test: a real Redis, a simulated vLLM, workers, clients, and checks that nothing is left behind."""

import asyncio
import gc
import os
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, suppress
from functools import cache
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest
from asyncio_reports import UNHANDLED, AsyncioReports
from edge_fixtures import browser, drivers, node_packages, replica, start_client, start_replica  # noqa: F401 - fixtures
from gateway_fixtures import gateway, http, start_gateway, start_gateway_process  # noqa: F401 - fixtures
from hypothesis import HealthCheck, settings
from loaded_python import LoadedPython
from processes import Process, deliver, process
from proxy import Proxy
from readers import followers, log, pours, start_listener, start_reader, timings  # noqa: F401 - fixtures
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from worker import Client
from worker.broker.job_queue import Delivery
from worker.engine.application import Worker
from worker.engine.pace import Pace
from worker.sandbox.embedded_redis import EmbeddedRedis, find_servers, start_redis, version_of
from worker.sandbox.simulator.scheduler import ServerClock
from worker.sandbox.simulator.server import Options, Simulator
from worker.settings import load_settings
from worker.telemetry.logging import configure_logging
from worker.vllm.servers.pace import ServerPace

# Busy machines make single examples slow: no test is about time.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Tests start some two hundred Python processes. Without compiled files, each would compile the package for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell lets a command in the background ignore SIGINT. The processes that tests start would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_PATIENT = 60
"""Seconds without an answer of Redis after which a test's own client gives up. redis-py 8.1 gives up after 5 s, which a
busy machine takes, or a test that starts a thousand requests at once."""

_MAY_STAY = (b"chat:jobs", b"chat:dead", b"chat:lifecycle", b"chat:workers", b"chat:control", b"chat:queues")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--redis-server", type=Path, help="the redis-server to test with; the first one at hand otherwise")


def _server(config: pytest.Config) -> Path | None:
    given = config.getoption("--redis-server")
    return given if isinstance(given, Path) else next(iter(find_servers()), None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without Python's garbage collector: it finds nothing, and takes a seventh of the time in each process."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Log to the present standard error: pytest closes that of `capfd` before a worker of the test has stopped."""
    configure_logging("json", "error")


def pytest_report_header(config: pytest.Config) -> str:
    server = _server(config)
    return f"redis-server: {version_of(server)} ({server})" if server else "redis-server: none at hand"


@pytest.fixture(scope="session")
def asyncio_reports() -> AsyncioReports:
    return AsyncioReports()


@pytest.fixture(autouse=True)
def _asyncio_reports_nothing(request: pytest.FixtureRequest, asyncio_reports: AsyncioReports) -> Iterator[None]:
    """Fail a test after which asyncio reports an error that nobody handled, or a task that nobody ended.

    asyncio reports some of them only when the garbage collector finds the task. So everything of the test is collected
    here: by its name this fixture is the first of a test to begin, and so the last to end.
    """
    yield
    if request.node.funcargs is not None:  # after a failed teardown, pytest ends this fixture with the next test
        request.node.funcargs.clear()
    gc.collect()
    gc.freeze()  # what is left outlives the test: the next collection then takes a fraction of a millisecond
    reports = asyncio_reports.drain()
    assert not reports, "asyncio reports:\n" + "\n".join(reports)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the settings of the person who runs the tests away from them."""
    for name in list(os.environ):
        if name.startswith(("WORKER_", "GATEWAY_", "VLLM_URL", "VLLM_API_KEY", "REDIS_URL", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _quiet_logs() -> None:
    configure_logging("json", "error")


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    """Fail a test that leaves a process behind."""
    before = _descendants()
    yield
    left = _descendants() - before
    assert not left, f"processes left behind: {[psutil.Process(pid) for pid in left if psutil.pid_exists(pid)] or left}"


def _descendants() -> set[int]:
    """The pids of the processes below this one.

    psutil reads the state of every process of the machine, which takes milliseconds: half a minute of CPU in all tests.
    Linux also names the children of a process, unless it was built without that.
    """
    if not Path("/proc/self/task", str(os.getpid()), "children").exists():
        return {child.pid for child in psutil.Process().children(recursive=True)}
    found: set[int] = set()
    parents = [os.getpid()]
    while parents:
        children = _children(parents.pop())
        found.update(children)
        parents.extend(children)
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(OSError):  # the process has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return children


@pytest.fixture(scope="session", autouse=True)
def _certificates_are_read_once() -> Iterator[None]:
    """Share the default TLS context of HTTP clients: each would take 40 ms of CPU to read all certificates again.

    A client with certificates of its own has a context of its own.
    """

    @cache
    def default(_file: str | None, _folder: str | None) -> ssl.SSLContext:
        return httpx.create_ssl_context()

    def context(verify: object, cert: object, trust_env: object) -> ssl.SSLContext:
        if verify is not True or cert or not trust_env:
            return httpx.create_ssl_context(verify, cert, trust_env)  # type: ignore[arg-type]  # as they came
        return default(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))

    with pytest.MonkeyPatch.context() as patch:
        for library in ("httpx", "httpx2"):  # the clients of openai use httpx2, which is httpx under another name
            patch.setattr(f"{library}._transports.default.create_ssl_context", context)
        yield


@pytest.fixture(scope="session")
def redis_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    """One Redis for the whole run."""
    server = _server(request.config)
    if server is None:
        pytest.fail("no redis-server at hand: install one, such as Debian's package redis-server")
    with (
        start_redis(server, "--enable-debug-command", "local") if _knows_debug(server) else start_redis(server) as redis
    ):
        yield redis


def _knows_debug(server: Path) -> bool:
    return not version_of(server).startswith("6.")


@pytest.fixture(scope="session")
def redis_binary(redis_server: EmbeddedRedis) -> Path:
    """The redis-server that all tests of this run use."""
    assert redis_server.process is not None
    binary = cast("list[object]", redis_server.process.args)[0]
    assert isinstance(binary, Path)
    return binary


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> Iterator[str]:
    """An empty Redis. A test fails that leaves a connection, or a key without an expiry that is not a lasting one."""
    with BlockingRedis.from_url(
        redis_server.url, protocol=2, socket_timeout=_PATIENT, socket_connect_timeout=_PATIENT
    ) as redis:
        redis.flushall()
        yield redis_server.url
        # Redis sees a moment later that a connection was closed. The next test may count connections and subscribers.
        deadline = time.monotonic() + 30
        while len(clients := redis.client_list()) > 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        keys = [key for key in redis.scan_iter(count=10_000) if not key.startswith(_MAY_STAY)]
        lasting = [key for key in keys if redis.ttl(key) == -1]
        redis.flushall()
    assert len(clients) == 1, f"connections left behind: {clients}"
    assert not lasting, f"keys without expiry: {lasting}"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(
        redis_url, protocol=2, socket_timeout=_PATIENT, socket_connect_timeout=_PATIENT
    ) as client:
        yield client


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Client]:
    async with Client(redis_url, patience=5) as client:
        yield client


@pytest.fixture
async def redis_proxy(redis_url: str) -> AsyncIterator[Proxy]:
    """A proxy before the Redis that breaks connections on order. Fixtures that must end before it come after it."""
    async with Proxy.before(redis_url) as proxy:
        yield proxy


StartSimulator = Callable[..., Awaitable[Simulator]]


@pytest.fixture
async def start_simulator() -> AsyncIterator[StartSimulator]:
    """Starts simulated vLLM servers, which end with the test."""
    async with AsyncExitStack() as stack:

        async def start(options: Options | None = None, port: int = 0, clock: ServerClock | None = None) -> Simulator:
            return await stack.enter_async_context(Simulator(options, port=port, clock=clock))

        yield start


@pytest.fixture
async def simulator(start_simulator: StartSimulator) -> Simulator:
    return await start_simulator()


StartWorker = Callable[..., Awaitable[Worker]]


@pytest.fixture
def server_pace() -> ServerPace:
    """How the workers of a test probe their servers; a test may change the fields at any time."""
    return ServerPace()


@pytest.fixture
def pace() -> Pace:
    """The waiting times of workers: short reads for jobs, since a worker stops when its last read has returned."""
    return Pace(longest_block=0.1)


@pytest.fixture
async def start_worker(redis_url: str, pace: Pace, server_pace: ServerPace) -> AsyncIterator[StartWorker]:
    """Starts workers in the test's own process. They stop in order when the test ends."""
    started: list[tuple[Worker, asyncio.Task[None]]] = []

    async def start(*vllm: Simulator, pace: Pace = pace, **settings: object) -> Worker:
        given: dict[str, object] = {"lease": 2, "drain_timeout": 2, "gap_timeout": 5, "first_token_timeout": 5}
        urls = ",".join(server.url for server in vllm)
        given |= {"redis_url": redis_url, "vllm_urls": urls} | settings
        # A test means the first server that it gives.
        worker = Worker(load_settings(**given), pace=pace, server_pace=server_pace, shuffle_servers=False)
        started.append((worker, asyncio.create_task(worker.run())))
        return worker

    yield start
    for worker, _ in started:
        worker.stop()
    await asyncio.gather(*(task for _, task in started))


@pytest.fixture
async def worker(start_worker: StartWorker, simulator: Simulator) -> Worker:
    """One worker before one simulated vLLM."""
    return await start_worker(simulator)


def metric(worker: Worker, name: str, **labels: str) -> float:
    """The value of a metric of a worker; 0 while there is none with these labels."""
    return worker.metrics.registry.get_sample_value(f"vllm_relay_{name}", labels) or 0.0


Entries = list[tuple[bytes, dict[bytes, bytes]]]


async def stream(redis: Redis, key: str) -> Entries:
    """All entries of a stream, oldest first."""
    return cast("Entries", await redis.xrange(key))


StartProcess = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(scope="session")
def loaded_python() -> Iterator[LoadedPython]:
    """Starts workers and gateways without their imports."""
    loaded = LoadedPython()
    yield loaded
    loaded.close()


@pytest.fixture
def start_process(redis_url: str, tmp_path: Path, loaded_python: LoadedPython) -> Iterator[StartProcess]:
    """Starts workers as processes of their own, which get SIGTERM when the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*vllm: Simulator, **settings: object) -> "subprocess.Popen[bytes]":
        given = {"lease": 2, "drain_timeout": 2, "log_format": "json"} | settings
        redis = given.pop("redis_url", redis_url)
        program = cast("list[str]", given.pop("program", ["-m", "worker", "run"]))
        own = {f"WORKER_{name.upper()}": str(value) for name, value in given.items()}
        own |= {"REDIS_URL": str(redis), "VLLM_URLS": ",".join(server.url for server in vllm) or "http://127.0.0.1:1"}
        with (tmp_path / f"worker-{len(started)}.log").open("wb") as output:
            process = loaded_python.start(program, os.environ | own, output)
        started.append(process)
        return process

    yield start
    for worker in started:
        worker.terminate()
    for worker in started:
        worker.wait(timeout=60)
    lines = [line for path in tmp_path.glob("worker-*.log") for line in path.read_text(errors="replace").splitlines()]
    unhandled = [line for line in lines if any(words in line for words in UNHANDLED)]
    assert not unhandled, "\n".join(unhandled)


@pytest.fixture
async def one(redis_url: str) -> AsyncIterator[Process]:
    async with process(redis_url, "one") as it:
        await it.jobs.ensure_group("default")
        yield it


@pytest.fixture
async def two(redis_url: str) -> AsyncIterator[Process]:
    async with process(redis_url, "two") as it:
        yield it


@pytest.fixture
async def delivery(one: Process, redis: Redis) -> Delivery:
    return await deliver(one, redis)

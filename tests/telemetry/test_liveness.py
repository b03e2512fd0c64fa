"""What probes and scrapers see of a worker process: alive, stuck, ready, draining, and the silence of its servers."""

import asyncio
import math
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from command import run
from conftest import StartProcess, StartSimulator, StartWorker, metric
from proxy import Proxy
from waits import eventually

from worker import Client
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.server import Options, Scenario, Simulator
from worker.telemetry.heartbeat import read_heartbeats
from worker.telemetry.loop_monitor import LoopMonitor
from worker.telemetry.metrics import Metrics

ASK: dict[str, object] = {"messages": [{"role": "user", "content": "Hi"}]}
BLOCKING = str(Path(__file__).parent / "blocking_worker.py")
CONSTANT = {"vllm_relay_build_info", "vllm_relay_slots", "vllm_relay_loop_delay_seconds"}


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        yield client


async def status(http: httpx.AsyncClient, port: int, path: str) -> tuple[int, str]:
    try:
        response = await http.get(f"http://127.0.0.1:{port}{path}")
    except httpx.TransportError:
        return 0, ""
    return response.status_code, response.text


async def health(process: "subprocess.Popen[bytes]") -> int:
    return (await run("health", "--pid", str(process.pid))).status


async def answers(http: httpx.AsyncClient, port: int, path: str, expected: int) -> None:
    async def holds() -> bool:
        return (await status(http, port, path))[0] == expected

    await eventually(holds)


async def test_a_blocked_event_loop_is_seen_by_probes_and_scrapers_and_its_end_too(
    http: httpx.AsyncClient, start_process: StartProcess, simulator: Simulator, tmp_path: Path
) -> None:
    port, released = free_port(), tmp_path / "released"
    process = start_process(simulator, program=[BLOCKING, str(released)], metrics=f"127.0.0.1:{port}", lease=30)
    await answers(http, port, "/readyz", 200)
    assert await health(process) == 0
    process.send_signal(signal.SIGUSR1)

    async def is_blocked_for_four_seconds() -> bool:
        return any(beat.pid == process.pid and beat.age > 4 for beat in read_heartbeats())

    await eventually(is_blocked_for_four_seconds)
    ended = await run("health", "--pid", str(process.pid))
    assert ended.status == 1
    assert re.fullmatch(rf"worker {process.pid} is stuck: its event loop has not run for \d+\.\d s\n", ended.out)
    assert (await status(http, port, "/healthz"))[0] == (await status(http, port, "/readyz"))[0] == 503
    page = (await status(http, port, "/metrics"))[1]
    gauges = set(re.findall(r"^# TYPE (\w+) gauge", page, re.MULTILINE))
    shown = {
        name: float(number)
        for name, number in re.findall(r"^(\w+)(?:{.*})? (\S+)$", page, re.MULTILINE)
        if name in gauges and not name.endswith("_created")
    }
    assert {name for name, number in shown.items() if not math.isnan(number)} == CONSTANT
    assert shown["vllm_relay_loop_delay_seconds"] > 2
    released.touch()

    async def is_alive_again() -> bool:
        return await health(process) == 0

    await eventually(is_alive_again)
    await answers(http, port, "/healthz", 200)
    assert "vllm_relay_jobs_running 0.0" in (await status(http, port, "/metrics"))[1]


async def test_a_stopped_process_is_not_alive_until_it_continues(
    http: httpx.AsyncClient, start_process: StartProcess, simulator: Simulator
) -> None:
    port = free_port()
    process = start_process(simulator, metrics=f"127.0.0.1:{port}", lease=30)
    await answers(http, port, "/readyz", 200)
    for sent, expected in ((signal.SIGSTOP, 1), (signal.SIGCONT, 0)):
        process.send_signal(sent)

        async def is_seen(expected: int = expected) -> bool:
            return await health(process) == expected

        await eventually(is_seen)


async def test_a_worker_is_alive_before_redis_answers_and_while_it_drains_but_not_ready(
    redis_proxy: Proxy, http: httpx.AsyncClient, start_process: StartProcess, start_simulator: StartSimulator
) -> None:
    stalls = await start_simulator(Options(scenario=Scenario(fault="stall", after=3)))
    port = free_port()
    redis_proxy.refuse()
    process = start_process(
        stalls, redis_url=redis_proxy.redis_url, metrics=f"127.0.0.1:{port}", drain_timeout=600, gap_timeout=600
    )
    await answers(http, port, "/healthz", 200)
    assert await status(http, port, "/readyz") == (503, "starting: Redis has not answered yet\n")
    assert await health(process) == 0
    await redis_proxy.heal()
    await answers(http, port, "/readyz", 200)

    redis_proxy.refuse()
    await redis_proxy.cut()
    await answers(http, port, "/readyz", 503)
    assert (await status(http, port, "/readyz"))[1] == "paused: redis_away\n"
    await redis_proxy.heal()
    await answers(http, port, "/readyz", 200)

    async with Client(redis_proxy.redis_url) as client:
        await client.enqueue(ASK)

        async def runs() -> bool:
            return "vllm_relay_jobs_running 1.0" in (await status(http, port, "/metrics"))[1]

        await eventually(runs)
    process.terminate()
    await answers(http, port, "/readyz", 503)
    assert await status(http, port, "/readyz") == (503, "draining: the worker takes no more jobs\n")
    assert await health(process) == 0
    process.terminate()  # now
    await asyncio.to_thread(process.wait, 30)  # the proxy needs this event loop


async def test_health_fails_where_no_worker_runs() -> None:
    ended = await run("health", "--pid", "999999999")
    assert ended.status == 1
    assert ended.out.startswith("no worker with pid 999999999 runs here: there is no heartbeat in /")


async def test_a_frozen_server_shows_within_ten_seconds(
    client: Client, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    frozen = await start_simulator(Options(scenario=Scenario(fault="freeze", after=3)))
    hangs = await start_simulator(Options(scenario=Scenario(fault="hang")))
    worker = await start_worker(frozen, hangs, gap_timeout=600, first_token_timeout=600, lease=60)

    async def are_up() -> bool:
        return all(metric(worker, "vllm_up", endpoint=server.url) == 1 for server in (frozen, hangs))

    await eventually(are_up)
    requests = [await client.enqueue(ASK) for _ in range(2)]
    phases = ((frozen, "answer"), (hangs, "first_token"))

    async def shows() -> bool:
        return all(
            metric(worker, "streams_silent", endpoint=server.url, phase=phase) == 1
            and 5 < metric(worker, "longest_silence_seconds", endpoint=server.url, phase=phase) < 10
            for server, phase in phases
        )

    await eventually(shows)
    for request in requests:
        await client.cancel(request)

    async def is_over() -> bool:
        return all(
            metric(worker, "longest_silence_seconds", endpoint=server.url, phase=phase) == 0
            for server in (frozen, hangs)
            for phase in ("answer", "first_token")
        )

    await eventually(is_over)
    assert metric(worker, "inter_delta_max_seconds_sum") > 5, "the silence before a cancel counts"


async def test_the_pages_of_the_server(http: httpx.AsyncClient) -> None:
    metrics = Metrics(LoopMonitor())
    url = f"http://127.0.0.1:{metrics.serve('127.0.0.1', 0)}"
    try:
        page = await http.get(f"{url}/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=")
        assert page.headers["content-encoding"] == "gzip"
        openmetrics = await http.get(f"{url}/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.text.endswith("# EOF\n")
        for path in ("/metrics", "/healthz", "/readyz"):
            head = await http.head(f"{url}{path}")
            assert (head.status_code, head.content) == (200, b"")
        assert (await http.get(f"{url}/healthz")).text == (await http.get(f"{url}/readyz")).text == "ok\n"
        for path in ("/", "/metrics/", "/favicon.ico"):
            assert (await http.get(f"{url}{path}")).status_code == 404
        refused = await http.post(f"{url}/metrics", content=b"x")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    finally:
        await metrics.aclose()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_every_kind_of_address_is_served(http: httpx.AsyncClient, host: str) -> None:
    metrics = Metrics()
    try:
        port = await asyncio.to_thread(metrics.serve, host, 0)
    except OSError:
        pytest.skip(f"{host} is not available here")
    shown = f"[{host}]" if ":" in host else host
    assert (await http.get(f"http://{shown}:{port}/healthz")).status_code == 200
    await metrics.aclose()

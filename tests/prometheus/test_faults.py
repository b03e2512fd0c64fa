"""Each alert is fired by its real fault, in a real Prometheus; a healthy system raises none.

Prometheus scrapes real workers and gateways. Windows and `for` are a thirtieth of the shipped ones.
"""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from subprocess import Popen

import httpx
import pytest
from conftest import StartProcess, StartSimulator
from edge_fixtures import StartReplica
from healthy import GATEWAY, WORKER, watch_healthy_system
from prometheus_server import find_program, prometheus, until_fired
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError
from replicas import replica_process
from waits import eventually

from worker import Client
from worker.contract.entries import Started, to_fields
from worker.contract.ids import EntryId
from worker.contract.keys import Keys
from worker.sandbox.embedded_redis import free_port, start_redis
from worker.sandbox.prometheus import FASTER, faster_rules, find_alerts
from worker.sandbox.simulator.server import Options, Scenario, Simulator

BLOCKING = str(Path(__file__).parents[1] / "telemetry/blocking_worker.py")


def ask(**fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Who are you?"}], **fields}


def at(port: int) -> str:
    return f"127.0.0.1:{port}"


async def fill(redis: Redis) -> None:
    for size in (50_000, 100):  # a large piece is refused while there is room for small ones
        with suppress(OutOfMemoryError):
            while True:
                await redis.rpush("rest", b"x" * size)


@asynccontextmanager
async def kept_busy(client: Client, **fields: object) -> AsyncIterator[None]:
    """Five requests a second, until the block ends."""

    async def add() -> None:
        while True:
            await client.enqueue(ask(**fields))
            await asyncio.sleep(0.2)

    adding = asyncio.create_task(add())
    try:
        yield
    finally:
        adding.cancel()
        with suppress(asyncio.CancelledError):
            await adding


def test_the_fast_rules_differ_from_the_shipped_ones_in_durations_alone() -> None:
    shipped, fast = find_alerts().read_text().splitlines(), faster_rules().splitlines()
    changed = [line for line, other in zip(shipped, fast, strict=True) if line != other]
    assert all("[" in line or " for: " in line for line in changed)
    assert sum(" for: " in line for line in changed) == sum(" for: " in line for line in shipped)
    assert FASTER == 30
    assert "[10000ms]" in faster_rules()


async def test_a_healthy_system_raises_no_alert() -> None:
    assert await watch_healthy_system(find_program("prometheus"), 60, lambda _: None) == []


async def test_a_killed_worker_leaves_its_queue_without_one(
    start_process: StartProcess, simulator: Simulator, client: Client
) -> None:
    port = free_port()
    worker: Popen[bytes] = start_process(simulator, metrics=at(port))
    await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server:
        await eventually(lambda: server.query("vllm_relay_queue_waiting"))
        worker.kill()
        await until_fired(server, "ProcessIsAway", "QueueLostItsWorkers")


async def test_a_gateway_with_a_queue_that_nobody_serves(
    start_process: StartProcess, start_replica: StartReplica, simulator: Simulator, client: Client
) -> None:
    start_process(simulator)
    await eventually(client.is_served)
    wrong, right = free_port(), free_port()
    await start_replica(metrics=at(wrong), queue="misspelled")
    await start_replica(metrics=at(right))
    async with prometheus({GATEWAY: [wrong], "vllm-relay-right": [right]}) as server:
        seen = await until_fired(server, "GatewayQueueIsUnserved")
        assert GATEWAY in seen["GatewayQueueIsUnserved"]
        served = await server.query("vllm_relay_gateway_queue_served == 1")
        assert [sample["metric"]["job"] for sample in served] == ["vllm-relay-right"]


async def test_a_paused_queue_that_is_forgotten(
    start_process: StartProcess, simulator: Simulator, client: Client, redis: Redis
) -> None:
    port = free_port()
    start_process(simulator, metrics=at(port))
    await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server:
        await redis.hset("chat:control", "pause:default", '{"by": "somebody"}')
        seen = await until_fired(server, "QueuePausedLong")
        assert "worker resume default" in seen["QueuePausedLong"]


async def test_an_idle_server_that_ends(start_process: StartProcess, client: Client) -> None:
    port = free_port()
    async with Simulator() as simulator:
        start_process(simulator, metrics=at(port))
        await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server:
        await until_fired(server, "ServerIsAway", "WorkerTakesNoJobs")


async def test_a_server_that_stalls_in_the_middle_of_answers(
    start_process: StartProcess, start_simulator: StartSimulator, client: Client
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(tokens=20, fault="stall", after=5, times=1)))
    port = free_port()
    start_process(simulator, metrics=at(port), gap_timeout=33, on_interrupt="resume")
    await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server:
        await client.enqueue(ask())
        await until_fired(server, "ServerIsSilent", "ReadersWaitedLong")


async def test_a_server_that_sends_a_token_every_six_seconds(
    start_process: StartProcess, simulator: Simulator, client: Client
) -> None:
    port = free_port()
    start_process(simulator, metrics=at(port))
    await eventually(client.is_served)
    async with (
        prometheus({WORKER: [port]}) as server,
        kept_busy(client, simulate={"tokens": 3, "rate": 1 / 6}),
    ):
        await until_fired(server, "AnswersStall")


async def test_a_server_that_begins_its_answers_late(
    start_process: StartProcess, start_simulator: StartSimulator, client: Client
) -> None:
    simulator = await start_simulator(Options(scenario=Scenario(tokens=5, first_token=25)))
    port = free_port()
    start_process(simulator, metrics=at(port), slots=20)
    await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server, kept_busy(client):
        await until_fired(server, "NoAnswerBegins", "FirstDeltaBudgetBurnsFast", "FirstDeltaBudgetBurnsSlowly")


async def test_jobs_that_fail(start_process: StartProcess, start_simulator: StartSimulator, client: Client) -> None:
    simulator = await start_simulator(Options(rejects=frozenset({"logit_bias"})))
    port = free_port()
    start_process(simulator, metrics=at(port))
    await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server, kept_busy(client, logit_bias={"1": 1}):
        await until_fired(server, "JobsFail")


async def test_a_dead_letter(start_process: StartProcess, simulator: Simulator, client: Client, redis: Redis) -> None:
    port = free_port()
    start_process(simulator, metrics=at(port))
    await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server:
        await redis.xadd("chat:jobs", {"id": "bad", "request": "no JSON"})
        await until_fired(server, "JobsAreBuried")


async def test_a_queue_that_grows_and_jobs_that_wait_long(
    start_process: StartProcess, simulator: Simulator, client: Client, redis: Redis
) -> None:
    if int((await redis.info("server"))["redis_version"].split(".")[0]) < 7:
        pytest.skip("Redis 6.2 does not count waiting jobs")
    port = free_port()
    start_process(simulator, metrics=at(port), slots=1)
    await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server:
        for _ in range(150):
            await client.enqueue(ask(simulate={"tokens": 4, "rate": 2}))
        async with kept_busy(client, simulate={"tokens": 4, "rate": 2}):
            await until_fired(server, "QueueGrows", "JobsWaitLong")


async def test_a_worker_that_stood_still_has_lost_its_leases(
    start_process: StartProcess, simulator: Simulator, client: Client
) -> None:
    one, two = free_port(), free_port()
    first: Popen[bytes] = start_process(simulator, metrics=at(one))
    async with prometheus({WORKER: [one]}) as server, httpx.AsyncClient() as http:

        async def second_shows(path: str, text: str) -> bool:
            with suppress(httpx.TransportError):
                return text in (await http.get(f"http://{at(two)}{path}")).text
            return False

        request_id = await client.enqueue(ask(simulate={"tokens": 3000, "rate": 10}))
        await eventually(lambda: server.query("vllm_relay_jobs_running > 0"))
        # The other worker is ready before the first stands still: `increase` needs a sample from before the stop, and
        # looks back 30 s here.
        start_process(simulator, metrics=at(two))
        await eventually(lambda: second_shows("/readyz", "ok"))
        first.send_signal(signal.SIGSTOP)
        try:
            await eventually(lambda: second_shows("/metrics", "vllm_relay_jobs_running 1.0"), every=0.1)
        finally:
            first.send_signal(signal.SIGCONT)
        await until_fired(server, "LeasesAreLost")
        await client.cancel(request_id)


async def test_a_blocked_event_loop(
    start_process: StartProcess, simulator: Simulator, client: Client, tmp_path: Path
) -> None:
    port, released = free_port(), tmp_path / "released"
    worker: Popen[bytes] = start_process(simulator, program=[BLOCKING, str(released)], metrics=at(port))
    await eventually(client.is_served)
    async with prometheus({WORKER: [port]}) as server:
        worker.send_signal(signal.SIGUSR1)
        await until_fired(server, "EventLoopIsStuck")
        released.touch()


async def test_a_redis_that_fills(redis_binary: Path, start_process: StartProcess, simulator: Simulator) -> None:
    port = free_port()
    with start_redis(redis_binary, "--maxmemory", "100mb", "--maxmemory-policy", "noeviction") as own:
        worker: Popen[bytes] = start_process(simulator, redis_url=own.url, metrics=at(port))
        async with Client(own.url) as client, Redis.from_url(own.url, protocol=2) as redis:
            await eventually(client.is_served)
            await redis.setrange("ballast", 55_000_000, "x")
            async with prometheus({WORKER: [port]}) as server:
                await until_fired(
                    server, "RedisIsFullInFourHours", meanwhile=lambda: redis.append("more", b"x" * 50_000)
                )
                seen = await until_fired(
                    server, "RedisIsNearlyFull", "WorkerTakesNoJobs", meanwhile=lambda: fill(redis)
                )
                assert seen["WorkerTakesNoJobs"] == f"{at(port)} takes no jobs: redis_full."
        worker.terminate()
        assert await asyncio.to_thread(worker.wait, 60) == 0


async def test_a_redis_that_ends(
    redis_binary: Path,
    start_process: StartProcess,
    simulator: Simulator,
) -> None:
    port, edge = free_port(), free_port()
    with start_redis(redis_binary) as own:
        start_process(simulator, redis_url=own.url, metrics=at(port))
        async with Client(own.url) as client:
            await eventually(client.is_served)
        async with (
            replica_process(own.url, metrics=at(edge), patience=1) as replica,
            prometheus({WORKER: [port], GATEWAY: [edge]}) as server,
            httpx.AsyncClient(base_url=replica.url, timeout=60) as http,
        ):
            assert own.process is not None
            own.process.kill()

            async def request() -> None:
                assert (await http.post("/requests", json=ask())).status_code == 503

            await until_fired(
                server, "WorkerTakesNoJobs", "GatewayLosesRedis", "GatewayRefusesRequests", meanwhile=request
            )


async def test_clients_that_read_nothing(start_replica: StartReplica, client: Client, redis: Redis) -> None:
    edge = free_port()
    replica = await start_replica(metrics=at(edge), write_timeout=1)
    request_id = await client.enqueue(ask())
    key = Keys().tokens(request_id)
    pipe = redis.pipeline(transaction=False)
    started = Started(id=EntryId(1, 0), queue="default", job="1-1", worker="w", owner="o", time=1)
    pipe.xadd(key, to_fields(started), id="1-0")  # type: ignore[arg-type]  # dict is invariant
    for n in range(1000):  # more bytes than the buffers of a socket hold
        pipe.xadd(key, {"type": "delta", "content": "x" * 5000}, id=f"1-{n + 1}")
    pipe.expire(key, 600)
    await pipe.execute()
    async with prometheus({GATEWAY: [edge]}) as server:
        with ExitStack() as clients:

            async def connect() -> None:
                client = clients.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", replica.port))
                client.sendall(f"GET /requests/{request_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

            await until_fired(server, "GatewayDropsStreams", meanwhile=connect)

"""A gateway as processes: probes, signals, the end of streams, children, an absent Redis, and what is logged."""

import asyncio
import json
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import psutil
import pytest
from gateway_fixtures import KEY_A, KEYS, GatewayProcess, Served, StartGateway, StartGatewayProcess
from proxy import Proxy
from redis.exceptions import ConnectionError as RedisConnectionError
from serving import EventReader
from waits import eventually

from worker.broker.gateway_registry import GatewayRegistry
from worker.sandbox.embedded_redis import free_port

MESSAGES = [{"role": "user", "content": "Who are you?"}]


async def waiting_request(url: str, **headers: str) -> str:
    """A request that waits, since there is no worker; returns its id."""
    async with httpx.AsyncClient() as http:
        response = await http.post(f"{url}/requests", json={"messages": MESSAGES}, headers=headers)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


@asynccontextmanager
async def open_stream(port: int, request_id: str) -> AsyncIterator[EventReader]:
    stream = await EventReader.open(port, f"/requests/{request_id}/events")
    try:
        assert stream.status == 200
        yield stream
    finally:
        stream.close()


async def ends_cleanly(stream: EventReader) -> bool:
    async with asyncio.timeout(300):
        await stream.body()
    return stream.is_whole


def refuses_connections(gateway: GatewayProcess) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", gateway.port)) != 0


# Probes and Redis


async def test_a_gateway_is_healthy_and_ready_when_redis_answers(gateway: Served, http: httpx.AsyncClient) -> None:
    async def is_ready() -> bool:
        return (await http.get(f"{gateway.url}/readyz")).status_code == 200

    await eventually(is_ready)
    assert (await http.get(f"{gateway.url}/healthz")).text == "ok\n"


async def test_a_gateway_without_redis_stays_says_so_and_serves_once_it_is_there(
    start_gateway_process: StartGatewayProcess, redis_proxy: Proxy, http: httpx.AsyncClient
) -> None:
    redis_proxy.refuse()
    gateway = await start_gateway_process(ready=False, redis_url=redis_proxy.redis_url, patience=1)
    not_ready = await http.get(f"{gateway.url}/readyz")
    assert (not_ready.status_code, not_ready.text) == (503, "Redis does not answer\n")
    response = await http.post(f"{gateway.url}/requests", json={"messages": MESSAGES})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert "redis_unavailable" in gateway.log_text()
    await redis_proxy.heal()
    await eventually(lambda: gateway.answers("/readyz"))

    async def is_added() -> bool:  # on a busy machine, Redis may take longer than the patience
        return (await http.post(f"{gateway.url}/requests", json={"messages": MESSAGES})).status_code == 202

    await eventually(is_added)


async def test_a_gateway_whose_record_cannot_be_written_is_ready(
    start_gateway: StartGateway, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cluster, the master that has the records may be away alone."""
    tried = asyncio.Event()

    async def fails(*_: object) -> None:
        tried.set()
        raise RedisConnectionError

    monkeypatch.setattr(GatewayRegistry, "write", fails)
    gateway = await start_gateway()
    await tried.wait()

    async def is_ready() -> bool:
        return (await http.get(f"{gateway.url}/readyz")).status_code == 200

    await eventually(is_ready)


async def test_metrics_count_requests_and_streams(start_gateway: StartGateway, http: httpx.AsyncClient) -> None:
    gateway = await start_gateway(metrics="127.0.0.1:0")
    request_id = await waiting_request(gateway.url)

    def sample(name: str, **labels: str) -> float:
        return gateway.gateway.metrics.registry.get_sample_value(f"vllm_relay_gateway_{name}", labels) or 0.0

    async def is_open() -> bool:
        return sample("streams", protocol="native") == 1

    async def is_counted() -> bool:  # once the note of the request is in Redis, a moment after its response
        return sample("requests_total", route="/requests", status="202") == 1

    async with open_stream(gateway.port, request_id):
        await eventually(is_open)
        await eventually(is_counted)
        assert sample("connections") >= 1

    async def has_ended() -> bool:
        return sample("streams", protocol="native") == 0

    await eventually(has_ended)
    assert sample("streams_ended_total", protocol="native", end="left") == 1
    for path in ("/nowhere", f"/requests/{'x' * 40}"):
        await http.get(f"{gateway.url}{path}")

    async def has_no_label_of_the_path() -> bool:
        return sample("requests_total", route="other", status="404") == 1

    await eventually(has_no_label_of_the_path)

    async def redis_is_up() -> bool:
        return sample("redis_up") == 1

    await eventually(redis_is_up)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_streams_end_as_their_protocol_needs_and_the_process_with_status_0(
    start_gateway_process: StartGatewayProcess, number: signal.Signals
) -> None:
    gateway = await start_gateway_process(drain_timeout=60)
    request_id = await waiting_request(gateway.url)
    async with open_stream(gateway.port, request_id) as one, open_stream(gateway.port, request_id) as two:
        gateway.process.send_signal(number)
        assert await ends_cleanly(one)
        assert await ends_cleanly(two)
    assert await gateway.ended() == 0
    assert "Traceback" not in gateway.log_text()


async def test_a_gateway_serves_on_for_the_drain_delay_while_it_is_not_ready(
    start_gateway_process: StartGatewayProcess, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway_process(drain_delay=600, drain_timeout=60)
    request_id = await waiting_request(gateway.url)
    async with open_stream(gateway.port, request_id) as stream:
        gateway.process.terminate()

        async def is_not_ready() -> bool:
            return (await http.get(f"{gateway.url}/readyz")).status_code == 503

        await eventually(is_not_ready)
        assert (await http.get(f"{gateway.url}/healthz")).status_code == 200
        assert await waiting_request(gateway.url)
        gateway.process.terminate()  # the second one does not wait
        assert await ends_cleanly(stream)
    assert await gateway.ended() == 0
    assert refuses_connections(gateway)


async def test_a_client_that_reads_nothing_does_not_hold_up_the_end(
    start_gateway_process: StartGatewayProcess,
) -> None:
    gateway = await start_gateway_process(drain_timeout=1)
    with socket.create_connection(("127.0.0.1", gateway.port)) as half:
        half.sendall(b"POST /requests HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        gateway.process.terminate()
        assert await gateway.ended() == 0


async def test_a_gateway_may_open_as_many_connections_as_the_system_lets_it(
    start_gateway_process: StartGatewayProcess,
) -> None:
    gateway = await start_gateway_process()
    soft, hard = psutil.Process(gateway.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard


# Several processes


def children_of(gateway: GatewayProcess) -> list[psutil.Process]:
    return psutil.Process(gateway.process.pid).children()


async def _has_children(gateway: GatewayProcess, count: int) -> None:
    async def are_there() -> bool:
        return len(children_of(gateway)) == count

    await eventually(are_there)


async def test_processes_share_an_address_and_end_together(start_gateway_process: StartGatewayProcess) -> None:
    gateway = await start_gateway_process(workers=2, drain_timeout=60)
    await _has_children(gateway, 2)
    request_id = await waiting_request(gateway.url)
    streams = [await EventReader.open(gateway.port, f"/requests/{request_id}/events") for _ in range(8)]
    assert {stream.status for stream in streams} == {200}
    children = children_of(gateway)
    gateway.process.terminate()
    assert all([await ends_cleanly(stream) for stream in streams])
    assert await gateway.ended() == 0
    assert not [child for child in children if child.is_running()]


async def test_a_process_that_dies_is_started_again(start_gateway_process: StartGatewayProcess) -> None:
    gateway = await start_gateway_process(workers=2)
    await _has_children(gateway, 2)
    victim = children_of(gateway)[0]
    victim.kill()

    async def is_replaced() -> bool:
        return len(children_of(gateway)) == 2 and victim not in children_of(gateway)

    await eventually(is_replaced)
    assert await waiting_request(gateway.url)
    assert "gateway_process_ended" in gateway.log_text()
    gateway.process.send_signal(signal.SIGINT)
    assert await gateway.ended() == 0


async def test_no_process_outlives_a_killed_parent(start_gateway_process: StartGatewayProcess) -> None:
    gateway = await start_gateway_process(workers=2)
    await _has_children(gateway, 2)
    children = children_of(gateway)
    request_id = await waiting_request(gateway.url)
    async with open_stream(gateway.port, request_id) as stream:
        gateway.process.kill()
        assert await ends_cleanly(stream)

    async def are_gone() -> bool:
        return not [child for child in children if child.is_running()]

    await eventually(are_gone)
    assert refuses_connections(gateway)


# Logs


async def test_the_log_has_each_request_without_its_query_and_no_secret(
    start_gateway_process: StartGatewayProcess, http: httpx.AsyncClient
) -> None:
    gateway = await start_gateway_process(keys=KEYS)
    request_id = await waiting_request(gateway.url, Authorization=f"Bearer {KEY_A}")
    created = await http.post(
        f"{gateway.url}/requests",
        json={"messages": [{"role": "user", "content": "my secret prompt"}]},
        headers={"Authorization": f"Bearer {KEY_A}"},
    )
    token = created.json()["token"]
    read = await http.get(f"{gateway.url}/requests/{created.json()['id']}", params={"token": token})
    assert read.status_code == 200
    bad = await http.get(f"{gateway.url}/requests/{request_id}", params={"token": "rt_forged"})
    assert bad.status_code == 401
    await http.get(f"{gateway.url}/readyz")
    gateway.process.terminate()
    assert await gateway.ended() == 0
    lines = [json.loads(line) for line in gateway.log_text().splitlines()]
    # In any order: the line of a new request comes once its note is in Redis.
    served = Counter(
        (line["status"], line["route"], line.get("key")) for line in lines if line["event"] == "request_served"
    )
    assert served == {
        (202, "/requests", "a"): 2, (200, "/requests/{id}", None): 1, (401, "/requests/{id}", None): 1,
    }  # fmt: skip
    for secret in (KEY_A, token, "rt_", "secret", "?"):
        assert secret not in gateway.log_text()


async def test_the_access_log_can_be_off(start_gateway_process: StartGatewayProcess, http: httpx.AsyncClient) -> None:
    gateway = await start_gateway_process(access_log=False)
    await http.get(f"{gateway.url}/nowhere")
    assert "gateway_started" in gateway.log_text()
    assert "request_served" not in gateway.log_text()


async def test_an_address_in_use_is_an_error_with_the_name_of_the_setting(
    start_gateway: StartGateway, start_gateway_process: StartGatewayProcess
) -> None:
    port = free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ValueError, match="GATEWAY_LISTEN is"):
            await start_gateway(listen=f"127.0.0.1:{port}")
        with pytest.raises(AssertionError, match="GATEWAY_LISTEN is"):
            await start_gateway_process(port=port)

"""A gateway as a process: probes, signals, the end of streams, an absent Redis."""

import signal

import httpx
from gateway_fixtures import Served, StartGatewayProcess
from waits import eventually


async def test_a_gateway_is_healthy_and_ready_when_redis_answers(gateway: Served, http: httpx.AsyncClient) -> None:
    async def is_ready() -> bool:
        return (await http.get(f"{gateway.url}/readyz")).status_code == 200

    await eventually(is_ready)
    assert (await http.get(f"{gateway.url}/healthz")).text == "ok\n"


async def test_a_gateway_ends_with_status_0_after_sigterm(start_gateway_process: StartGatewayProcess) -> None:
    gateway = await start_gateway_process()
    gateway.process.send_signal(signal.SIGTERM)
    assert await gateway.ended() == 0

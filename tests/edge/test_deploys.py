"""A gateway is replaced while readers follow: they notice nothing."""

import signal

import pytest
from conftest import StartSimulator, StartWorker
from deploy_followers import deploy_under_followers
from edge_fixtures import StartReplica

from worker import Client
from worker.sandbox.simulator.server import Options, Scenario

pytestmark = pytest.mark.timeout(240)  # each test starts several processes, and most of them Node


async def test_followers_notice_nothing_of_a_deploy(
    start_replica: StartReplica, start_simulator: StartSimulator, start_worker: StartWorker, client: Client
) -> None:
    await start_worker(await start_simulator(Options(scenario=Scenario(tokens=120, rate=20.0))))
    first, second = await start_replica(drain_delay=0.5, drain_timeout=0.5), await start_replica()
    requests = [await client.enqueue({"messages": [{"role": "user", "content": f"Tell me {n}"}]}) for n in range(6)]
    deploy = await deploy_under_followers(
        requests, 60, (first.port, second.port), lambda: first.end(signal.SIGTERM), client
    )
    assert not deploy.errors, deploy.errors[:5]
    assert deploy.moved
    assert deploy.status == 0

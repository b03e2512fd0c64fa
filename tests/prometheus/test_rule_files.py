"""The alerts and the pages of metrics by `promtool`: they are valid, and each rule fires in its situation alone."""

import asyncio
import subprocess
from pathlib import Path

import httpx
import pytest
from conftest import StartProcess
from documents import ROOT
from edge_fixtures import StartReplica
from prometheus_server import find_program

from worker import Client
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.server import Simulator

ALERTS = ROOT / "deploy/alerts.yaml"
SITUATIONS = Path(__file__).with_name("alerts_test.yaml")
FAULTS = Path(__file__).with_name("test_faults.py")


def promtool(*arguments: object, stdin: str = "") -> str:
    """The standard output of a run that succeeds."""
    program = find_program("promtool")
    done = subprocess.run(
        [program, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names() -> list[str]:
    return [line.split()[-1] for line in ALERTS.read_text().splitlines() if line.strip().startswith("- alert:")]


def test_the_rules_are_valid() -> None:
    assert f"SUCCESS: {len(names())} rules found" in promtool("check", "rules", ALERTS)


def test_each_alert_fires_in_its_situation_alone() -> None:
    assert "SUCCESS" in promtool("test", "rules", SITUATIONS)


@pytest.mark.parametrize("name", names())
def test_each_alert_has_a_situation_and_a_real_fault(name: str) -> None:
    assert f'alertname="{name}"' in SITUATIONS.read_text()
    assert f'"{name}"' in FAULTS.read_text()


async def test_the_pages_of_metrics_are_valid(
    start_process: StartProcess, start_replica: StartReplica, simulator: Simulator, client: Client
) -> None:
    worker, gateway = free_port(), free_port()
    start_process(simulator, metrics=f"127.0.0.1:{worker}")
    replica = await start_replica(metrics=f"127.0.0.1:{gateway}")
    async with httpx.AsyncClient(timeout=60) as http:
        request = {"model": "reciter", "messages": [{"role": "user", "content": "Hi"}]}
        assert (await http.post(f"{replica.url}/v1/chat/completions", json=request)).status_code == 200
        assert await client.is_served()
        for port in (worker, gateway):
            page = await http.get(f"http://127.0.0.1:{port}/metrics")
            assert "vllm_relay_build_info" in page.text
            await asyncio.to_thread(promtool, "check", "metrics", stdin=page.text)

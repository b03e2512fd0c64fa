"""A real Prometheus that scrapes workers and gateways, with the shipped alerts at a thirtieth of their durations."""

import asyncio
import os
import re
import shutil
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from documents import ROOT
from replicas import free_port
from waits import eventually

ALERTS = ROOT / "deploy/alerts.yaml"
FASTER = 30
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(?<=\[)(\d+)([smhd])(?=[]:])|(?<= for: )(\d+)([smhd])\b")
_PATIENCE = 150.0
"""Seconds until an alert fires at the latest: only a guard for a test that hangs."""


def find_program(name: str) -> str:
    """The path of a program of Prometheus. Without it the test is skipped, except where PROMETHEUS_REQUIRED is set."""
    found = shutil.which(name)
    if found is None:
        missing = f"{name} is missing: install Debian's package prometheus (RUNLEVEL=1 keeps it from starting)"
        if os.environ.get("PROMETHEUS_REQUIRED"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def faster_rules() -> str:
    """The shipped rules with all windows and `for` divided by `FASTER`."""

    def divided(found: re.Match[str]) -> str:
        number, unit = found[1] or found[3], found[2] or found[4]
        return f"{int(number) * _SECONDS[unit] * 1000 // FASTER}ms"

    return _DURATION.sub(divided, ALERTS.read_text())


class Prometheus:
    """A Prometheus that runs at `url`."""

    def __init__(self, port: int) -> None:
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def is_ready(self) -> bool:
        try:
            return (await self._http.get("/-/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        answer = (await self._http.get("/api/v1/query", params={"query": expression})).json()
        assert answer["status"] == "success", answer
        return cast("list[dict[str, Any]]", answer["data"]["result"])

    async def rules(self) -> list[dict[str, Any]]:
        groups = (await self._http.get("/api/v1/rules")).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def firing(self) -> dict[str, str]:
        """The summary of each alert that fires now."""
        alerts = (await self._http.get("/api/v1/alerts")).json()["data"]["alerts"]
        return {
            alert["labels"]["alertname"]: alert["annotations"]["summary"]
            for alert in alerts
            if alert["state"] == "firing"
        }

    async def until_fired(
        self, *names: str, meanwhile: Callable[[], Awaitable[object]] | None = None
    ) -> dict[str, str]:
        """Wait until each of these alerts has fired, not necessarily at the same time; returns all summaries.

        `meanwhile` is called about twice a second until then: it keeps the fault going.
        """
        seen: dict[str, str] = {}

        async def have_fired() -> bool:
            seen.update(await self.firing())
            if meanwhile is not None:
                await meanwhile()
            await asyncio.sleep(0.4)  # Prometheus itself looks only once a second
            return set(names) <= set(seen)

        try:
            await eventually(have_fired, within=_PATIENCE)
        except TimeoutError:
            pytest.fail(f"{set(names) - set(seen)} did not fire, {seen} did")
        assert not [text for text in seen.values() if "error expanding template" in text]
        return seen

    async def until_scraped(self, *jobs: str) -> None:
        """Wait until each target of these jobs has been scraped."""

        async def are_up() -> bool:
            states = {job: await self.query(f'min(up{{job="{job}"}})') for job in jobs}
            return all(found and found[0]["value"][1] == "1" for found in states.values())

        await eventually(are_up)


@asynccontextmanager
async def prometheus(folder: Path, targets: Mapping[str, list[int]]) -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes these ports, by job, once a second. It ends on exit."""
    program = find_program("prometheus")
    (folder / "alerts.yaml").write_text(faster_rules())
    jobs = "".join(
        f"  - {{job_name: {job}, static_configs: [{{targets: {[f'127.0.0.1:{port}' for port in ports]}}}]}}\n"
        for job, ports in targets.items()
    )
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n"
        f"rule_files: [alerts.yaml]\nscrape_configs:\n{jobs}"
    )
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
        stdin=DEVNULL, stdout=DEVNULL,
    )  # fmt: skip
    server = Prometheus(port)
    try:
        await eventually(server.is_ready)
        await server.until_scraped(*targets)
        yield server
    finally:
        await server.aclose()
        process.terminate()
        await process.wait()

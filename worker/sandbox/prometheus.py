"""A Prometheus with the shipped alerts at a thirtieth of their durations, for the drill and the tests."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import httpx

from .embedded_redis import free_port
from .programs import Programs

FASTER = 30
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(?<=\[)(\d+)([smhd])(?=[]:])|(?<= for: )(\d+)([smhd])\b")


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert that fires: its labels tell it from others. `since` is the time at which its condition began to hold."""

    labels: frozenset[tuple[str, str]]
    name: str
    summary: str
    since: float
    """Unix time."""


def find_alerts() -> Path:
    """The shipped alerts: a file of the wheel, or of the clone."""
    shipped = Path(__file__).with_name("alerts.yaml")  # put there by worker/_alias/build_hook.py
    return shipped if shipped.is_file() else Path(__file__).parents[2] / "deploy/alerts.yaml"


def faster_rules() -> str:
    """The shipped rules with all windows and `for` divided by `FASTER`. Other limits, such as 10 s of silence, stay."""

    def divided(found: re.Match[str]) -> str:
        number, unit = found[1] or found[3], found[2] or found[4]
        return f"{int(number) * _SECONDS[unit] * 1000 // FASTER}ms"

    return _DURATION.sub(divided, find_alerts().read_text())


class Prometheus:
    """A Prometheus that scrapes and evaluates once a second."""

    def __init__(
        self, programs: Programs, program: str, targets: Mapping[str, Sequence[int]], rules: Sequence[str] = ()
    ) -> None:
        """Start the binary `program`.

        Args:
            programs: ends the process.
            program: the path of Prometheus.
            targets: the ports to scrape, by the name of their scrape job.
            rules: files of alerts; by default the shipped ones, faster.
        """
        for number, text in enumerate(rules or [faster_rules()]):
            (programs.folder / f"rules-{number}.yaml").write_text(text)
        jobs = "".join(
            f"  - {{job_name: {job}, static_configs: [{{targets: {[f'127.0.0.1:{port}' for port in ports]}}}]}}\n"
            for job, ports in targets.items()
        )
        (programs.folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n"
            f"rule_files: [rules-*.yaml]\nscrape_configs:\n{jobs}"
        )
        port = free_port()
        self._programs = programs
        self._process = programs.start([
            program, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
        ])  # fmt: skip
        self._count = sum(map(len, targets.values()))
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    async def aclose(self) -> None:
        """Close the connections. The process ends with `programs`."""
        await self._http.aclose()

    async def wait_ready(self, within: float) -> None:
        """Wait until each target has been scraped.

        Raises:
            TimeoutError: after `within` seconds.
            ChildProcessError: when Prometheus has ended.
        """
        async with asyncio.timeout(within):
            while not await self._has_scraped():  # noqa: ASYNC110 - another process scrapes
                await asyncio.sleep(0.05)

    async def _has_scraped(self) -> bool:
        if self._process.poll() is not None:
            raise ChildProcessError(self._programs.why_ended(self._process))
        try:
            if (await self._http.get("/-/ready")).status_code != 200:
                return False
        except httpx.TransportError:
            return False
        return len(await self.query("up == 1")) == self._count

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        answer = (await self._http.get("/api/v1/query", params={"query": expression})).json()
        if answer["status"] != "success":
            raise ValueError(f"{expression}: {answer['error']}")
        return cast("list[dict[str, Any]]", answer["data"]["result"])

    async def rules(self) -> list[dict[str, Any]]:
        """All rules with their health."""
        groups = (await self._http.get("/api/v1/rules")).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def firing(self) -> list[Alert]:
        """The alerts that fire now."""
        alerts = (await self._http.get("/api/v1/alerts")).json()["data"]["alerts"]
        return [
            Alert(
                frozenset(alert["labels"].items()),
                alert["labels"]["alertname"],
                alert["annotations"]["summary"],
                since=datetime.fromisoformat(alert["activeAt"]).timestamp(),
            )
            for alert in alerts
            if alert["state"] == "firing"
        ]

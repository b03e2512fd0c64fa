"""The alerts and the dashboard: each metric in an expression exists, and each alert has its row in the documents."""

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
from documents import FAILURES, ROOT
from promql_parser import Expr, VectorSelector

from worker.telemetry.gateway_metrics import GatewayMetrics
from worker.telemetry.loop_monitor import LoopMonitor
from worker.telemetry.metrics import Metrics

ALERTS = (ROOT / "deploy/alerts.yaml").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
NAMES = re.findall(r"- alert: (\w+)", ALERTS)
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


def series() -> set[str]:
    """The names of all series of workers and gateways."""
    gateway = GatewayMetrics(
        LoopMonitor(),
        connections=lambda: 0,
        redis_answers=lambda: True,
        queue_served=lambda: 1,
        why_not_ready=lambda: "",
    )
    metrics = [*Metrics().registry.collect(), *gateway.registry.collect()]
    return {f"{metric.name}{suffix}" for metric in metrics for suffix in SUFFIXES.get(metric.type, ("",))}


def rules() -> Iterator[tuple[str, str]]:
    """Each alert with its expression."""
    for part in re.split(r"\n +- alert: ", ALERTS)[1:]:
        expression = re.search(r"\n +expr: (?:>-\n((?: {10}.*\n)+)|(.*)\n)", part)
        assert expression
        yield part.split("\n", 1)[0], " ".join((expression[1] or expression[2]).split("  #")[0].split())


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def shown() -> Iterator[tuple[str, str]]:
    """Each expression of the dashboard with the title of its panel."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def named_in(expression: str) -> set[str]:
    """The names of the series that an expression selects."""
    names: set[str] = set()

    def visit(node: Expr) -> None:
        if isinstance(node, VectorSelector):
            assert node.name, expression
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return names


@pytest.mark.parametrize(("where", "expression"), [*rules(), *shown()])
def test_an_expression_names_series_that_exist(where: str, expression: str) -> None:
    assert named_in(expression), where
    assert not named_in(expression) - series() - {"up"}, where


def test_every_alert_is_read_and_says_what_to_do() -> None:
    assert [name for name, _ in rules()] == NAMES
    assert len(set(NAMES)) == len(NAMES) == ALERTS.count("summary:") == ALERTS.count("severity: ") - 1
    assert ALERTS.count("runbook: deploy/failures.md#alerts\n") == len(NAMES)
    section = FAILURES.text.split("\n## Alerts\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == NAMES


def test_durations_are_shown_as_quantiles() -> None:
    for title, expression in shown():
        assert "_seconds_sum" not in expression, title
        if "_seconds_bucket" in expression:
            assert "histogram_quantile" in expression or 'le="' in expression, title


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])

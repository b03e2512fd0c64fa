"""The metrics of a gateway: each event counts, and each metric is described."""

import re

import pytest
from documents import MONITORING

from worker.telemetry.events import Event
from worker.telemetry.gateway_events import ProbeServed, RequestServed
from worker.telemetry.gateway_metrics import GatewayMetrics
from worker.telemetry.loop_monitor import LoopMonitor
from worker.telemetry.stream_events import CaughtUp, EntriesDelivered, FollowerDropped, StreamClosed, StreamOpened


def new_metrics(why_not_ready: str = "") -> GatewayMetrics:
    return GatewayMetrics(
        LoopMonitor(),
        connections=lambda: 7,
        redis_answers=lambda: True,
        queue_served=lambda: 1,
        why_not_ready=lambda: why_not_ready,
    )


SERVED = RequestServed(method="GET", route="/requests/{id}", path="/requests/x", status=200, seconds=0.2)


@pytest.mark.parametrize(
    ("events", "name", "labels", "value"),
    [
        ([SERVED, SERVED], "requests_total", {"route": "/requests/{id}", "status": "200"}, 2),
        (
            [ProbeServed("GET", "/readyz", "/readyz", 503, 0.1)],
            "requests_total",
            {"route": "/readyz", "status": "503"},
            1,
        ),
        ([SERVED], "request_seconds_count", {"route": "/requests/{id}"}, 1),
        ([StreamOpened("chat")] * 3 + [StreamClosed("chat", "done")], "streams", {"protocol": "chat"}, 2),
        ([StreamClosed("chat", "left")], "streams_ended_total", {"protocol": "chat", "end": "left"}, 1),
        ([FollowerDropped("native")], "followers_dropped_total", {"protocol": "native"}, 1),
        ([CaughtUp("native", "slow", 0.1)], "catch_ups_total", {"protocol": "native", "reason": "slow"}, 1),
        ([EntriesDelivered(5, 700)], "entries_delivered_total", {}, 5),
        ([EntriesDelivered(5, 700)] * 2, "bytes_delivered_total", {}, 1400),
        ([EntriesDelivered(5, 700, (0.001, 0.002))], "delivery_seconds_count", {}, 2),
        ([], "connections", {}, 7),
        ([], "redis_up", {}, 1),
        ([], "queue_served", {}, 1),
        ([], "followers_dropped_total", {"protocol": "chat"}, 0),
    ],
)
def test_an_event_is_counted(events: list[Event], name: str, labels: dict[str, str], value: float) -> None:
    metrics = new_metrics()
    for event in events:
        metrics.emit(event)
    assert metrics.registry.get_sample_value(f"vllm_relay_gateway_{name}", labels) == value


def test_every_metric_is_described() -> None:
    described = {name.removesuffix("_total") for name in re.findall(r"`(vllm_relay_gateway_\w+)", MONITORING.text)}
    names = {metric.name for metric in new_metrics().registry.collect()}
    assert names - {"vllm_relay_build_info", "vllm_relay_loop_delay_seconds"} == described

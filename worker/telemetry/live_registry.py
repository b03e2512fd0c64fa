"""The registry of a process's metrics: its gauges are NaN while nobody updates them."""

import math
from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from .loop_monitor import LoopMonitor

NAMESPACE = "vllm_relay"
"""The first part of every metric's name."""

_TRUE_WHEN_STUCK = frozenset({"build_info", "slots", "loop_delay_seconds"})
"""Gauges that do not depend on the event loop."""


class LiveRegistry(CollectorRegistry):
    """A registry whose gauges are NaN while the event loop is stuck, except those that are still true."""

    def __init__(self, loop: LoopMonitor) -> None:
        super().__init__()
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        """See `CollectorRegistry.collect`."""
        is_stuck = self._loop.is_stuck()
        for metric in super().collect():
            name = metric.name.removeprefix(f"{NAMESPACE}_")
            if is_stuck and metric.type == "gauge" and name not in _TRUE_WHEN_STUCK:
                metric.samples = [sample._replace(value=math.nan) for sample in metric.samples]
            yield metric

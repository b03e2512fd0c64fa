"""The Prometheus metrics of one gateway process. The rules of `worker.telemetry.metrics` hold here too.

No label holds anything that a client chooses: a route is its pattern, and a path without a route is `other`.
"""

import asyncio
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from ..version import version
from .events import Event
from .gateway_events import RequestServed
from .live_registry import NAMESPACE, LiveRegistry
from .loop_monitor import STUCK_AFTER, LoopMonitor
from .monitoring_server import MonitoringServer
from .stream_events import CaughtUp, EntriesDelivered, FollowerDropped, StreamClosed, StreamOpened

_DELAYS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
"""Seconds. A frame of a live entry is written within 3 ms at the 99th percentile."""

_DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class GatewayMetrics:
    """All metrics of a process, in a registry of their own: a receiver of events. Durations are seconds.

    Args:
        loop: tells whether the event loop runs.
        connections: returns the number of open connections.
        redis_answers: returns whether Redis answers.
        queue_served: returns whether a worker serves the gateway's queue; NaN while that is not known.
        why_not_ready: returns what `/readyz` answers with; empty while the process is ready.
    """

    def __init__(
        self,
        loop: LoopMonitor,
        *,
        connections: Callable[[], float],
        redis_answers: Callable[[], bool],
        queue_served: Callable[[], float],
        why_not_ready: Callable[[], str],
    ) -> None:
        self._loop = loop
        self._why_not_ready = why_not_ready
        self.registry = LiveRegistry(loop)
        self._server: MonitoringServer | None = None
        self._gauge("build_info", "1, with the version of this gateway", "version").labels(version() or "unknown").set(
            1
        )
        delay = self._gauge("loop_delay_seconds", "Longest delay of the event loop of late, or since when it is stuck")
        delay.set_function(loop.delay)
        self._gauge("gateway_connections", "Open connections").set_function(connections)
        self._gauge("gateway_redis_up", "1 while Redis answers").set_function(redis_answers)
        self._gauge("gateway_queue_served", "1 while a worker serves GATEWAY_QUEUE").set_function(queue_served)
        self._requests = self._counter("gateway_requests", "Requests that were answered", "route", "status")
        self._durations = self._histogram(
            "gateway_request_seconds", "From the head of a request to the end of its response", _DURATIONS, "route"
        )
        self._streams = self._gauge("gateway_streams", "Open streams", "protocol")
        self._ended = self._counter("gateway_streams_ended", "Streams that have ended", "protocol", "end")
        self._dropped = self._counter("gateway_followers_dropped", "Streams whose client read nothing", "protocol")
        for protocol in ("chat", "native", "websocket"):  # a series that begins with its first drop shows no increase
            self._dropped.labels(protocol)
        self._catch_ups = self._counter("gateway_catch_ups", "Reads of a log by a stream", "protocol", "reason")
        self._entries = self._counter("gateway_entries_delivered", "Entries that were written to clients")
        self._bytes = self._counter("gateway_bytes_delivered", "Bytes of these entries")
        self._delay = self._histogram(
            "gateway_delivery_seconds",
            "From the arrival of an entry in this process to the last write of its frame, of a sample",
            _DELAYS,
        )

    def emit(self, event: Event) -> None:
        """Count an event. Events without a metric are ignored."""
        match event:
            case EntriesDelivered():  # the most frequent comes first
                self._entries.inc(event.entries)
                self._bytes.inc(event.size)
                for delay in event.delays:
                    self._delay.observe(delay)
            case RequestServed():
                self._requests.labels(event.route, str(event.status)).inc()
                self._durations.labels(event.route).observe(event.seconds)
            case StreamOpened():
                self._streams.labels(event.protocol).inc()
            case StreamClosed():
                self._streams.labels(event.protocol).dec()
                self._ended.labels(event.protocol, event.end).inc()
            case FollowerDropped():
                self._dropped.labels(event.protocol).inc()
            case CaughtUp():
                self._catch_ups.labels(event.protocol, event.reason).inc()

    def serve(self, host: str, port: int) -> int:
        """Serve `/metrics`, `/healthz` and `/readyz` from separate threads; returns the port.

        Raises:
            OSError: when the address is in use, or does not belong to this machine.
        """
        self._server = MonitoringServer(host, port, self.registry, self._why_not_healthy, self._problem)
        return self._server.port

    async def aclose(self) -> None:
        """Stop serving."""
        if self._server is not None:
            await asyncio.to_thread(self._server.close)

    def _why_not_healthy(self) -> str:
        age = self._loop.age()
        return f"the event loop has not run for {age:.1f} s" if age > STUCK_AFTER else ""

    def _problem(self) -> str:
        return self._why_not_healthy() or self._why_not_ready()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace=NAMESPACE, registry=self.registry, buckets=buckets)

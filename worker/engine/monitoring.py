"""What a worker process shows of itself: events as metrics and log lines, its heartbeat, and its state to systemd."""

from collections.abc import Iterable

from ..settings import ConfigError, Settings, parse_address, redacted_url, variable
from ..telemetry.events import HeartbeatRefused, MetricsServed, Receivers
from ..telemetry.heartbeat import HeartbeatFile
from ..telemetry.logging import LogReceiver
from ..telemetry.loop_monitor import LoopMonitor
from ..telemetry.metrics import Metrics
from ..telemetry.systemd import SystemdNotifier
from ..telemetry.trace_environment import open_traces
from ..vllm.servers.server import Server
from .tally import Tally


class Monitoring:
    """The receivers of a process's events, and what probes and scrapers see.

    Attributes:
        telemetry: receives the events of all parts of the process.
        tally: counts events for the worker's record.
        systemd: reports the start and the end to systemd.
        traces: makes spans of jobs; None if the process exports no traces.
    """

    def __init__(self, settings: Settings, worker: str) -> None:
        """`worker` is the name of the worker."""
        self._settings = settings
        self._loop_monitor = LoopMonitor()
        self._heartbeat = HeartbeatFile(lambda: self._loop_monitor.last_tick)
        self.systemd = SystemdNotifier()
        self.metrics = Metrics(self._loop_monitor)
        self.tally = Tally(settings.lease / 3)
        log = LogReceiver()
        self.traces = open_traces(worker, log)
        self.telemetry = Receivers(self.metrics, log, self.tally, *([self.traces] if self.traces else []))

    def observe_servers(self, servers: Iterable[Server]) -> None:
        """Show the state of vLLM servers at each scrape."""
        for server in servers:
            self._observe_server(server)

    def _observe_server(self, server: Server) -> None:
        self.metrics.observe_server(
            redacted_url(server.url),
            up=lambda: server.is_up,
            requests=lambda: server.in_flight,
            limit=lambda: server.limit.value,
            silences=server.silences,
            probe_silence=server.probe_silence,
        )

    def start(self) -> None:
        """Begin to tick, to export traces and to serve metrics.

        Raises:
            ConfigError: when the metrics cannot be served.
        """
        self._loop_monitor.start()
        if self.traces is not None:
            self.traces.start_export(self.telemetry)
        try:
            self._heartbeat.start()
        except OSError as error:
            self.telemetry.emit(HeartbeatRefused(str(error)))
        if not (address := self._settings.metrics):
            return
        try:
            port = self.metrics.serve(*parse_address(address))
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ConfigError([f"{variable('metrics')} is {address!r}, and cannot be served: {why}"]) from None
        self.telemetry.emit(MetricsServed(port))

    async def aclose(self) -> None:
        """Export the last spans, stop serving metrics, and remove the heartbeat."""
        if self.traces is not None:
            await self.traces.aclose()
        await self.metrics.aclose()
        self._heartbeat.stop()
        self._loop_monitor.stop()

"""One gateway process, from its start to a clean end."""

import asyncio
import math
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from redis.exceptions import RedisError, ResponseError

from ..broker.gateway_registry import GatewayRegistry
from ..broker.queue_depth import is_served
from ..client.async_client import Client
from ..contract.keys import Keys
from ..contract.records import GatewayRecord
from ..redisio.batching import CommandBatcher
from ..redisio.clients import command_client
from ..redisio.retry import Backoff
from ..redisio.urls import database_of
from ..settings import parse_address, redacted_url
from ..settings_source import ConfigError
from ..telemetry.events import NO_TELEMETRY, HeartbeatRefused, MetricsServed, Receivers, Telemetry
from ..telemetry.gateway_events import GatewayDraining, GatewayStarted, GatewayStopped, RequestServed
from ..telemetry.gateway_metrics import GatewayMetrics
from ..telemetry.heartbeat import HeartbeatFile
from ..telemetry.logging import LogReceiver
from ..telemetry.loop_monitor import LoopMonitor
from ..telemetry.server_log import forward_server_log
from ..telemetry.systemd import SystemdNotifier
from ..version import version
from .access import Access
from .application import ROOMS, Room, build_application
from .connections import Bounds
from .delivery_meter import DeliveryMeter
from .keys import KeyRing
from .limits import Limits
from .listener import HttpListener, bind
from .neighbours import Neighbours
from .open_streams import OpenStreams, StreamPace
from .queue_positions import QueuePositions
from .services import Services
from .settings import GatewaySettings
from .tails import Tails
from .tasks import end_tasks
from .tokens import ReadTokens

LAST_STEPS = 2.0
"""Seconds after the drain for ended streams to leave: their last bytes are written, and close frames are exchanged.

They are longer where the machine gives the process little CPU time: see `HttpListener.finish`.
"""

_PING_EVERY = 1.0
_MEASURE_EVERY = 5.0
_LEAVE = 0.5


def bind_listener(settings: GatewaySettings) -> socket.socket:
    """The socket at which the gateway listens.

    Raises:
        ConfigError: when the address is in use, or does not belong to this machine.
    """
    try:
        return bind(*parse_address(settings.listen), settings.write_timeout)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError([f"GATEWAY_LISTEN is {settings.listen!r}, and cannot be served: {why}"]) from None


def key_ring(settings: GatewaySettings, telemetry: Telemetry = NO_TELEMETRY) -> KeyRing | None:
    """The API keys; None without authentication.

    Raises:
        ConfigError: when they cannot be read.
    """
    if settings.no_auth:
        return None
    file = Path(settings.keys_file) if settings.keys_file else None
    return KeyRing(file=file, text=settings.keys.get_secret_value(), telemetry=telemetry)


class Gateway:
    """One gateway process.

    Args:
        settings: the settings.
        listening: the socket at which it listens, if another process has opened it.
        parent: a file descriptor that ends with the parent process: this process then drains and ends.
        rooms: the routes; a test may give its own.

    Raises:
        ConfigError: when the address cannot be served, or the API keys cannot be read.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        listening: socket.socket | None = None,
        parent: int | None = None,
        rooms: tuple[Room, ...] = ROOMS,
    ) -> None:
        self._settings = settings
        url = settings.redis_url.get_secret_value()
        self._shown_redis = redacted_url(url)
        self._parent = parent
        self._loop_monitor = LoopMonitor()
        self._heartbeat = HeartbeatFile(lambda: self._loop_monitor.last_tick)
        self._systemd = SystemdNotifier()
        self.metrics = GatewayMetrics(
            self._loop_monitor,
            connections=lambda: self.connections,
            redis_answers=lambda: self._redis_answers,
            queue_served=lambda: self._queue_served,
            why_not_ready=self._why_not_ready,
        )
        log = LogReceiver(omit=() if settings.access_log else (RequestServed,))
        self._telemetry = telemetry = Receivers(self.metrics, log)
        self._keys = keys = Keys(settings.prefix, database_of(url))
        ring = key_ring(settings, telemetry)
        secrets = (settings.token_secret.get_secret_value(), settings.token_secret_2.get_secret_value())
        self._redis = command_client(url, timeout=min(5.0, settings.patience))
        self._commands = CommandBatcher(self._redis)
        self._client = Client(
            url, prefix=settings.prefix, patience=settings.patience, queue_limit=settings.queue_limit
        )  # fmt: skip
        self._streams = OpenStreams(
            Tails(self._client, DeliveryMeter(telemetry)),
            position=QueuePositions(self._redis, keys).position,
            pace=StreamPace(heartbeat=settings.heartbeat, write_timeout=settings.write_timeout),
            telemetry=telemetry,
        )
        self._neighbours = Neighbours(self._redis, self._commands, keys)
        self._registry = GatewayRegistry(self._redis, keys)
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self.services = Services(
            settings=settings,
            client=self._client,
            redis=self._redis,
            commands=self._commands,
            keys=keys,
            access=Access(ring, ReadTokens(*secrets, lifetime=settings.token_lifetime)),
            limits=Limits(self._commands, keys, self._client, settings.patience),
            streams=self._streams,
            neighbours=self._neighbours,
            telemetry=telemetry,
            at_end=[self._streams.end_all],
            is_stopping=self._stopping.is_set,
        )
        self._redis_answers, self._queue_served = False, math.nan
        app = build_application(self.services, self._why_not_ready, rooms)
        bounds = Bounds(settings.header_timeout, settings.body_timeout, settings.max_connections)
        self._listener = HttpListener(app, listening or bind_listener(settings), bounds, settings.keep_alive_timeout)
        self.port = self._listener.port
        self._started = int(time.time() * 1000)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return self._listener.connections

    @property
    def _address(self) -> str:
        return f"{parse_address(self._settings.listen)[0]}:{self.port}"

    async def run(self, *, handle_signals: bool = True) -> None:
        """Serve until SIGTERM or SIGINT, then drain and return. A second SIGINT, or SIGTERM, ends at once."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT) if handle_signals else ()
        for signum in signals:
            loop.add_signal_handler(signum, self.stop)
        if self._parent is not None:
            loop.add_reader(self._parent, self._on_parent_gone)
        watching = [asyncio.create_task(part()) for part in (self._watch_redis, self._renew_record)]
        try:
            self._start_monitoring()
            self._neighbours.start()
            await self._listener.start()
            self._telemetry.emit(GatewayStarted(version(), self._address, self._shown_redis))
            self._systemd.ready()
            await self._stopping.wait()
            self._systemd.stopping()
            await self._drain()
        finally:
            for signum in signals:
                loop.remove_signal_handler(signum)
            await end_tasks(watching)
            await self._remove_record()
            await self._streams.aclose()
            await self._neighbours.aclose()
            await self._client.aclose()
            await self._commands.aclose()
            await self._redis.aclose()
            await self.metrics.aclose()
            self._heartbeat.stop()
            self._loop_monitor.stop()

    def stop(self) -> None:
        """Drain, and then end. A second call ends at once."""
        if self._stopping.is_set():
            self._at_once.set()
        self._stopping.set()

    def _on_parent_gone(self) -> None:
        assert self._parent is not None  # noqa: S101 - else nobody calls this
        asyncio.get_running_loop().remove_reader(self._parent)
        self._stopping.set()

    def _start_monitoring(self) -> None:
        forward_server_log(self._telemetry)
        self._loop_monitor.start()
        try:
            self._heartbeat.start()
        except OSError as error:
            self._telemetry.emit(HeartbeatRefused(str(error)))
        address = self._settings.metrics
        if not address:
            return
        try:
            port = self.metrics.serve(*parse_address(address))
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ConfigError([f"GATEWAY_METRICS is {address!r}, and cannot be served: {why}"]) from None
        self._telemetry.emit(MetricsServed(port))

    async def _drain(self) -> None:
        self._telemetry.emit(GatewayDraining(self._listener.connections))
        # Load balancers see that the process is not ready, and send nothing more.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._at_once.wait(), self._settings.drain_delay)
        self._listener.close()
        within = 0.0 if self._at_once.is_set() else self._settings.drain_timeout
        for end in self.services.at_end:
            end(within)
        finishing = asyncio.create_task(self._listener.finish(within, LAST_STEPS))
        at_once = asyncio.create_task(self._at_once.wait())
        await asyncio.wait({finishing, at_once}, return_when=asyncio.FIRST_COMPLETED)
        if not finishing.done():
            for end in self.services.at_end:
                end(0.0)
            await end_tasks([finishing])
            cut = await self._listener.finish(0.0, LAST_STEPS)
        else:
            cut = finishing.result()
        await end_tasks([at_once])
        self._telemetry.emit(GatewayStopped(cut))

    async def _watch_redis(self) -> None:
        """Ping Redis for `/readyz`, and look for workers. While Redis is away the process serves, with status 503."""
        backoff = Backoff("redis_unavailable", self._telemetry)
        measured_at = -math.inf
        while True:
            try:
                await self._redis.ping()
                if time.monotonic() - measured_at >= _MEASURE_EVERY:
                    self._queue_served = await self._measure_queue()
                    measured_at = time.monotonic()
            except (RedisError, OSError) as error:
                self._redis_answers, self._queue_served = False, math.nan
                measured_at = -math.inf
                await backoff.wait(error)
            else:
                self._redis_answers = True
                backoff.reset()
                await asyncio.sleep(_PING_EVERY)

    async def _renew_record(self) -> None:
        """Renew this process's record, also at once when the drain begins. Nothing else depends on it.

        In a cluster, the master that has the records may be away alone.
        """
        while True:
            is_draining = self._stopping.is_set()
            with suppress(RedisError, OSError):
                await self._registry.write(self._record(is_draining=is_draining))
            if is_draining:
                await asyncio.sleep(_MEASURE_EVERY)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_MEASURE_EVERY):
                    await self._stopping.wait()

    def _record(self, *, is_draining: bool) -> GatewayRecord:
        return GatewayRecord(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._started,
            version=version(),
            address=self._address,
            connections=self.connections,
            streams=len(self._streams),
            draining=is_draining,
        )

    async def _remove_record(self) -> None:
        """Remove this process's record, unless Redis does not answer at once. Nobody renews it then, and it expires."""
        if self._redis_answers:
            with suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(_LEAVE):
                    await self._registry.remove()

    async def _measure_queue(self) -> float:
        """1 while a worker serves the queue of requests that name none, else 0; NaN without the rights to find out."""
        try:
            return await is_served(self._redis, self._keys, self._settings.queue)
        except ResponseError:
            return math.nan

    def _why_not_ready(self) -> str:
        if self._stopping.is_set():
            return "draining: another replica takes new requests"
        return "" if self._redis_answers else "Redis does not answer"

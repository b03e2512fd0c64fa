"""The process: it is put together here, begins, drains when it is told to, and leaves in order."""

import asyncio
import os
import random
import secrets
import signal
import socket
import time

import structlog
from redis.exceptions import RedisError

from ..broker.cancels import CancelListener
from ..broker.cluster_publisher import open_publisher
from ..broker.dead_letters import DeadLetterWriter
from ..broker.job_queue import JobQueue
from ..broker.lifecycle import LifecycleWriter
from ..broker.ownership import LogOwnership
from ..broker.worker_registry import WorkerRegistry
from ..contract.keys import Keys
from ..contract.records import WorkerRecord
from ..redisio.clients import blocking_client, command_client, persist
from ..redisio.clock import Clock
from ..redisio.errors import is_transient
from ..redisio.transactions import Transactions
from ..redisio.urls import database_of
from ..settings import ConfigError, Settings, address_of, shown_url, variable
from ..telemetry.events import Receivers
from ..telemetry.logging import LogReceiver
from ..telemetry.metrics import Metrics
from ..version import version
from ..vllm.servers.pace import ServerPace
from ..vllm.servers.pool import ServerPool
from ..vllm.servers.server import Server
from ..vllm.stream.watchdog import StreamTimeouts
from .intake import JobIntake
from .job_runner import JobRunner
from .maintenance import Maintenance
from .running_jobs import RunningJobs
from .settlement import Settlement
from .slots import Slots

_LONGEST_BLOCK = 1.0

_LAST_STEPS = 10.0
"""Seconds from the end of the drain to that of the process, also where Redis does not answer."""

_log = structlog.get_logger()


class Worker:
    """One worker process, from start to clean end."""

    def __init__(self, settings: Settings, *, pace: ServerPace | None = None) -> None:
        self._settings = settings
        nonce = secrets.token_hex(8)
        self._name = f"{socket.gethostname()}-{os.getpid()}-{nonce[:6]}"
        url = settings.redis_url.get_secret_value()
        # The lease counts from the read; with half of it spent waiting, the first renewal would look like a theft.
        block = min(_LONGEST_BLOCK, settings.lease / 4)
        self._commands = command_client(url)
        self._blocking = blocking_client(url, block)
        self._clock = Clock(self._commands)
        self._metrics = Metrics()
        telemetry = self._telemetry = Receivers(self._metrics, LogReceiver())
        keys = Keys(settings.prefix, database_of(url))
        self._jobs = JobQueue(self._commands, self._blocking, keys, self._name, settings.lease, telemetry)
        self._publisher = open_publisher(url, telemetry)
        self._cancels = CancelListener(self._blocking, keys.cancel, self._publisher, telemetry)
        self._lifecycle = LifecycleWriter(self._commands, keys, telemetry, settings.lifecycle_length)
        self._registry = WorkerRegistry(self._commands, keys, telemetry)
        dead_letters = DeadLetterWriter(self._commands, keys, telemetry)
        self._upstream = ServerPool(
            _in_an_order_of_its_own(settings.vllm_urls),
            keys=settings.api_keys(),
            limits=StreamTimeouts(settings.connect_timeout, settings.first_token_timeout, settings.gap_timeout),
            telemetry=self._telemetry,
            pace=pace,
        )
        owner = LogOwnership(
            Transactions(self._commands),
            keys,
            self._jobs,
            self._publisher,
            worker=self._name,
            nonce=nonce,
            now=self._clock.now,
            replicas=settings.wait_replicas,
        )
        settlement = Settlement(
            settings,
            jobs=self._jobs,
            owner=owner,
            lifecycle=self._lifecycle,
            dead_letters=dead_letters,
            publisher=self._publisher,
            now=self._clock.now,
            metrics=self._metrics,
        )
        relay = JobRunner(
            settings,
            settlement=settlement,
            owner=owner,
            publisher=self._publisher,
            upstream=self._upstream,
            now=self._clock.now,
            metrics=self._metrics,
        )
        slots = Slots(settings.slots)
        self._leases = RunningJobs(
            self._jobs, relay.run, lambda: slots.release(1), lease=settings.lease, metrics=self._metrics
        )
        self._claims = JobIntake(
            settings, self._jobs, self._upstream, self._leases, slots, block=block, metrics=self._metrics
        )
        self._keeper = Maintenance(
            settings,
            jobs=self._jobs,
            leases=self._leases,
            registry=self._registry,
            dead_letters=dead_letters,
            publisher=self._publisher,
            clock=self._clock,
            line=self._line,
            metrics=self._metrics,
        )
        self._metrics.slots.set(settings.slots)
        self._metrics.running.set_function(lambda: self._leases.at_work)
        for endpoint in self._upstream.servers:
            self._measure(endpoint)
        self._started = 0
        self._leaving = asyncio.Event()
        self._at_once = asyncio.Event()

    def _measure(self, endpoint: Server) -> None:
        self._metrics.server(shown_url(endpoint.url), up=lambda: endpoint.is_up, requests=lambda: endpoint.in_flight)

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT; then let jobs end for `drain_timeout`, hand over the rest, and return.

        A second signal hands over at once.

        Raises:
            ConfigError: when the metrics cannot be served.
        """
        with structlog.contextvars.bound_contextvars(worker=self._name):
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signum, self.leave)
            try:
                self._serve_metrics()
                if await self._begin():
                    deadline = await self._work()
                    await self._sign_off(deadline)
            finally:
                for signum in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(signum)
                await self._close()

    def leave(self) -> None:
        """Take no more jobs and drain; called again, stop at once."""
        if self._leaving.is_set():
            self._at_once.set()
        self._leaving.set()
        self._claims.leave()

    def _serve_metrics(self) -> None:
        address = self._settings.metrics
        if not address:
            return
        try:
            port = self._metrics.serve(*address_of(address))
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ConfigError([f"{variable('metrics')} is {address!r}, and cannot be served: {why}"]) from None
        _log.info("metrics_served", port=port)

    async def _begin(self) -> bool:
        """Wait for Redis and make what is needed there; false when told to leave before it answered."""
        told = asyncio.ensure_future(self._leaving.wait())
        url = self._settings.redis_url.get_secret_value()
        redis = shown_url(url)
        vllm = [shown_url(url) for url in self._settings.vllm_urls]
        _log.info("worker_starting", version=version(), redis=redis, vllm=vllm)
        try:
            with structlog.contextvars.bound_contextvars(redis=redis):  # who waits sees for what
                await persist(self._clock.sync, told, url=url)
                for queue in self._settings.queues:
                    await persist(lambda queue=queue: self._jobs.ensure_group(queue), told)  # type: ignore[misc]
        except Exception as error:
            if told.done() and is_transient(error):
                return False
            raise
        finally:
            told.cancel()
        self._started = self._clock.now()
        _log.info(
            "worker_started",
            version=version(),
            queues=self._settings.queues,
            slots=self._settings.slots,
            redis=redis,
            vllm=vllm,
        )
        return True

    async def _work(self) -> float:
        """Until told to leave; gives when the process is to have ended, by the monotonic clock."""
        deadline = float("inf")
        async with asyncio.TaskGroup() as group:
            claiming = [group.create_task(self._claims.read(rank, q)) for rank, q in enumerate(self._settings.queues)]
            claiming.append(group.create_task(self._claims.take_over()))
            keeper = self._keeper
            keeping = (keeper.keep_leases, keeper.stop_expired, keeper.keep_house)
            working = (self._publisher.run, self._cancels.run, *keeping)
            parts = [group.create_task(work()) for work in working]
            watching = group.create_task(self._upstream.monitor())
            try:
                await self._leaving.wait()
                _log.info("worker_draining", running=len(self._leases))
                drained = time.monotonic() + self._settings.drain_timeout
                await asyncio.wait(claiming)  # what they still bring is drained or handed over with the rest
                await self._drain(drained)
                deadline = time.monotonic() + _LAST_STEPS
                await self._leases.hand_over(_LAST_STEPS)
            finally:  # also when one of them failed: a cancellation alone may be lost in redis-py
                self._claims.leave()
                self._keeper.leave()
                self._cancels.leave()
                self._publisher.stop()
                watching.cancel()
            await asyncio.wait(parts, timeout=max(0, deadline - time.monotonic()))
            for task in parts:
                task.cancel()
        return deadline

    def _line(self) -> WorkerRecord:
        return WorkerRecord(
            name=self._name,
            beat=self._clock.now(),
            started=self._started,
            slots=self._settings.slots,
            running=self._leases.at_work,
            finished=self._leases.finished,
            draining=self._leaving.is_set(),
            paused=self._claims.paused,
            queues=self._settings.queues,
            version=version(),
        )

    async def _drain(self, deadline: float) -> None:
        """Let running jobs end, for as long as there is time by the monotonic clock."""
        at_once = asyncio.ensure_future(self._at_once.wait())
        while self._leases and not at_once.done() and (left := deadline - time.monotonic()) > 0:
            self._leases.changed.clear()
            changed = asyncio.ensure_future(self._leases.changed.wait())
            await asyncio.wait({changed, at_once}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        at_once.cancel()

    async def _sign_off(self, deadline: float) -> None:
        """Leave no trace of this worker in Redis, if it answers in time."""
        try:
            async with asyncio.timeout(max(0, deadline - time.monotonic())):
                await self._registry.remove(self._name)
                await self._jobs.remove_consumer(self._settings.queues)
        except (RedisError, OSError) as error:
            _log.warning("leave_failed", error=type(error).__name__)

    async def _close(self) -> None:
        self._leases.cancel()
        await self._metrics.aclose()
        await self._upstream.aclose()
        await self._publisher.aclose()
        await self._lifecycle.aclose()
        await self._commands.aclose()
        await self._blocking.aclose()
        _log.info("worker_stopped", finished=self._leases.finished)


def _in_an_order_of_its_own(urls: tuple[str, ...]) -> list[str]:
    """The first of equals is chosen: with the same order in all workers, idle ones would all choose one server."""
    return random.sample(urls, len(urls))

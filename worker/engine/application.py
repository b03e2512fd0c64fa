"""The worker process: its assembly from parts, its start, the drain on a signal, and an orderly end."""

import asyncio
import os
import random
import secrets
import signal
import socket
import time
from contextlib import suppress
from functools import partial

import structlog
from redis.exceptions import RedisError, ResponseError

from ..broker.abandoned_jobs import AbandonedJobs
from ..broker.cancels import CancelListener
from ..broker.cluster_publisher import open_publisher
from ..broker.control import Control
from ..broker.dead_letters import DeadLetterWriter
from ..broker.job_queue import JobQueue
from ..broker.lifecycle import LifecycleWriter
from ..broker.lifecycle_retention import LifecycleTrimmer
from ..broker.ownership import LogOwnership
from ..broker.parked_jobs import ParkedJobs
from ..broker.replicas import Replicas
from ..broker.worker_registry import WorkerRegistry
from ..contract.keys import Keys
from ..redisio.batching import CommandBatcher
from ..redisio.clients import blocking_client, command_client
from ..redisio.clock import Clock
from ..redisio.errors import is_transient
from ..redisio.retry import Outage, RetryUntilAvailable
from ..redisio.urls import database_of
from ..settings import Settings, redacted_url
from ..telemetry.events import LeaveFailed, WorkerDraining, WorkerStarted, WorkerStarting, WorkerStopped
from ..version import version
from ..vllm.servers.pace import ServerPace
from ..vllm.servers.pool import ServerPool
from ..vllm.stream.watchdog import StreamTimeouts
from .admission import Admission
from .control_watch import ControlWatch
from .intake import JobIntake
from .job_context import JobServices
from .job_runner import run_job
from .line_intake import LineIntake
from .lines import KnownLines
from .maintenance import Maintenance
from .monitoring import Monitoring
from .pace import Pace
from .parking import Parking
from .poison import Quarantine
from .process_state import ProcessState
from .queue_pauses import QueuePauses
from .running_jobs import RunningJobs
from .slots import Slots
from .take_over import TakeOver
from .worker_record import RecordRefresher


class Worker:
    """One worker process, from its start to a clean end.

    Of equally good vLLM servers the first is chosen. Each worker therefore shuffles its list of servers, unless
    `shuffle_servers` is false: with the same order in all workers, idle workers would all choose the same server.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        pace: Pace | None = None,
        server_pace: ServerPace | None = None,
        shuffle_servers: bool = True,
    ) -> None:
        self._settings = settings
        self._pace = pace = pace or Pace()
        self._url = url = settings.redis_url.get_secret_value()
        self._shown_redis, self._shown_vllm = redacted_url(url), [redacted_url(server) for server in settings.vllm_urls]
        nonce = secrets.token_hex(8)
        self._name = f"{socket.gethostname()}-{os.getpid()}-{nonce[:6]}"
        keys = Keys(settings.prefix, database_of(url))

        self._monitoring = Monitoring(settings, self._name)
        self.metrics = self._monitoring.metrics
        self._telemetry = telemetry = self._monitoring.telemetry
        self._outage = Outage(telemetry)

        # The lease begins with the sending of the read. After a wait of half a lease, the renewal would be refused.
        block = min(pace.longest_block, settings.lease / 4)
        self._commands = command_client(url, timeout=pace.command_timeout)
        self._blocking = blocking_client(url, block, timeout=pace.command_timeout)
        self._clock = Clock(self._commands)
        self._batcher = batcher = CommandBatcher(self._commands)
        self._jobs = JobQueue(self._commands, self._blocking, keys, self._name, settings.lease, telemetry, batcher)
        abandoned = AbandonedJobs(self._commands, keys, self._name, settings.lease)
        self._publisher = open_publisher(url, telemetry, pace.command_timeout)
        self._cancels = CancelListener(
            self._blocking, keys.cancel, keys.presence(self._name), self._publisher, telemetry
        )
        self._lifecycle = LifecycleWriter(batcher, keys, telemetry)
        self._registry = WorkerRegistry(self._commands, keys, telemetry)
        dead_letters = DeadLetterWriter(self._commands, keys, telemetry)
        ownership = LogOwnership(
            batcher,
            keys,
            self._jobs,
            self._publisher,
            worker=self._name,
            nonce=nonce,
            now=self._clock.now,
            replicas=Replicas(settings.wait_replicas),
        )
        servers = list(settings.vllm_urls)
        if shuffle_servers:
            random.shuffle(servers)
        self._servers = ServerPool(
            servers,
            keys=settings.api_keys(),
            limits=StreamTimeouts(settings.connect_timeout, settings.first_token_timeout, settings.gap_timeout),
            telemetry=telemetry,
            pace=server_pace,
            most=settings.slots,
        )

        services = JobServices(
            settings=settings,
            keys=keys,
            jobs=self._jobs,
            ownership=ownership,
            lifecycle=self._lifecycle,
            dead_letters=dead_letters,
            publisher=self._publisher,
            servers=self._servers,
            quarantine=Quarantine(settings.first_token_timeout),
            telemetry=telemetry,
            outage=self._outage,
            now=self._clock.now,
            pace=pace,
            traces=self._monitoring.traces,
        )
        slots = Slots(settings.slots)
        parked = ParkedJobs(self._commands, keys, self._name, settings.lease, self._clock.now)
        parking = Parking(parked, KnownLines(), Admission(self._servers), telemetry)
        pauses = QueuePauses(settings.queues, self._clock.now, telemetry)
        self._running_jobs = RunningJobs(
            self._jobs,
            partial(run_job, services),
            partial(slots.release, 1),
            lease=settings.lease,
            telemetry=telemetry,
            parking=parking,
        )
        self._intake = JobIntake(
            settings,
            self._jobs,
            self._servers,
            self._running_jobs,
            slots,
            parking=parking,
            pauses=pauses,
            block=block,
            pace=pace,
            telemetry=telemetry,
        )
        self._line_intake = LineIntake(
            settings,
            parked,
            self._servers,
            self._running_jobs,
            slots,
            self._intake,
            parking=parking,
            pauses=pauses,
            pace=pace,
            telemetry=telemetry,
        )
        self._take_over = TakeOver(
            settings, abandoned, self._running_jobs, self._intake, parking.lines, pace=pace, telemetry=telemetry
        )
        self._state = ProcessState(
            settings,
            name=self._name,
            servers=self._servers,
            intake=self._intake,
            running_jobs=self._running_jobs,
            tally=self._monitoring.tally,
            pauses=pauses,
            cancels=self._cancels,
            now=self._clock.now,
        )
        self._maintenance = Maintenance(
            settings,
            jobs=self._jobs,
            running_jobs=self._running_jobs,
            registry=self._registry,
            lifecycle=LifecycleTrimmer(
                self._commands, keys, length=settings.lifecycle_length, max_bytes=settings.lifecycle_max_bytes
            ),
            dead_letters=dead_letters,
            publisher=self._publisher,
            clock=self._clock,
            record=self._state.record,
            telemetry=telemetry,
        )
        self._refresher = RecordRefresher(self._registry, self._state.record, lease=settings.lease)
        self._control = ControlWatch(
            Control(self._commands, keys, self._clock.now),
            self._registry,
            (self._blocking, keys.control),
            pauses,
            record=self._state.record,
            drain=self.stop,
            on_handed_over=self._take_over.search_now,
            interval=settings.lease / 3,
            telemetry=telemetry,
        )

        self.metrics.observe_worker(settings.slots, lambda: self._running_jobs.with_slot)
        self.metrics.observe_readiness(self._state.why_not_ready)
        self.metrics.observe_pauses(settings.queues, pauses.is_paused)
        self._monitoring.observe_servers(self._servers.servers)
        self._stopping, self._at_once = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT; then let jobs end for `drain_timeout`, hand over the rest, and return.

        A second signal hands over at once.

        Raises:
            ConfigError: when the metrics cannot be served.
        """
        with structlog.contextvars.bound_contextvars(worker=self._name):
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signum, self.stop)
            try:
                self._monitoring.start()
                # Before Redis answers: a restart would not help, and systemd limits a start.
                self._monitoring.systemd.ready()
                if await self._prepare():
                    deadline = await self._work()
                    await self._sign_off(deadline)
            finally:
                for signum in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(signum)
                await self._close()

    def stop(self) -> None:
        """Take no more jobs and drain. A second call hands over at once."""
        if self._stopping.is_set():
            self._at_once.set()
        self._stopping.set()
        self._state.is_draining = True
        self._monitoring.systemd.stopping()
        self._intake.stop()
        self._line_intake.stop()
        self._take_over.stop()

    async def _prepare(self) -> bool:
        """Wait for Redis and create the consumer groups. False when stopped before Redis has answered."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        until_available = RetryUntilAvailable(stop=stopping, outage=self._outage, url=self._url)
        self._telemetry.emit(WorkerStarting(version(), self._shown_redis, self._shown_vllm))
        try:
            with structlog.contextvars.bound_contextvars(redis=self._shown_redis):  # the log shows which Redis is away
                await until_available(self._clock.sync)
                for queue in self._settings.queues:
                    await until_available(self._jobs.ensure_group, queue)
                with suppress(ResponseError):  # reported when the watch reads it again
                    await until_available(self._control.read)
        except Exception as error:
            if stopping.done() and is_transient(error):
                return False
            raise
        finally:
            stopping.cancel()
        self._state.started = self._clock.now()
        queues, slots = self._settings.queues, self._settings.slots
        self._telemetry.emit(WorkerStarted(version(), queues, slots, self._shown_redis, self._shown_vllm))
        return True

    async def _work(self) -> float:
        """Run all parts until the process must stop; then drain and hand over.

        Returns the time by which the process must have ended (monotonic clock).
        """
        intake, maintenance = self._intake, self._maintenance
        deadline = float("inf")
        async with asyncio.TaskGroup() as group:
            taking = [
                group.create_task(intake.take_new(rank, queue)) for rank, queue in enumerate(self._settings.queues)
            ]
            taking += [group.create_task(self._line_intake.run()), group.create_task(self._take_over.run())]
            parts = [
                group.create_task(part)
                for part in (
                    self._publisher.run(),
                    self._cancels.run(),
                    maintenance.keep_leases(),
                    maintenance.run_duties(),
                    self._refresher.run(),
                    self._control.run(),
                )
            ]
            watching = group.create_task(self._servers.monitor())
            try:
                await self._stopping.wait()
                self._telemetry.emit(WorkerDraining(len(self._running_jobs)))
                drained_by = time.monotonic() + self._settings.drain_timeout
                await asyncio.wait(taking)  # the jobs of the last reads are drained or handed over with the rest
                await self._drain(drained_by)
                deadline = time.monotonic() + self._pace.last_steps
                await self._running_jobs.hand_over_all(self._pace.last_steps)
            finally:  # also when a part has failed: redis-py may lose the cancellation of the others
                self.stop()
                maintenance.stop()
                self._refresher.stop()
                self._control.stop()
                self._cancels.stop()
                self._publisher.stop()
                watching.cancel()
            await asyncio.wait(parts, timeout=max(0, deadline - time.monotonic()))
            for task in parts:
                task.cancel()
        return deadline

    async def _drain(self, deadline: float) -> None:
        """Let running jobs end until the deadline (monotonic clock), or until a second signal."""
        at_once = asyncio.ensure_future(self._at_once.wait())
        try:
            while self._running_jobs and not at_once.done() and (left := deadline - time.monotonic()) > 0:
                self._running_jobs.changed.clear()
                changed = asyncio.ensure_future(self._running_jobs.changed.wait())
                try:
                    await asyncio.wait({changed, at_once}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
        finally:
            at_once.cancel()

    async def _sign_off(self, deadline: float) -> None:
        """Remove this worker's record and consumer from Redis, if it answers before the deadline."""
        try:
            async with asyncio.timeout(max(0, deadline - time.monotonic())):
                await self._registry.remove(self._name)
                await self._control.sign_off()
                await self._jobs.remove_consumer(self._settings.queues)
        except (RedisError, OSError) as error:
            self._telemetry.emit(LeaveFailed(type(error).__name__))

    async def _close(self) -> None:
        self._running_jobs.cancel()
        await self._servers.aclose()
        await self._publisher.aclose()
        await self._lifecycle.aclose()
        await self._batcher.aclose()
        await self._commands.aclose()
        await self._blocking.aclose()
        await self._monitoring.aclose()
        self._telemetry.emit(WorkerStopped(self._running_jobs.finished))

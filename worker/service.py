"""The process: it claims jobs for its free slots, keeps their leases, and leaves in order."""

import asyncio
import os
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import structlog
from redis.exceptions import RedisError

from worker.broker.connection import Backoff, blocking_client, command_client, is_transient, persist, what_redis_said
from worker.broker.jobs import Delivery, JobQueue
from worker.broker.ledger import Ledger
from worker.broker.owner import Owner
from worker.broker.publisher import Publisher
from worker.contract.keys import Keys
from worker.contract.records import WorkerLine
from worker.generation import Stop
from worker.relay import Relay
from worker.settings import Settings, shown_url
from worker.slots import Slots
from worker.vllm.stream import Limits
from worker.vllm.upstream import Upstream

_LONGEST_BLOCK = 1.0
_BEFORE_ALL_QUEUES = -1
_LAST_WORDS = 5.0
"""Seconds that jobs have to stop once they are told to."""

_log = structlog.get_logger()


@dataclass(eq=False)
class Running:
    """A job at work. `renewed` is when its last renewal was sent, by the monotonic clock in seconds."""

    delivery: Delivery
    stop: "asyncio.Future[Stop]"
    renewed: float
    task: "asyncio.Task[None]"


class Service:
    """One worker process, from start to clean end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._nonce = secrets.token_hex(8)
        self._name = f"{socket.gethostname()}-{os.getpid()}-{self._nonce[:6]}"
        url = settings.redis_url.get_secret_value()
        # The lease counts from the read; with half of it spent waiting, the first renewal would look like a theft.
        self._block = min(_LONGEST_BLOCK, settings.lease / 4)
        self._commands = command_client(url)
        self._blocking = blocking_client(url, self._block)
        self._keys = Keys(settings.prefix)
        self._jobs = JobQueue(self._commands, self._blocking, self._keys, self._name, settings.lease)
        self._publisher = Publisher(url)
        self._ledger = Ledger(self._commands, self._keys)
        self._upstream = Upstream(
            settings.vllm_urls,
            api_key=settings.vllm_api_key.get_secret_value(),
            limits=Limits(settings.connect_timeout, settings.first_token_timeout, settings.gap_timeout),
        )
        self._clock_ahead = 0.0
        self._relay = Relay(
            settings,
            self._keys,
            jobs=self._jobs,
            owner=Owner(
                self._commands,
                self._keys,
                self._jobs,
                self._publisher,
                worker=self._name,
                nonce=self._nonce,
                now=self._now,
            ),
            ledger=self._ledger,
            publisher=self._publisher,
            upstream=self._upstream,
            now=self._now,
        )
        self._slots = Slots(settings.slots)
        self._running: dict[tuple[str, str], Running] = {}
        self._finished = 0
        self._to_trim: set[str] = set()
        self._started = 0
        self._leaving = asyncio.Event()
        self._at_once = asyncio.Event()
        self._over = asyncio.Event()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT; then let jobs end for `drain_timeout`, hand over the rest, and return.

        A second signal hands over at once.
        """
        with structlog.contextvars.bound_contextvars(worker=self._name):
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signum, self.leave)
            try:
                if await self._begin():
                    await self._work()
                    await self._sign_off()
            finally:
                for signum in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(signum)
                await self._close()

    def leave(self) -> None:
        """Take no more jobs and drain; called again, stop at once."""
        if self._leaving.is_set():
            self._at_once.set()
        self._leaving.set()
        self._slots.close()

    async def _begin(self) -> bool:
        """Wait for Redis and make what is needed there; false when told to leave before it answered."""
        told = asyncio.ensure_future(self._leaving.wait())
        try:
            await persist(self._sync_clock, told)
            for queue in self._settings.queues:
                await persist(lambda queue=queue: self._jobs.ensure_group(queue), told)  # type: ignore[misc]
        except Exception as error:
            if told.done() and is_transient(error):
                return False
            raise
        finally:
            told.cancel()
        self._started = self._now()
        _log.info(
            "worker_started",
            queues=self._settings.queues,
            slots=self._settings.slots,
            redis=shown_url(self._settings.redis_url.get_secret_value()),
            vllm=[shown_url(url) for url in self._settings.vllm_urls],
        )
        return True

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            claimers = [group.create_task(self._claim(rank, q)) for rank, q in enumerate(self._settings.queues)]
            for work in (self._publisher.run, self._keep, self._take_over):
                group.create_task(work())
            watching = group.create_task(self._upstream.watch())
            try:
                await self._leaving.wait()
                _log.info("worker_draining", running=len(self._running))
                await asyncio.wait(claimers)
                await self._drain()
                await self._hand_over()
            finally:  # also when one of them failed: a cancellation alone may be lost in redis-py
                self._slots.close()
                self._over.set()
                self._publisher.leave()
                watching.cancel()

    async def _claim(self, rank: int, queue: str) -> None:
        """Read a queue until told to leave.

        A read in flight is never cancelled: the jobs it brings would wait for their lease to end.
        """
        backoff = Backoff("claim_failed")
        block_ms = int(self._block * 1000)
        while await self._wait_for_vllm() and await self._fill(
            rank, backoff, lambda count: self._jobs.read(queue, count, block_ms)
        ):
            pass

    async def _wait_for_vllm(self) -> bool:
        """Take no jobs while no server can: the queue is the buffer. False when told to leave."""
        if self._upstream.is_there:
            return True
        waiting = {asyncio.ensure_future(self._upstream.available("")), asyncio.ensure_future(self._leaving.wait())}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        return not self._leaving.is_set()

    async def _take_over(self) -> None:
        """Take jobs whose worker has let their lease run out."""
        pause = min(1.0, self._settings.lease / 3)
        backoff = Backoff("take_over_failed", first=pause)
        while await self._rest(pause):
            for queue in self._settings.queues:
                await self._fill(_BEFORE_ALL_QUEUES, backoff, partial(self._jobs.take_expired, queue))

    async def _fill(self, rank: int, backoff: Backoff, take: Callable[[int], Awaitable[list[Delivery]]]) -> bool:
        """Wait for free slots and take jobs for them, once; false when no more are to be taken."""
        count = await self._slots.reserve(rank)
        if not count:
            return False
        sent = time.monotonic()
        try:
            deliveries = await take(count)
        except (RedisError, OSError) as error:
            self._slots.release(count)
            await backoff.wait(error)
        else:
            backoff.reset()
            self._start(deliveries, sent, count)
        return True

    def _start(self, deliveries: list[Delivery], sent: float, reserved: int) -> None:
        """Begin jobs. One that is running here already, as after a pause of this process, has its lease renewed."""
        begun = 0
        for delivery in deliveries:
            running = self._running.get((delivery.queue, delivery.id))
            if running is not None:
                running.renewed = sent
                continue
            stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._run(delivery, stop))
            self._running[delivery.queue, delivery.id] = Running(delivery, stop, sent, task)
            begun += 1
        self._slots.release(reserved - begun)

    async def _run(self, delivery: Delivery, stop: "asyncio.Future[Stop]") -> None:
        try:
            await self._relay.run(delivery, stop)
        except Exception as error:  # noqa: BLE001 - one job must not end the others
            # Left pending: whoever gets it next finds in the log how far it came.
            if isinstance(error, RedisError):  # its traceback would quote the command, and so the answer
                _log.warning("job_left", queue=delivery.queue, job=delivery.id, reason=what_redis_said(error))
            else:
                _log.exception("job_failed", queue=delivery.queue, job=delivery.id)
        finally:
            del self._running[delivery.queue, delivery.id]
            self._finished += 1
            self._to_trim.add(delivery.queue)
            self._slots.release(1)
            self._changed.set()

    async def _keep(self) -> None:
        """Three times a lease: renew it for every job, look at the logs, say that this worker lives, trim."""
        backoff = Backoff("renewal_failed")
        while await self._rest(self._settings.lease / 3):
            try:
                await self._renew()
                await self._sync_clock()
                await self._beat()
                while self._to_trim:
                    await self._jobs.trim(self._to_trim.pop())
                backoff.reset()
            except (RedisError, OSError) as error:
                await backoff.wait(error)
            self._publisher.look()
            self._stop_expired()

    async def _rest(self, seconds: float) -> bool:
        """Pause; false when all is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        return not self._over.is_set()

    async def _renew(self) -> None:
        jobs = list(self._running.values())
        if not jobs:
            return
        sent = time.monotonic()
        kept = await self._jobs.renew([(running.delivery, sent - running.renewed) for running in jobs])
        for running, is_ours in zip(jobs, kept, strict=True):
            if is_ours:
                running.renewed = sent
            elif is_ours is False and not running.stop.done():
                running.stop.set_result(Stop.LEASE_LOST)

    def _stop_expired(self) -> None:
        """Whoever could not renew before the lease ended stops: another worker may have the job by now."""
        ended = time.monotonic() - self._settings.lease
        for running in self._running.values():
            if running.renewed < ended and not running.stop.done():
                running.stop.set_result(Stop.LEASE_LOST)

    async def _beat(self) -> None:
        line = WorkerLine(
            name=self._name,
            beat=self._now(),
            started=self._started,
            slots=self._settings.slots,
            running=len(self._running),
            finished=self._finished,
            draining=self._leaving.is_set(),
        )
        await self._ledger.beat(line, stale_after=10 * self._settings.lease)
        await self._ledger.forget(self._now() - self._settings.dead_retention * 1000)

    async def _drain(self) -> None:
        """Let running jobs end, for as long as there is time."""
        deadline = time.monotonic() + self._settings.drain_timeout
        at_once = asyncio.ensure_future(self._at_once.wait())
        while self._running and not at_once.done() and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            changed = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait({changed, at_once}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        at_once.cancel()

    async def _hand_over(self) -> None:
        """Stop what still runs, and make its lease end now, so that another worker goes on at once."""
        left = list(self._running.values())
        for running in left:
            if not running.stop.done():
                running.stop.set_result(Stop.HAND_OVER)
        if left:
            await asyncio.wait({running.task for running in left}, timeout=_LAST_WORDS)
        for running in left:
            if running.stop.result() is Stop.HAND_OVER and running.task.done():
                try:
                    await self._jobs.hand_over(running.delivery, time.monotonic() - running.renewed)
                except (RedisError, OSError) as error:
                    # Redis is away: asking it for each of the others would take a timeout each.
                    _log.warning("hand_over_failed", jobs=len(left), error=type(error).__name__)
                    return

    async def _sign_off(self) -> None:
        """Leave no trace of this worker in Redis."""
        try:
            await self._ledger.leave(self._name)
            await self._jobs.leave(self._settings.queues)
        except (RedisError, OSError) as error:
            _log.warning("leave_failed", error=type(error).__name__)

    async def _close(self) -> None:
        for running in self._running.values():
            running.task.cancel()
        await self._upstream.aclose()
        await self._publisher.aclose()
        await self._commands.aclose()
        await self._blocking.aclose()
        _log.info("worker_stopped", finished=self._finished)

    async def _sync_clock(self) -> None:
        """Deadlines are by Redis's clock, which all workers share; this machine's own may be set at any time."""
        seconds, micros = await self._commands.time()
        self._clock_ahead = seconds + micros / 1e6 - time.monotonic()

    def _now(self) -> int:
        return int((time.monotonic() + self._clock_ahead) * 1000)

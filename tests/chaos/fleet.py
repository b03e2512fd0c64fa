"""Workers that share one process: the real runner, log and queue code, advanced one exchange at a time.

A real worker claims, renews, takes over and leaves by the clock. Here the test calls for each of these, and sets the
clock.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import httpx
from faults import Fate, Gate, Network, gated
from redis.exceptions import RedisError

from worker.broker.abandoned_jobs import AbandonedJobs
from worker.broker.consumers import HANDED_OVER
from worker.broker.dead_letters import DeadLetterWriter
from worker.broker.flush_pace import FlushPace
from worker.broker.job_queue import Delivery, JobQueue
from worker.broker.lifecycle import LifecycleWriter
from worker.broker.log_writer import LogLost
from worker.broker.ownership import LogOwnership
from worker.broker.parked_jobs import ParkedJob, ParkedJobs
from worker.broker.publisher import Publisher
from worker.contract.keys import DEFAULT_QUEUE, GROUP, Keys
from worker.engine.job_context import JobServices, Stop, Stopped
from worker.engine.job_runner import run_job
from worker.engine.pace import Pace
from worker.engine.poison import Quarantine
from worker.redisio.batching import CommandBatcher
from worker.redisio.clients import blocking_client, command_client
from worker.redisio.errors import is_transient
from worker.redisio.retry import Outage
from worker.settings import load_settings
from worker.telemetry.events import Receivers
from worker.vllm.http.connection import HttpResponse, ResponseBody
from worker.vllm.http.target import Target
from worker.vllm.http.transport import Transport
from worker.vllm.servers.pool import ServerPool
from worker.vllm.stream.watchdog import StreamTimeouts

_PROMPT = [0]

LEASE = 1000.0
"""Seconds: long enough for real time to play no part."""


@dataclass(eq=False)
class World:
    """What all workers share: the Redis, the network, and a clock in seconds that only `pass_time` moves."""

    url: str
    network: Network
    clock: float = 0.0
    faults: list[str] = field(default_factory=list)

    def pass_time(self, seconds: float) -> None:
        """Let every pending job be idle for so many seconds more."""
        self.clock += seconds
        admin, key = self.network.admin, Keys().jobs()
        for line in admin.xpending_range(key, GROUP, "-", "+", 100):
            idle = int(line["time_since_delivered"]) + int(seconds * 1000)
            admin.xclaim(key, GROUP, line["consumer"], 0, [str(line["message_id"], "ascii")], idle=idle, justid=True)  # type: ignore[arg-type]  # bytes


@dataclass(eq=False)
class Running:
    """A running job, as in a real worker."""

    delivery: Delivery
    stop: "asyncio.Future[Stop]"
    renewed: float


class FleetWorker:
    """One worker process. It does only what its gate lets through."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.gate = Gate(world.network)
        self.left = False
        self.running: dict[str, Running] = {}
        self._world = world
        self._commands = command_client(world.url)
        self._blocking = blocking_client(world.url, 1)
        connection_type = gated(self.gate)
        self._batcher = batcher = CommandBatcher(self._commands, connection_type)
        self._jobs = JobQueue(
            self._commands, self._blocking, Keys(), name, LEASE, batcher=batcher, connection_type=connection_type
        )
        self._abandoned = AbandonedJobs(self._commands, Keys(), name, LEASE)
        self._parked = ParkedJobs(self._commands, Keys(), name, LEASE, _now)
        publishing = command_client(world.url, connections=1)
        self._clients = (self._commands, self._blocking, publishing)
        for redis in self._clients:
            self.gate.guard(redis)
        self._publisher = Publisher(publishing, pace=FlushPace(feed_delay=0.0), connection_type=connection_type)
        self._lifecycle = LifecycleWriter(batcher, Keys())
        self._upstream = ServerPool(["http://vllm"], limits=StreamTimeouts(), transport=_Vllm(self.gate))
        self._upstream.servers[0].circuit.on_probe("")
        self._services = JobServices(
            settings=load_settings(redis_url=world.url, vllm_urls="http://vllm", tries=100),
            keys=Keys(),
            jobs=self._jobs,
            ownership=LogOwnership(
                batcher, Keys(), self._jobs, self._publisher, worker="w", nonce=name, now=_now
            ),
            lifecycle=self._lifecycle,
            dead_letters=DeadLetterWriter(self._commands, Keys()),
            publisher=self._publisher,
            servers=self._upstream,
            quarantine=Quarantine(60),
            telemetry=Receivers(),
            outage=Outage(Receivers()),
            now=_now,
            pace=Pace(first_retry=0.0),
        )  # fmt: skip
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._do("publisher", self._publisher.run())

    @property
    def is_idle(self) -> bool:
        """Whether the worker only waits for work."""
        return self._tasks.keys() <= {"publisher"} and not self.gate.waiting

    async def claim(self) -> None:
        """Read one new job."""
        self._fill("claim", partial(self._jobs.read_new, DEFAULT_QUEUE, 1, 1))

    async def take_over(self) -> None:
        """Claim one job that was handed over or whose lease has run out, after a look at the worker's own jobs."""
        self._fill("take over", self._claim_abandoned)

    async def keep(self) -> None:
        """Renew the leases, verify the logs, stop jobs that another worker has, and trim."""
        if "keep" not in self._tasks and not self.left:
            self._do("keep", self._keep())

    async def leave(self) -> None:
        """Take no more jobs, and hand over the running ones."""
        if not self.left:
            self.left = True
            self._do("leave", self._leave())

    async def park(self) -> None:
        """Give one running job back to its queue."""
        running = next(iter(self.running.values()), None)
        if running is not None and "park" not in self._tasks and not self.left:
            self._do("park", self._park(running))

    async def take_parked(self) -> None:
        """Take one parked job."""
        self._fill("take parked", self._take_parked)

    async def run(self) -> None:
        """Do everything that is left to do, without a fault."""
        await self.gate.network.calm()
        for _ in range(3000):
            if not self.gate.waiting:
                return
            await self.gate.let_through()
        raise AssertionError(f"{self.name} never comes to rest")

    async def die(self) -> None:
        """Kill the process: it sends nothing more. What it has sent before may still arrive."""
        self.gate.close()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._lifecycle.aclose()
        await self._batcher.aclose()
        for redis in self._clients:
            await redis.aclose()
        await self._upstream.aclose()

    def _fill(self, what: str, take: Callable[[], Awaitable[list[Delivery]]]) -> None:
        if what not in self._tasks and not self.left:
            self._do(what, self._take(take))

    async def _take(self, take: Callable[[], Awaitable[list[Delivery]]]) -> None:
        sent = self._world.clock
        for delivery in await take():
            if (running := self.running.get(delivery.id)) is not None:
                running.renewed = sent
                continue
            stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
            self.running[delivery.id] = Running(delivery, stop, sent)
            self._do(delivery.id, self._work(self.running[delivery.id]))

    async def _work(self, running: Running) -> None:
        try:
            await run_job(self._services, running.delivery, running.stop)
        finally:
            del self.running[running.delivery.id]

    async def _claim_abandoned(self) -> list[Delivery]:
        abandoned = self._abandoned
        await abandoned.hand_over_lost(DEFAULT_QUEUE, set(self.running))
        others = abandoned.others(await abandoned.consumers(DEFAULT_QUEUE))
        for name in (HANDED_OVER, *others):
            jobs = await abandoned.list_claimable(DEFAULT_QUEUE, name, 1)
            if claimed := await abandoned.claim(DEFAULT_QUEUE, name, jobs):
                return claimed
        return []

    async def _take_parked(self) -> list[Delivery]:
        for line in await self._parked.lines(DEFAULT_QUEUE):
            if taken := await self._parked.take(line, 1):
                return taken
        return []

    async def _keep(self) -> None:
        jobs, sent = list(self.running.values()), self._world.clock
        try:
            if jobs:
                kept = await self._jobs.renew_leases([(running.delivery, sent - running.renewed) for running in jobs])
                refused = [running for running, is_ours in zip(jobs, kept, strict=True) if is_ours is False]
                for running, is_ours in zip(jobs, kept, strict=True):
                    if is_ours is True:
                        running.renewed = sent
                idle_times = await self._jobs.idle_times([running.delivery for running in refused])
                for running, idle in zip(refused, idle_times, strict=True):
                    if idle is None:
                        self._stop(running, Stop.LEASE_LOST)
                    else:
                        running.renewed = self._world.clock - idle
            await self._jobs.trim(DEFAULT_QUEUE)
        finally:
            self._publisher.verify_all()

    async def _park(self, running: Running) -> None:
        self._stop(running, Stop.HAND_OVER)
        await asyncio.gather(self._tasks[running.delivery.id], return_exceptions=True)
        if running.stop.result() is Stop.HAND_OVER:
            await self._parked.park([ParkedJob(running.delivery, "tenant", "model", _now() + 10**9)])

    async def _leave(self) -> None:
        jobs = list(self.running.values())
        for running in jobs:
            self._stop(running, Stop.HAND_OVER)
        await asyncio.gather(*(self._tasks[running.delivery.id] for running in jobs), return_exceptions=True)
        for running in jobs:
            if running.stop.result() is Stop.HAND_OVER:
                await self._jobs.hand_over([running.delivery])

    def _stop(self, running: Running, reason: Stop) -> None:
        if not running.stop.done():
            running.stop.set_result(reason)

    def _do(self, what: str, work: Coroutine[object, object, None]) -> None:
        self._tasks[what] = asyncio.create_task(self._guarded(what, work))

    async def _guarded(self, what: str, work: Coroutine[object, object, None]) -> None:
        """Survive what a real worker survives: a passing fault of Redis, a lost log, and a stop. The job comes back."""
        try:
            await work
        except (LogLost, Stopped):  # as in `RunningJobs`
            pass
        except (RedisError, OSError) as error:
            if not is_transient(error):
                self._world.faults.append(f"{self.name}: {what}: {error!r}")
        except Exception as error:  # noqa: BLE001 - reported by the state machine, which sees no task
            self._world.faults.append(f"{self.name}: {what}: {error!r}")
        finally:
            del self._tasks[what]


class _Vllm(Transport):
    """Answers with `max_tokens` tokens, the same to the same request, each when the gate lets it through.

    It goes on after the token ids that it is given, as vLLM does. The prompt is one token, the answer's are counted.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/tokenize"
        if await self._gate.fate() is not Fate.FINE:
            return httpx.Response(503)
        return httpx.Response(200, json={"count": 1, "max_model_len": 4096, "tokens": _PROMPT})

    async def post(self, target: Target, content: bytes, connect_limit: float) -> HttpResponse:  # noqa: ARG002 - all is one server
        if await self._gate.fate() is not Fate.FINE:
            raise httpx.ReadError("broken")
        body = json.loads(content)
        given = body.get("kv_transfer_params", {}).get("prompt_token_ids", _PROMPT)
        kept = len(given) - len(_PROMPT)
        tokens = tokens_of(body["messages"][0]["content"], kept + body["max_tokens"])
        events = _Tokens(self._gate, given, list(enumerate(tokens, 1))[kept:])
        return HttpResponse(200, [(b"content-type", b"text/event-stream")], cast("ResponseBody", events))


class _Tokens:
    def __init__(self, gate: Gate, given: list[int], tokens: list[tuple[int, str]]) -> None:
        self._gate = gate
        self._given = given
        self._tokens = tokens
        self._events = self._sent()

    async def read_into(self, into: Callable[[bytes], bool]) -> bool:
        async for event in self._events:
            if into(event):
                return True
        return False

    async def aclose(self) -> None:
        """Nothing to close: there is no connection."""

    async def _sent(self) -> AsyncIterator[bytes]:
        head = {"id": "c", "model": "m", "created": 1}
        for place, token in self._tokens:
            last = (place, token) == self._tokens[-1]
            choice = {
                "index": 0, "delta": {"content": token}, "finish_reason": "stop" if last else None, "token_ids": [place]
            }  # fmt: skip
            if await self._gate.fate() is not Fate.FINE:
                raise httpx.ReadError("broken")
            first = {"prompt_token_ids": self._given} if (place, token) == self._tokens[0] else {}
            yield b"data: " + json.dumps({**head, **first, "choices": [choice]}).encode() + b"\n\n"
        if await self._gate.fate() is not Fate.FINE:
            raise httpx.ReadError("broken")
        yield b"data: [DONE]\n\n"


def tokens_of(name: str, count: int) -> list[str]:
    """The answer of the model."""
    return [f"{name}.{place} " for place in range(count)]


def _now() -> int:
    return int(time.time() * 1000)

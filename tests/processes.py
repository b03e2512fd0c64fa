"""The broker side of a worker process, for tests in which several processes share the log of the request `r`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias, cast

from redis.asyncio import Redis

from worker.broker.abandoned_jobs import AbandonedJobs
from worker.broker.acquisition import Acquired
from worker.broker.consumers import HANDED_OVER
from worker.broker.flush_pace import FlushPace
from worker.broker.job_queue import Delivery, JobQueue
from worker.broker.log_writer import LogWriter
from worker.broker.ownership import LogOwnership
from worker.broker.publisher import Publisher
from worker.contract.entries import Done, Failed
from worker.contract.ids import SEAL
from worker.contract.keys import Keys
from worker.contract.records import Tombstone
from worker.redisio.batching import CommandBatcher
from worker.redisio.clients import blocking_client, command_client
from worker.redisio.pipelined import PipelinedConnection
from worker.telemetry.events import Telemetry
from worker.telemetry.logging import LogReceiver

KEY = "chat:tokens:{r}"
FAR = 4_000_000_000_000
STONE = Tombstone(outcome="done", time=1)

Connections: TypeAlias = type[PipelinedConnection]


class Process:
    """The broker side of one worker process."""

    def __init__(self, url: str, name: str, telemetry: Telemetry, pace: FlushPace, connections: Connections) -> None:
        self.name = name
        self.commands = command_client(url)
        self.blocking = blocking_client(url, 1)
        self.jobs = JobQueue(self.commands, self.blocking, Keys(), name, lease=10)
        self.abandoned = AbandonedJobs(self.commands, Keys(), name, lease=10)
        publishing = command_client(url, connections=1)
        self.publisher = Publisher(publishing, telemetry, pace, connection_type=connections)
        self.use(CommandBatcher(self.commands))

    def use(self, batcher: CommandBatcher) -> None:
        """Use this batcher for the ownership of logs from now on."""
        self.batcher = batcher
        self.owner = LogOwnership(
            batcher, Keys(), self.jobs, self.publisher, worker=self.name, nonce=f"nonce-{self.name}", now=lambda: 1
        )

    async def claim(self) -> Delivery:
        (delivery,) = await self.jobs.read_new("default", 1, 500)
        return delivery

    async def acquire(self, delivery: Delivery) -> LogWriter:
        taken = await self.owner.acquire("r", delivery, FAR)
        assert isinstance(taken, Acquired)
        self.publisher.attach(taken.log)
        return taken.log

    async def seal(self, log: LogWriter, outcome: str = "done") -> str:
        end = Done(id=SEAL, attempt=log.attempt) if outcome == "done" else Failed(id=SEAL, code=outcome)
        job = Delivery("default", "1-1", {})  # nothing but the log is sealed
        standing, is_settled = await self.owner.seal(log, job, end, STONE, retention=60, remember=120)
        assert not is_settled
        return standing.type


@asynccontextmanager
async def process(
    url: str, name: str, *, telemetry: Telemetry | None = None, pace: FlushPace | None = None,
    connections: Connections = PipelinedConnection,
) -> AsyncIterator[Process]:  # fmt: skip
    """A process whose publisher runs. `connections` is the class of the publisher's connections."""
    it = Process(url, name, telemetry or LogReceiver(), pace or FlushPace(), connections)
    writing = asyncio.create_task(it.publisher.run())
    try:
        yield it
    finally:
        it.publisher.stop()
        await writing
        await it.publisher.aclose()
        await it.commands.aclose()
        await it.blocking.aclose()


async def deliver(process: Process, redis: Redis) -> Delivery:
    await process.jobs.ensure_group("default")
    await redis.xadd("chat:jobs", {"id": "r"})
    return await process.claim()


async def stolen(redis: Redis, two: Process, delivery: Delivery) -> Delivery:
    """Let the lease of a job of process `one` run out, and another process claim the job."""
    await redis.xclaim("chat:jobs", "workers", "one", 0, [delivery.id], idle=11_000, justid=True)
    (taken,) = await claim_expired(two.abandoned)
    return taken


async def claim_expired(abandoned: AbandonedJobs, count: int = 10) -> list[Delivery]:
    """Take over jobs of all other consumers, and jobs that this one has lost, as a sweep does."""
    await abandoned.hand_over_lost("default", ())
    taken: list[Delivery] = []
    for name in (HANDED_OVER, *abandoned.others(await abandoned.consumers("default"))):
        claimed: list[Delivery] = []
        while not claimed and (jobs := await abandoned.list_claimable("default", name, count)):
            claimed = await abandoned.claim("default", name, jobs)
        taken += claimed
    return taken


async def texts(redis: Redis) -> list[str]:
    entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", await redis.xrange(KEY))
    return [f"{i.decode()}:{f.get(b'content', f[b'type']).decode()}" for i, f in entries]


def delta(text: str) -> dict[str, str]:
    return {"type": "delta", "content": text}

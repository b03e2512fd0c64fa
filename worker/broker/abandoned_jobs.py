"""Jobs that workers have handed over, or whose lease has expired: finds them by their consumers, and claims them.

Only consumers that were silent for a lease have expired leases, apart from jobs that a live worker has lost. So the
pending list of the whole group is not searched: with 10,000 running jobs that took 15 % of a core of Redis.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from redis.asyncio import Redis

from ..contract.keys import GROUP, Keys
from .claims import PendingJob, claim, list_pending
from .consumers import (
    HANDED_OVER,
    HANDED_OVER_IDLE,
    LEAST_HANDED_OVER,
    ConsumerState,
    consumers_of,
    idle_times,
    is_pseudo_consumer,
)
from .job_queue import Delivery

_MOST_LOST = 100
"""The most jobs that are handed over at once because this worker has lost them."""


class AbandonedJobs:
    """One worker's access to the jobs that others have abandoned. `consumer` is its name; `lease` is in seconds."""

    def __init__(self, commands: Redis, keys: Keys, consumer: str, lease: float) -> None:
        self._commands = commands
        self._keys = keys
        self._consumer = consumer
        self._lease_ms = int(lease * 1000)

    async def consumers(self, queue: str) -> list[ConsumerState]:
        """The consumers of a queue that have pending jobs."""
        return await consumers_of(self._commands, self._keys.jobs(queue))

    def own(self, consumers: Collection[ConsumerState]) -> ConsumerState | None:
        """The consumer of this worker."""
        return next((consumer for consumer in consumers if consumer.name == self._consumer), None)

    def others(self, consumers: Collection[ConsumerState]) -> list[str]:
        """The names of other workers."""
        return [
            consumer.name
            for consumer in consumers
            if consumer.name != self._consumer and not is_pseudo_consumer(consumer.name)
        ]

    async def idle_times(self, queue: str) -> dict[str, float]:
        """The seconds since each consumer of a queue last got or renewed a job."""
        return {name: ms / 1000 for name, ms in (await idle_times(self._commands, self._keys.jobs(queue))).items()}

    async def list_claimable(self, queue: str, consumer: str, count: int) -> list[PendingJob]:
        """Up to `count` jobs of a consumer that may be claimed: handed-over ones, or those with an expired lease."""
        return await list_pending(
            self._commands, self._keys.jobs(queue), consumer, idle=self._least_idle(consumer), count=count
        )

    async def claim(self, queue: str, consumer: str, jobs: Sequence[PendingJob]) -> list[Delivery]:
        """Claim listed jobs of a consumer that still may be claimed."""
        key, is_handed_over = self._keys.jobs(queue), consumer == HANDED_OVER
        claimed = await claim(self._commands, key, queue, self._consumer, jobs, idle=self._least_idle(consumer))
        since = HANDED_OVER_IDLE if is_handed_over else 0
        return [
            replace(delivery, left_for=max(0, job.idle - since) / 1000, handed_over=is_handed_over)
            for delivery, job in claimed
        ]

    async def hand_over_lost(self, queue: str, running: Collection[str]) -> int:
        """Hand over this worker's own jobs that do not run here and whose lease has expired. Returns their number.

        The reply that delivered such a job was lost, or the part of the process that ran the job has failed. This
        counts as a delivery.
        """
        key = self._keys.jobs(queue)
        # Of the running jobs, any may have an expired lease.
        pending = await list_pending(
            self._commands, key, self._consumer, idle=self._lease_ms, count=len(running) + _MOST_LOST
        )
        lost = [job.id for job in pending if job.id not in running]
        if not lost:
            return 0
        handed_over = await self._commands.xclaim(
            key, GROUP, HANDED_OVER, self._lease_ms, lost,  # type: ignore[arg-type]  # list is invariant
            idle=HANDED_OVER_IDLE + self._lease_ms, justid=True,
        )  # fmt: skip
        return len(handed_over)

    def _least_idle(self, consumer: str) -> int:
        return LEAST_HANDED_OVER if consumer == HANDED_OVER else self._lease_ms

"""The consumers of a group: workers, and pseudo-consumers, which hold the pending jobs that no worker has.

A worker that cannot continue a job moves the job's entry in the group's pending list to a pseudo-consumer, from which
any worker takes the entry. The pseudo-consumers are `handed-over`, for jobs that should continue at once, and
`waiting:<bucket>:<model>`, a line of parked jobs for each model and each bucket of tenants. Jobs that were begun before
they had to wait are in lines of their own: their bucket is `!<n>`, after `n` tries at servers.

The idle times of entries of pseudo-consumers are longer than that of any job with an owner. So XCLAIM with such a
minimum takes an entry only if no other worker has taken it yet. Workers of earlier versions take these entries as jobs
whose lease has expired.
"""

from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..contract.keys import GROUP

HANDED_OVER = "handed-over"
"""The pseudo-consumer of jobs that should continue at once."""

HANDED_OVER_IDLE = 10**11
"""The idle time in ms that a job gets when it is handed over (3 years). What is more is the time without an owner."""

LEAST_HANDED_OVER = HANDED_OVER_IDLE // 2
"""The least idle time of a job that was handed over and not taken yet, even after Redis's clock was set back."""

DEADLINE_IDLE = 10**12
"""The idle time in ms (31 years) that a parked job has at its deadline. Until then it has less."""

LEAST_PARKED = DEADLINE_IDLE // 2
"""The least idle time of a parked job that was not taken yet."""

LONGEST_WAIT = DEADLINE_IDLE // 4
"""The longest time in ms (7 years) to or since its deadline that the idle time of a parked job expresses."""

WAITING = "waiting:"
"""The prefix of the pseudo-consumers that are lines of parked jobs."""


@dataclass(frozen=True, slots=True)
class ConsumerState:
    """A consumer of a queue's group, and how many jobs are pending with it."""

    name: str
    pending: int


def is_line(consumer: str) -> bool:
    """Whether a consumer is a line of parked jobs. The names of workers have no colon."""
    return consumer.startswith(WAITING)


def is_pseudo_consumer(consumer: str) -> bool:
    """Whether a consumer holds jobs that no worker has."""
    return consumer == HANDED_OVER or is_line(consumer)


async def consumers_of(redis: Redis, key: str) -> list[ConsumerState]:
    """The consumers of a job stream that have pending jobs; none if there is no stream or no group.

    All workers list them twice a second. XPENDING costs Redis half as much as XINFO CONSUMERS.

    A name that is not UTF-8 is not of a worker. It is decoded with replacements, and no command finds its jobs.
    """
    try:
        reply = await redis.xpending(key, GROUP)
    except ResponseError as error:
        if not str(error).startswith("NOGROUP"):
            raise
        return []
    return [ConsumerState(_decoded(consumer["name"]), int(consumer["pending"])) for consumer in reply["consumers"]]


async def consumers_by_xinfo(redis: Redis, key: str) -> list[ConsumerState]:
    """The result of `consumers_of`, by XINFO CONSUMERS: clients have no right to XPENDING."""
    return [
        ConsumerState(_decoded(reply["name"]), int(reply["pending"]))
        for reply in await _xinfo_consumers(redis, key)
        if reply["pending"]
    ]


async def idle_times(redis: Redis, key: str) -> dict[str, int]:
    """The ms since each consumer of a job stream last got or renewed a job; empty if there is no stream or no group."""
    replies = await _xinfo_consumers(redis, key)
    # Before Redis 7.2, only deliveries and successful claims end a consumer's idle time. Since then reads that find
    # nothing end it too, and `inactive` is what `idle` was before.
    return {_decoded(reply["name"]): max(int(reply["idle"]), int(reply.get("inactive", 0))) for reply in replies}


async def _xinfo_consumers(redis: Redis, key: str) -> list[dict[str, Any]]:
    try:
        return await redis.xinfo_consumers(key, GROUP)
    except ResponseError as error:
        if not str(error).startswith("NOGROUP") and "no such key" not in str(error):
            raise
        return []


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "replace")

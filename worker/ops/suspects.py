"""Jobs that may kill their workers: pending jobs that were delivered again and again, and those that were buried."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ..broker.consumers import is_pseudo_consumer
from ..contract.keys import GROUP
from ..engine.poison import SUSPECT_FROM, WITHOUT_PROGRESS
from ..redisio.scripts import Script
from .findings import Finding
from .survey_types import Suspect
from .units import duration

_SEARCHED = 500
"""How many pending jobs of a queue are looked at, the oldest first: a job that comes again and again is old."""

_BURIED_FOR = 600.0
"""Seconds for which a buried poison job is shown as a fault."""

_REQUEST_IDS = Script("""
local ids = {}
for at, job in ipairs(ARGV) do
  ids[at] = ''
  local found = call('XRANGE', KEYS[1], job, job)[1]
  for field = 1, found and #found[2] or 0, 2 do
    if found[2][field] == 'id' then ids[at] = found[2][field + 1] end
  end
end
return ids
""")
"""The request ids of jobs, without their prompts. ARGV: the ids of the jobs' entries."""


async def find_suspects(redis: Redis, key: str) -> list[Suspect]:
    """The jobs of a queue with a worker that were delivered three times or more, as far as they are searched.

    A hand-over and parking are no deliveries.
    """
    try:
        replies = cast("list[dict[str, Any]]", await redis.xpending_range(key, GROUP, "-", "+", _SEARCHED))
    except ResponseError as error:
        if not str(error).startswith("NOGROUP"):
            raise
        return []
    found = [
        (reply["message_id"].decode(), reply["consumer"].decode("utf-8", "replace"), int(reply["times_delivered"]))
        for reply in replies
        if int(reply["times_delivered"]) >= SUSPECT_FROM
    ]
    found = [one for one in found if not is_pseudo_consumer(one[1])]
    if not found:
        return []
    ids = await request_ids(redis, key, [job for job, _, _ in found])
    return [
        Suspect(job=job, request=request_id, worker=worker, deliveries=deliveries)
        for (job, worker, deliveries), request_id in zip(found, ids, strict=True)
    ]


async def request_ids(redis: Redis, key: str, jobs: Sequence[str]) -> list[str]:
    """The request ids of jobs of a queue; empty for a job that is not there, or has none."""
    ids = cast("list[bytes]", await _REQUEST_IDS.run_on(redis, [key], jobs))
    return [raw.decode("utf-8", "replace") for raw in ids]


def poison_findings(queue: str, suspects: Iterable[Suspect]) -> list[Finding]:
    """A finding for each job of a queue that may be poison."""
    return [
        Finding(
            "warning",
            f"queue {queue}",
            f"job {one.job} (request {one.request or 'without a valid id'}) was delivered {one.deliveries} times: its "
            "workers died or lost it, and it may have killed them",
            f"worker explain {one.request} has its attempts; worker cancel {one.request} ends it"
            if one.request
            else "it is buried after some deliveries more (worker dead list)",
            "poison_job",
        )
        for one in suspects
    ]


def buried_poison_finding(letters: Iterable[tuple[int, str]], now: float) -> list[Finding]:
    """A finding if a poison job was buried lately. `letters` are times in Unix ms and reasons, `now` is in seconds."""
    lately = [time for time, reason in letters if WITHOUT_PROGRESS in reason and now - time / 1000 < _BURIED_FOR]
    if not lately:
        return []
    message = f"a job was buried that may have killed its workers; the newest {duration(now - lately[0] / 1000)} ago"
    fix = "worker dead list and worker dead show have it: do not retry it before its cause is known"
    return [Finding("warning", "dead letters", message, fix, "poison_job", lately[0])]

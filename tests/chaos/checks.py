"""The promise, checked on what Redis holds and nothing else: every test of a failure ends with it.

It reads the log by the contract's own rules, without the reader that the product has: what both got wrong would
otherwise look right.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from conftest import Entries, eventually, stream
from redis.asyncio import Redis

from worker.contract.ids import SEAL, EntryId
from worker.contract.keys import GROUP
from worker.sandbox.simulator.answers import END, encode
from worker.sandbox.simulator.requests import answer_to

QUESTION = "What do the river and the sea say to one another in the night?"
"""A question whose answer has some forty tokens, each a delta with text."""


def ask(content: str = QUESTION, **more: object) -> dict[str, object]:
    """A request. Its field `simulate` is the scenario that the simulated vLLM follows."""
    return {"model": "reciter", "messages": [{"role": "user", "content": content}], **more}


def expected(content: str = QUESTION) -> str:
    """What the simulated vLLM answers."""
    return answer_to(ask(content)["messages"])


@dataclass(frozen=True, slots=True)
class Line:
    """An entry of a log as Redis holds it, read as text."""

    id: EntryId
    fields: Mapping[str, str]

    @property
    def type(self) -> str:
        return self.fields["type"]


@dataclass(frozen=True, slots=True)
class Story:
    """What became of a request: its whole log, and what a reader has of it at the end."""

    log: list[Line]
    text: str
    token_ids: list[int]

    @property
    def attempts(self) -> int:
        return max(line.id.attempt for line in self.log if line.id != SEAL)

    @property
    def end(self) -> Line:
        return self.log[-1]


async def log_of(redis: Redis, request_id: str) -> list[Line]:
    """The log as it is now."""
    return [
        Line(EntryId.parse(where), {name.decode(): value.decode() for name, value in fields.items()})
        for where, fields in await stream(redis, f"chat:tokens:{{{request_id}}}")
    ]


async def has_begun(redis: Redis, request_id: str, deltas: int = 5, attempt: int = 1) -> None:
    """Wait until an attempt has written so many deltas."""

    async def begun() -> bool:
        lines = await log_of(redis, request_id)
        return sum(line.type == "delta" and line.id.attempt == attempt for line in lines) >= deltas

    await eventually(begun, within=30)


async def pending(redis: Redis) -> list[tuple[str, str]]:
    """Every unfinished job: its entry id, and the consumer that has it; none while it is unread."""
    (group,) = await redis.xinfo_groups("chat:jobs")
    delivered = EntryId.parse(cast("bytes", group["last-delivered-id"]))
    taken = await redis.xpending_range("chat:jobs", GROUP, "-", "+", 10_000)
    unread = [where for where, _ in await stream(redis, "chat:jobs") if EntryId.parse(where) > delivered]
    return [
        *((cast("bytes", line["message_id"]).decode(), cast("bytes", line["consumer"]).decode()) for line in taken),
        *((where.decode(), "") for where in unread),
    ]


async def promise_kept(
    redis: Redis, request_id: str, text: str | None = None, *, outcome: str = "done", within: float = 30
) -> Story:
    """Wait for the end of a request, and assert that the promise was kept for it, with this text.

    Args:
        redis: the Redis itself, not a proxy before it.
        request_id: whose log.
        text: the whole answer; that to QUESTION when left out.
        outcome: the type of its terminal entry.
        within: seconds until a test that hangs fails.
    """

    async def settled() -> bool:
        # In this order: before a job is done there may be no group, as after a FLUSHALL.
        return await redis.exists(f"chat:ended:{{{request_id}}}") == 1 and not await pending(redis)

    await eventually(settled, within)
    story = read(await log_of(redis, request_id))
    assert story.end.type == outcome, story.end.fields
    whole = expected() if text is None else text
    if outcome == "done":
        assert story.text == whole
        usage = json.loads(story.end.fields["usage"])
        assert story.token_ids == [*encode(whole), END], "each token once and in order"
        assert usage["completion_tokens"] == len(story.token_ids)
    else:
        assert whole.startswith(story.text)
    await _is_told_once(redis, request_id, story)
    for key in (f"chat:tokens:{{{request_id}}}", f"chat:ended:{{{request_id}}}"):
        assert await redis.ttl(key) > 0, f"{key} must expire"
    assert json.loads(await redis.get(f"chat:ended:{{{request_id}}}") or b"{}")["outcome"] == outcome
    return story


def read(log: list[Line]) -> Story:
    """Read an ended log by the rules of the contract, and assert that it follows them."""
    _is_in_order(log)
    kept: list[Line] = []
    begun = False  # whether the attempt has resumed or restarted the text of former ones
    for line in log:
        match line.type:
            case "started" | "claimed":
                begun = not kept
            case "restarted":
                kept.clear()
                begun = True
            case "resumed":
                after = EntryId.parse(line.fields["after"])
                assert not any("content" in old.fields for old in kept if old.id > after), "no text may be dropped"
                kept = [old for old in kept if old.id <= after]
                begun = True
            case "delta":
                assert begun, f"{line.id} adds to a text that was neither resumed nor restarted"
                kept.append(line)
    return Story(
        log,
        "".join(line.fields.get("content", "") for line in kept),
        [number for line in kept for number in json.loads(line.fields.get("token_ids", "[]"))],
    )


def _is_in_order(log: list[Line]) -> None:
    """One seal, at the end; every attempt begins with its claim and has consecutive ids."""
    assert [line.id == SEAL for line in log] == [False] * (len(log) - 1) + [True]
    assert log[-1].type in {"done", "error", "cancelled"}
    ids = [line.id for line in log[:-1]]
    if ids and ids[0] == EntryId(0, 1):
        ids = ids[1:]
    attempts = sorted({where.attempt for where in ids})
    assert attempts == list(range(1, len(attempts) + 1))
    assert ids == [EntryId(attempt, n) for attempt in attempts for n in range(sum(i.attempt == attempt for i in ids))]
    for line in log[:-1]:
        assert (line.id.n == 0) == (line.type in {"started", "claimed"}), line
        assert line.type not in {"restarted", "resumed"} or line.id.n == 1, line


async def _is_told_once(redis: Redis, request_id: str, story: Story) -> None:
    lines = [fields for _, fields in await stream(redis, "chat:lifecycle") if fields[b"id"] == request_id.encode()]
    told = {(fields[b"type"], fields[b"attempt"]) for fields in lines}
    ends = [fields for fields in lines if fields[b"type"] == b"finished"]
    assert len({attempt for kind, attempt in told if kind == b"finished"}) == 1, "one end, once repeated lines are gone"
    assert {end[b"outcome"] for end in ends} == {story.end.type.encode()}
    if "usage" in story.end.fields:
        usage = json.loads(story.end.fields["usage"])
        assert [json.loads(end[b"usage"]) for end in ends] == [usage] * len(ends)


async def begun_by_a_dead_worker(redis: Redis, request_id: str, *log: dict[str, str]) -> str:
    """Have the next job be begun by a worker that died thereafter, its lease over; gives the job's entry id.

    `log` are the entries after `started`.
    """
    await _make_group(redis)
    reply = cast("list[tuple[bytes, Entries]]", await redis.xreadgroup(GROUP, "dead", {"chat:jobs": ">"}, count=1))
    job = reply[0][1][0][0].decode()
    begun = {"type": "started", "v": "1", "queue": "default", "job": job, "worker": "dead", "owner": "d", "time": "1"}
    key = f"chat:tokens:{{{request_id}}}"
    for n, fields in enumerate((begun, *log)):
        await redis.xadd(key, fields, id=f"1-{n}")  # type: ignore[arg-type]  # dict is invariant
    await redis.expire(key, 600)
    await redis.xclaim("chat:jobs", GROUP, "dead", 0, [job], idle=10**8, justid=True)
    return job


async def _make_group(redis: Redis) -> None:
    if not await redis.exists("chat:jobs") or not await redis.xinfo_groups("chat:jobs"):
        await redis.xgroup_create("chat:jobs", GROUP, id="0", mkstream=True)

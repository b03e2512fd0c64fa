"""Checks the promise from the contents of Redis alone. Every test of a failure ends with this check.

It reads the log by the contract's rules with code of its own: an error in the product's reader would otherwise hide the
same error in its writer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from conftest import Entries, stream
from redis.asyncio import Redis
from waits import eventually

from worker.broker.consumers import HANDED_OVER, HANDED_OVER_IDLE
from worker.contract.ids import SEAL, EntryId
from worker.contract.keys import GROUP
from worker.sandbox.simulator.answers import END, encode
from worker.sandbox.simulator.requests import answer_to

QUESTION = "What do the river and the sea say to one another in the night?"
"""A question whose answer has some forty tokens, each a delta with text."""


def chat_request(content: str = QUESTION, **more: object) -> dict[str, object]:
    """A request. Its field `simulate` is the scenario that the simulated vLLM follows."""
    return {"model": "reciter", "messages": [{"role": "user", "content": content}], **more}


def expected(content: str = QUESTION) -> str:
    """The answer of the simulated vLLM."""
    return answer_to(chat_request(content)["messages"])


@dataclass(frozen=True, slots=True)
class LogEntry:
    """An entry of a log as Redis holds it, decoded as text."""

    id: EntryId
    fields: Mapping[str, str]

    @property
    def type(self) -> str:
        return self.fields["type"]


@dataclass(frozen=True, slots=True)
class EndedLog:
    """The log of a request that has ended, and the answer that a reader has at the end."""

    log: list[LogEntry]
    text: str
    token_ids: list[int]

    @property
    def attempts(self) -> int:
        return max(entry.id.attempt for entry in self.log if entry.id != SEAL)

    @property
    def end(self) -> LogEntry:
        return self.log[-1]


async def log_of(redis: Redis, request_id: str) -> list[LogEntry]:
    """The present entries of a log."""
    return [
        LogEntry(EntryId.parse(where), {name.decode(): value.decode() for name, value in fields.items()})
        for where, fields in await stream(redis, f"chat:tokens:{{{request_id}}}")
    ]


async def has_begun(redis: Redis, request_id: str, deltas: int = 5, attempt: int = 1) -> None:
    """Wait until an attempt has written so many deltas."""

    async def begun() -> bool:
        entries = await log_of(redis, request_id)
        return sum(entry.type == "delta" and entry.id.attempt == attempt for entry in entries) >= deltas

    await eventually(begun)


async def pending(redis: Redis) -> list[tuple[str, str]]:
    """Every unfinished job: its entry id and its consumer, or no consumer while the job is unread."""
    (group,) = await redis.xinfo_groups("chat:jobs")
    delivered = EntryId.parse(cast("bytes", group["last-delivered-id"]))
    taken = await redis.xpending_range("chat:jobs", GROUP, "-", "+", 10_000)
    unread = [where for where, _ in await stream(redis, "chat:jobs") if EntryId.parse(where) > delivered]
    return [
        *((cast("bytes", entry["message_id"]).decode(), cast("bytes", entry["consumer"]).decode()) for entry in taken),
        *((where.decode(), "") for where in unread),
    ]


async def promise_kept(
    redis: Redis, request_id: str, text: str | None = None, *, outcome: str = "done", within: float = 120
) -> EndedLog:
    """Wait for the end of a request, and assert that the promise was kept for it, with this text.

    Args:
        redis: the Redis itself, not a proxy before it.
        request_id: the request.
        text: the whole answer; the answer to QUESTION if left out.
        outcome: the type of the terminal entry.
        within: seconds until a test that hangs fails.
    """

    async def settled() -> bool:
        # In this order: before the job has ended there may be no group, as after a FLUSHALL. A job that somebody
        # removed from the group is not pending, though its worker still settles it.
        return (
            await redis.exists(f"chat:ended:{{{request_id}}}") == 1
            and not await pending(redis)
            and bool(await _ends_in_the_lifecycle(redis, request_id))
        )

    await eventually(settled, within)
    ended = read(await log_of(redis, request_id))
    assert ended.end.type == outcome, ended.end.fields
    whole = expected() if text is None else text
    if outcome == "done":
        assert ended.text == whole
        usage = json.loads(ended.end.fields["usage"])
        assert ended.token_ids == [*encode(whole), END], "each token once and in order"
        assert usage["completion_tokens"] == len(ended.token_ids)
    else:
        assert whole.startswith(ended.text)
    await _has_one_end_in_the_lifecycle(redis, request_id, ended)
    for key in (f"chat:tokens:{{{request_id}}}", f"chat:ended:{{{request_id}}}"):
        assert await redis.ttl(key) > 0, f"{key} must expire"
    assert json.loads(await redis.get(f"chat:ended:{{{request_id}}}") or b"{}")["outcome"] == outcome
    return ended


def read(log: list[LogEntry]) -> EndedLog:
    """Read the log of a request that has ended by the rules of the contract, and assert that it follows them."""
    _is_in_order(log)
    kept: list[LogEntry] = []
    begun = False  # whether the attempt has resumed or restarted the text of former attempts
    for entry in log:
        match entry.type:
            case "started" | "claimed":
                begun = not kept
            case "restarted":
                kept.clear()
                begun = True
            case "resumed":
                after = EntryId.parse(entry.fields["after"])
                assert not any("content" in old.fields for old in kept if old.id > after), "no text may be dropped"
                kept = [old for old in kept if old.id <= after]
                begun = True
            case "delta":
                assert begun, f"{entry.id} adds to a text that was neither resumed nor restarted"
                kept.append(entry)
    return EndedLog(
        log,
        "".join(entry.fields.get("content", "") for entry in kept),
        [number for entry in kept for number in json.loads(entry.fields.get("token_ids", "[]"))],
    )


def _is_in_order(log: list[LogEntry]) -> None:
    """One seal, at the end; every attempt begins with its claim and has consecutive ids."""
    assert [entry.id == SEAL for entry in log] == [False] * (len(log) - 1) + [True]
    assert log[-1].type in {"done", "error", "cancelled"}
    ids = [entry.id for entry in log[:-1]]
    if ids and ids[0] == EntryId(0, 1):
        ids = ids[1:]
    attempts = sorted({where.attempt for where in ids})
    assert attempts == list(range(1, len(attempts) + 1))
    assert ids == [EntryId(attempt, n) for attempt in attempts for n in range(sum(i.attempt == attempt for i in ids))]
    for entry in log[:-1]:
        assert (entry.id.n == 0) == (entry.type in {"started", "claimed"}), entry
        assert entry.type not in {"restarted", "resumed"} or entry.id.n == 1, entry


async def _ends_in_the_lifecycle(redis: Redis, request_id: str) -> list[dict[bytes, bytes]]:
    entries = [fields for _, fields in await stream(redis, "chat:lifecycle")]
    return [fields for fields in entries if (fields[b"id"], fields[b"type"]) == (request_id.encode(), b"finished")]


async def _has_one_end_in_the_lifecycle(redis: Redis, request_id: str, ended: EndedLog) -> None:
    ends = await _ends_in_the_lifecycle(redis, request_id)
    assert len({end[b"attempt"] for end in ends}) == 1, "one end, apart from repeated entries"
    assert {end[b"outcome"] for end in ends} == {ended.end.type.encode()}
    if "usage" in ended.end.fields:
        usage = json.loads(ended.end.fields["usage"])
        assert [json.loads(end[b"usage"]) for end in ends] == [usage] * len(ends)


async def begun_by_a_dead_worker(redis: Redis, request_id: str, *log: dict[str, str]) -> str:
    """Begin the next job as a worker that then died, and end its lease. Returns the job's entry id.

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
    await redis.xclaim("chat:jobs", GROUP, HANDED_OVER, 0, [job], idle=HANDED_OVER_IDLE, justid=True)
    return job


async def _make_group(redis: Redis) -> None:
    if not await redis.exists("chat:jobs") or not await redis.xinfo_groups("chat:jobs"):
        await redis.xgroup_create("chat:jobs", GROUP, id="0", mkstream=True)

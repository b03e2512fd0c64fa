"""A Redis user without some rights: what works all the same, and what the check reports."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from acl import PASSWORD, acl
from conftest import StartWorker
from redis.asyncio import Redis
from redis.exceptions import ExecAbortError
from waits import eventually

from worker import Client
from worker.ops.checks import check
from worker.ops.findings import Finding
from worker.redisio.clients import command_client
from worker.redisio.errors import is_permission_denied, is_transient
from worker.sandbox.embedded_redis import EmbeddedRedis, start_redis
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator
from worker.telemetry.logging import configure_logging

REQUEST = {"messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.fixture
async def user_url(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The URL of a user that may use every command and key of ours, and no channel."""
    await redis.acl_setuser(
        "mute", enabled=True, passwords="+pw", keys=["chat:*"], categories=["+@all"], reset_channels=True
    )
    yield redis_url.replace("//", "//mute:pw@")
    await redis.acl_deluser("mute")


async def test_without_rights_to_channels_answers_are_complete_and_cancels_work(
    user_url: str, start_worker: StartWorker, simulator: Simulator, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json", "warning")
    await start_worker(simulator, redis_url=user_url)
    async with Client(user_url) as client:
        for _ in range(3):
            answer = await client.result(await client.enqueue(REQUEST))
            assert answer.text == answer_to(REQUEST["messages"])
        assert (await client.cancel("never")).state.value == "unknown"
        assert (await client.status("never")).outcome == "cancelled"
        logged = ""

        async def both_are_reported() -> bool:
            nonlocal logged
            logged += capfd.readouterr().err
            return "feed_refused" in logged and "cancel_hints_refused" in logged

        await eventually(both_are_reported)
    assert logged.count("feed_refused") == logged.count("cancel_hints_refused") == 1


async def change(redis: Redis, *words: str) -> None:
    """Add rights to a user, or remove some."""
    await redis.execute_command("ACL SETUSER", *words)  # type: ignore[no-untyped-call]  # so in redis-py 8.1


@pytest.fixture
async def worker_url(redis: Redis, redis_url: str) -> AsyncIterator[str]:
    """The URL of the user `worker` of deploy/redis/users.acl."""
    await change(redis, *acl("worker"))
    yield redis_url.replace("//", f"//worker:{PASSWORD}@")
    await redis.acl_deluser("worker")


async def findings(url: str, simulator: Simulator, **settings: object) -> list[Finding]:
    return [it async for it in check({"redis_url": url, "vllm_urls": simulator.url, **settings})]


async def test_with_the_documented_rights_the_check_finds_nothing(worker_url: str, simulator: Simulator) -> None:
    found = await findings(worker_url, simulator)
    assert [it.message for it in found if it.level != "ok"] == [
        "the append-only file is off: a restart of Redis loses waiting jobs and logs"
    ]


NOTHING = "no job can be done: the user lacks the rights "
RIGHTS: list[tuple[list[str], str, str, str]] = [
    # a change of the worker's rights; the level of the finding, how its message begins, and its fix
    *[
        ([f"-{name}"], "error", f"{NOTHING}+{name}", f"ACL SETUSER <user> +{name}")
        for name in (
            "eval",
            "evalsha",
            "exec",
            "exists",
            "expire",
            "multi",
            "pexpireat",
            "set",
            "time",
            "xack",
            "xadd",
            "xclaim",
            "xgroup",
            "xpending",
            "xrange",
            "xreadgroup",
            "xrevrange",
        )
    ],
    (["-exec", "-xadd"], "error", f"{NOTHING}+xadd +exec", "ACL SETUSER <user> +xadd +exec"),
    (["-publish"], "warning", "the feed is silent", "ACL SETUSER <user> +publish"),
    (["-subscribe"], "warning", "a cancel takes effect within two thirds of a lease", "ACL SETUSER <user> +subscribe"),
    (["-hset"], "warning", "neither this check nor the other workers see", "ACL SETUSER <user> +hset"),
    (["-hgetall"], "warning", "neither this check nor the other workers see", "ACL SETUSER <user> +hgetall"),
    (["-xtrim"], "warning", "the job streams are not trimmed", "ACL SETUSER <user> +xtrim"),
    (["-memory"], "warning", "the memory of the lifecycle is only", "ACL SETUSER <user> +memory|usage"),
    (["-hincrby"], "warning", "nobody knows how many entries", "ACL SETUSER <user> +hincrby"),
    (["-xlen"], "error", f"{NOTHING}+xlen", "ACL SETUSER <user> +xlen"),
    (["-info"], "warning", "version, memory and storage of Redis are not checked", "ACL SETUSER <user> +info"),
    (["resetchannels"], "warning", "the feed is silent", "ACL SETUSER <user> &chat:feed:*"),
    (["resetkeys"], "error", f"{NOTHING}~chat:tokens:* ~chat:ended:* ~chat:jobs*", "ACL SETUSER <user> ~chat:tokens:*"),
    (
        ["resetkeys", "~chat:jobs*", "~chat:ended:*", "~chat:[lpdw]*"],
        "error",
        f"{NOTHING}~chat:tokens:*",
        "ACL SETUSER <user> ~chat:tokens:*",
    ),
    (
        ["resetkeys", "~chat:jobs*", "~chat:tokens:*", "~chat:[lpdw]*"],
        "error",
        f"{NOTHING}~chat:ended:*",
        "ACL SETUSER <user> ~chat:ended:*",
    ),
    (
        ["resetkeys", "~chat:jobs*", "~chat:tokens:*", "~chat:ended:*", "~chat:[ldw]*"],
        "warning",
        "jobs are taken while Redis takes no writes",
        "ACL SETUSER <user> ~chat:probe",
    ),
    (
        ["resetkeys", "~chat:jobs*", "~chat:tokens:*", "~chat:ended:*", "~chat:[pdw]*"],
        "warning",
        "the lifecycle is not written",
        "ACL SETUSER <user> ~chat:lifecycle",
    ),
]


@pytest.mark.parametrize(("changed", "level", "begins", "fix"), RIGHTS, ids=[" ".join(row[0]) for row in RIGHTS])
async def test_a_missing_right_is_found_with_the_command_that_gives_it(
    changed: list[str], level: str, begins: str, fix: str, redis: Redis, worker_url: str, simulator: Simulator
) -> None:
    await change(redis, "worker", *changed)
    found = [it for it in await findings(worker_url, simulator) if "append-only" not in it.message]
    finding = next(it for it in found if it.level != "ok")
    assert finding.level == level
    assert finding.message.startswith(begins)
    assert finding.fix.startswith(fix)
    assert [it.level for it in found].count("error") == (level == "error")
    assert [it for it in found if it.subject.startswith("vLLM")]


async def test_the_check_changes_nothing(redis: Redis, worker_url: str, simulator: Simulator) -> None:
    for key in ("chat:jobs", "chat:lifecycle", "chat:dead"):
        await redis.xadd(key, {"id": "r"})
    await redis.xgroup_create("chat:jobs", "workers", id="0")
    await redis.hset("chat:workers", "w", "{}")
    before = await everything(redis)
    await findings(worker_url, simulator)
    assert await everything(redis) == before


async def everything(redis: Redis) -> dict[str, object]:
    keys = sorted(cast("list[bytes]", await redis.keys()))
    held = {key.decode(): await redis.dump(key.decode()) for key in keys}
    return held | {"groups": await redis.xinfo_stream("chat:jobs", full=True)}


RENAMED: list[tuple[str, str, str]] = [
    ("TYPE", "ok", ""),
    ("INFO", "warning", "version, memory and storage of Redis are not checked: Redis does not know INFO"),
    ("HSET", "warning", "neither this check nor the other workers see this worker: Redis does not know HSET"),
    ("EVALSHA", "error", "no job can be done: Redis does not know EVALSHA"),
    ("EXEC", "error", "no job can be done: Redis does not know EXEC"),
    ("XCLAIM", "error", "no job can be done: Redis does not know XCLAIM"),
]


@pytest.mark.parametrize(("command", "level", "words"), RENAMED)
async def test_a_renamed_command_is_reported_as_renamed(
    command: str, level: str, words: str, redis_server: EmbeddedRedis, simulator: Simulator
) -> None:
    assert redis_server.process is not None
    binary = Path(str(cast("list[object]", redis_server.process.args)[0]))
    with start_redis(binary, "--rename-command", command, "hidden") as renamed:
        found = [it for it in await findings(renamed.url, simulator) if "append-only" not in it.message]
    assert [it.level for it in found].count("error") == (level == "error")
    problems = [it for it in found if it.level != "ok"]
    assert [(it.level, it.message) for it in problems] == ([(level, f"{words}: renamed or disabled")] if words else [])
    assert all("rename-command" in it.fix and "start Redis" not in it.fix for it in problems)


@pytest.mark.parametrize(
    ("key", "without"),
    [("lifecycle", "the lifecycle is not written"), ("dead", "jobs that should be"), ("workers", "neither this check")],
)
async def test_a_key_of_another_type_in_place_of_a_side_record_is_a_warning(
    key: str, without: str, redis: Redis, redis_url: str, simulator: Simulator
) -> None:
    await redis.set(f"chat:{key}", "something else", ex=60)
    (finding,) = [
        it for it in await findings(redis_url, simulator) if it.level != "ok" and "append-only" not in it.message
    ]
    assert finding.level == "warning"
    assert finding.message.startswith(without)
    assert finding.message.endswith(f"other data is stored at chat:{key}")


async def test_a_transaction_refused_for_a_missing_right_is_not_a_transient_error(
    redis: Redis, worker_url: str
) -> None:
    await change(redis, "worker", "-exec")
    async with command_client(worker_url) as worker, worker.client() as connection:
        await connection.execute_command("MULTI")  # type: ignore[no-untyped-call]
        with pytest.raises(ExecAbortError) as refusal:
            await connection.execute_command("EXEC")  # type: ignore[no-untyped-call]
    assert is_permission_denied(refusal.value)
    assert not is_transient(refusal.value)

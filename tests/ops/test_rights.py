"""A Redis user without some rights: what works all the same, and what the check reports."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest
from acl import ROLES, acl
from click.testing import CliRunner
from conftest import StartWorker
from redis.asyncio import Redis
from redis.exceptions import ExecAbortError
from waits import eventually

from worker import Claimed, Client, Delta, Entry
from worker.cli.main import main
from worker.ops.checks import check
from worker.ops.findings import Finding
from worker.ops.rights import Role, commands_of
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
    logged = capfd.readouterr().err
    assert logged.count("feed_refused") == logged.count("cancel_hints_refused") == 1


async def change(redis: Redis, *words: str) -> None:
    """Add rights to a user, or remove some."""
    await redis.execute_command("ACL SETUSER", *words)  # type: ignore[no-untyped-call]  # so in redis-py 8.1


@pytest.fixture
async def users(redis: Redis, redis_url: str) -> AsyncIterator[dict[Role, str]]:
    """The URLs of the users that deploy/README.md defines for workers and clients."""
    for role in ROLES:
        await change(redis, *acl(role))
    await redis.acl_log_reset()
    yield {role: redis_url.replace("//", f"//{role}:PASSWORD@") for role in ROLES}
    await redis.acl_deluser(*ROLES)


async def findings(url: str, simulator: Simulator, **settings: object) -> list[Finding]:
    return [it async for it in check({"redis_url": url, "vllm_urls": simulator.url, **settings})]


@pytest.mark.parametrize("role", ROLES)
def test_the_documented_rights_are_those_that_the_check_tries(role: Role) -> None:
    rights = [f"+{command}" for command in commands_of(role)]
    assert acl(role)[acl(role).index("-@all") + 1 :] == rights


async def test_with_the_documented_rights_nothing_is_refused(
    redis: Redis, users: dict[Role, str], start_worker: StartWorker, simulator: Simulator
) -> None:
    """Run jobs of every kind from start to end, and everything that goes on beside them."""
    first = await start_worker(simulator, redis_url=users["worker"], lease=1)
    async with Client(users["client"], queue_limit=100) as client:
        for request in (REQUEST, REQUEST | {"simulate": {"fault": "cut", "after": 3, "times": 1}}):
            request_id = await client.enqueue(request)
            assert (await client.result(request_id)).text == answer_to(REQUEST["messages"])
            assert await client.enqueue(request, id=request_id) == request_id
            job = {"id": request_id, "request": json.dumps(request)}
            await redis.xadd("chat:jobs", job)  # type: ignore[arg-type]  # dict is invariant
        await redis.xadd("chat:jobs", {"id": "bad", "request": "{}"})
        stays = await client.enqueue(REQUEST | {"simulate": {"fault": "stall", "after": 3}})
        await reached(client, stays, Delta)
        second = await start_worker(simulator, redis_url=users["worker"], lease=1)
        first.stop()
        first.stop()  # at once: the other worker takes the job over
        await reached(client, stays, Claimed)
        await client.cancel(stays)
        assert (await client.result(stays)).outcome == "cancelled"

    async def acknowledged() -> bool:
        (group,) = await redis.xinfo_groups("chat:jobs")
        return not group["pending"] and group["last-delivered-id"] == (await newest(redis, "chat:jobs"))

    async def left() -> bool:
        return not await redis.hlen("chat:workers")

    await eventually(acknowledged)
    second.stop()
    await eventually(left)
    command = CliRunner(env={"REDIS_URL": users["client"]})
    for words in (["dead", "list"], ["dead", "drop", "--all", "--yes"]):
        assert (await asyncio.to_thread(command.invoke, main, words)).exit_code == 0
    refused = {str(entry["object"]) for entry in await redis.acl_log()}
    assert {each for each in refused if not each.startswith("client")} == set()  # how redis-py introduces itself


async def test_with_the_documented_rights_the_check_finds_nothing(users: dict[Role, str], simulator: Simulator) -> None:
    found = await findings(users["worker"], simulator)
    assert [it.message for it in found if it.level != "ok"] == [
        "the append-only file is off: a restart of Redis loses waiting jobs and logs"
    ]


async def reached(client: Client, request_id: str, kind: type[Entry]) -> None:
    """Follow a request up to an entry of a type."""
    async with aclosing(client.follow(request_id)) as entries:
        async for entry in entries:
            if isinstance(entry, kind):
                return
    raise AssertionError(f"{request_id} has ended")


async def newest(redis: Redis, key: str) -> bytes:
    return bytes((await redis.xinfo_stream(key))["last-generated-id"])


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
    changed: list[str], level: str, begins: str, fix: str, redis: Redis, users: dict[Role, str], simulator: Simulator
) -> None:
    await change(redis, "worker", *changed)
    found = [it for it in await findings(users["worker"], simulator) if "append-only" not in it.message]
    finding = next(it for it in found if it.level != "ok")
    assert finding.level == level
    assert finding.message.startswith(begins)
    assert finding.fix.startswith(fix)
    assert [it.level for it in found].count("error") == (level == "error")
    assert [it for it in found if it.subject.startswith("vLLM")]


async def test_rights_that_only_a_client_needs_are_no_error(users: dict[Role, str], simulator: Simulator) -> None:
    (finding,) = [it for it in await findings(users["worker"], simulator) if "a client" in it.message]
    assert (finding.level, finding.fix) == ("ok", "")
    assert finding.message.endswith(": +xread +xdel +unsubscribe")


async def test_the_check_changes_nothing(redis: Redis, users: dict[Role, str], simulator: Simulator) -> None:
    for key in ("chat:jobs", "chat:lifecycle", "chat:dead"):
        await redis.xadd(key, {"id": "r"})
    await redis.xgroup_create("chat:jobs", "workers", id="0")
    await redis.hset("chat:workers", "w", "{}")
    before = await everything(redis)
    await findings(users["worker"], simulator)
    await findings(users["client"], simulator)
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
    redis: Redis, users: dict[Role, str]
) -> None:
    await change(redis, "worker", "-exec")
    async with command_client(users["worker"]) as worker, worker.client() as connection:
        await connection.execute_command("MULTI")  # type: ignore[no-untyped-call]
        with pytest.raises(ExecAbortError) as refusal:
            await connection.execute_command("EXEC")  # type: ignore[no-untyped-call]
    assert is_permission_denied(refusal.value)
    assert not is_transient(refusal.value)

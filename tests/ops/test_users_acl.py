"""The users of deploy/redis/users.acl: each does all its work with its rights, and needs each of these rights."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httpx
import pytest
from acl import ROLES, file_with_passwords, rights, setuser, without
from click.testing import CliRunner
from conftest import StartWorker
from gateway_fixtures import KEY_A, StartGateway
from redis.asyncio import Redis
from redis_usage import Command, RedisUsage
from waits import eventually
from written_log import let_deadline_pass

from worker import Claimed, Client, Delta, Entry
from worker.broker.lifecycle_group import LifecycleGroup
from worker.broker.lifecycle_retention import LifecycleTrimmer
from worker.cli.main import main
from worker.contract.entries import to_json
from worker.contract.keys import Keys
from worker.contract.records import DeadLetter, WorkerRecord
from worker.gateway.keys import hash_of
from worker.ops.checks import check
from worker.redisio.clients import command_client
from worker.sandbox.embedded_redis import start_redis, version_of
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator
from worker.top.installation import Installation

MESSAGES = [{"role": "user", "content": "Who are you?"}]
REQUEST = {"messages": MESSAGES}
KEYS = (
    f'[[keys]]\nname = "a"\nhash = "{hash_of(KEY_A)}"\nin_flight = 3\nqueued = 3\nrequests_per_minute = 100\n'
)  # fmt: skip
HEADERS = {"Authorization": f"Bearer {KEY_A}"}
SCALING = ("INFO", "XLEN chat:jobs", "XPENDING chat:jobs workers", "XINFO GROUPS chat:jobs", "PING")
"""The commands of KEDA's scaler for Redis Streams, whose settings are the stream, the group and a number."""

SELDOM_USED = {
    "worker": {"+exists", "+info", "+ping"},
    "reader": {"+time"},
    "gateway": {"+ping", "+ttl", "+xread"},
    "operator": {"+acl|log", "+memory|usage", "+ping", "+pttl", "+pubsub|numsub", "+unsubscribe", "+xread"},
}
"""Rights for what the test does not wait for: the search for the end of a job that was added twice, the INFO of
`worker check`, a PING on a silent subscription, the clock of Redis when a deadline seems to have passed, the end of a
request whose deadline has passed, reads of the log while there is no feed, the end of a subscription, the forecast of
memory from more requests than the test has, and the connections of workers that are silent. MONITOR does not show ACL
LOG."""


def is_old(redis_binary: Path) -> bool:
    """Whether it is a Redis 6.2, without %R~ and ACL DRYRUN."""
    return version_of(redis_binary).startswith("6.")


@dataclass(frozen=True, slots=True)
class GuardedRedis:
    """A Redis that has loaded the file. `url` is for its administrator."""

    url: str
    passwords: dict[str, str]


@pytest.fixture
def guarded_redis(redis_binary: Path, tmp_path: Path) -> Iterator[GuardedRedis]:
    file, passwords = file_with_passwords(tmp_path, is_old=is_old(redis_binary))
    options = "--aclfile", str(file), "--protected-mode", "no"  # which knows no address of this machine but 127.0.0.1
    with start_redis(redis_binary, *options) as server:
        yield GuardedRedis(server.url, passwords)


@pytest.fixture
async def admin(guarded_redis: GuardedRedis) -> AsyncIterator[Redis]:
    async with Redis.from_url(guarded_redis.url, protocol=2) as client:
        yield client


@pytest.fixture
async def usage(guarded_redis: GuardedRedis) -> AsyncIterator[RedisUsage]:
    """Relays for all users. They end after the workers and gateways that use them."""
    usage = RedisUsage(ROLES)
    async with usage.relays(urlsplit(guarded_redis.url).port or 0):
        yield usage


@pytest.fixture
def urls(guarded_redis: GuardedRedis, usage: RedisUsage) -> dict[str, str]:
    """The URL of each user's relay."""
    ports = usage.ports.items()
    return {user: f"redis://{user}:{guarded_redis.passwords[user]}@127.0.0.1:{port}/0" for user, port in ports}


async def test_every_user_does_all_its_work_and_needs_every_right(
    admin: Redis,
    urls: dict[str, str],
    usage: RedisUsage,
    start_worker: StartWorker,
    start_gateway: StartGateway,
    simulator: Simulator,
    http: httpx.AsyncClient,
    redis_binary: Path,
) -> None:
    await use_the_gateway(urls, start_gateway, start_worker, simulator, http)
    await admin.script_flush()  # so that the producer, too, needs EVAL
    await use_workers_and_clients(urls, admin, start_worker, simulator)
    await operate(urls["operator"], admin, simulator)
    await trim_the_lifecycle(urls["worker"], admin)
    await read_the_lifecycle(urls["logger"], admin)
    async with command_client(urls["scaler"]) as scaler:
        for words in SCALING:
            await scaler.execute_command(*words.split())  # type: ignore[no-untyped-call]  # so in redis-py 8.1
    await usage.finish(admin)
    assert await refused(admin) == set()
    for user in () if is_old(redis_binary) else ROLES:
        assert set(await needless(admin, user, usage)) <= SELDOM_USED.get(user, set()), user


async def test_the_check_tries_the_rights_of_a_worker(
    admin: Redis, urls: dict[str, str], usage: RedisUsage, simulator: Simulator, redis_binary: Path
) -> None:
    found = [it async for it in check({"redis_url": urls["worker"], "vllm_urls": simulator.url})]
    assert [it.message for it in found if it.level != "ok" and "append-only" not in it.message] == []
    await usage.finish(admin)
    assert await refused(admin) == {"scan", "smembers", "zrange"}, "queues and gateways are searched for by operators"
    # SADD is tried in a transaction that Redis discards, so that MONITOR does not show it.
    assert is_old(redis_binary) or await needless(admin, "worker", usage) == ["~chat:queues", "+sadd"]


async def refused(admin: Redis) -> set[str]:
    """What Redis has refused, by its ACL LOG."""
    return {str(entry["object"]) for entry in await admin.acl_log()}


async def needless(admin: Redis, user: str, usage: RedisUsage) -> list[str]:
    """The rights without which Redis would have refused nothing of what a user has sent.

    Of the right to a key it suffices that the user may not write there.
    """
    sent = list({_shape(command): command for command in usage.sent[user]}.values())
    found = []
    for right in rights(user):
        lesser = [right.replace("~", "%R~", 1)] if right.startswith("~") else []
        await admin.execute_command("ACL SETUSER", *setuser("lesser", [*without(user, right), *lesser]))  # type: ignore[no-untyped-call]
        pipe = admin.pipeline(transaction=False)
        for command in sent:
            pipe.execute_command("ACL DRYRUN", "lesser", *command)
        if all(reply == b"OK" for reply in await pipe.execute()):
            found.append(right)
    return found


def _shape(command: Command) -> Command:
    """What Redis looks at to decide on a command: its name and its subcommand, keys and channels."""
    return (command[0].lower(), *command[1:2], *(word.partition(b"{")[0] for word in command if word[:5] == b"chat:"))


async def use_the_gateway(
    urls: dict[str, str],
    start_gateway: StartGateway,
    start_worker: StartWorker,
    simulator: Simulator,
    http: httpx.AsyncClient,
) -> None:
    """Add requests up to a limit, follow them, complete chats with a retry each, list and cancel."""
    served = await start_gateway(redis_url=urls["gateway"], keys=KEYS, queue_limit=100)
    http.headers.update(HEADERS)

    async def add(**more: object) -> httpx.Response:
        return await http.post(f"{served.url}/requests", json=REQUEST | more)

    ids = [(await add()).json()["id"] for _ in range(3)]
    assert (await add()).status_code == 429, "at the limit the state of others is read"
    waits = f"{served.url}/requests/{ids[0]}"
    assert (await http.get(waits)).json()["state"] == "queued"
    assert (await http.get(f"{served.url}/requests")).status_code == 200
    assert (await http.delete(f"{served.url}/requests/{ids.pop()}")).json()["state"] == "ended"
    worker = await start_worker(simulator, redis_url=urls["worker"])
    for request_id in ids:
        events = (await http.get(f"{served.url}/requests/{request_id}/events")).text
        assert '"type":"done"' in events

    async def is_admitted() -> bool:
        return (await http.post(f"{served.url}/v1/chat/completions", json=chat)).status_code == 200

    chat = {"model": "reciter", "messages": MESSAGES}
    await eventually(is_admitted)  # a full tenant is refused for a moment without another look
    for more in ({}, {"stream": True}):
        for retry in ("0", "1"):
            response = await http.post(
                f"{served.url}/v1/chat/completions", json=chat | more, headers={"x-stainless-retry-count": retry}
            )
            assert response.status_code == 200, response.text
    assert answer_to(MESSAGES) in (await http.get(waits)).text
    assert (await http.get(f"{served.url}/v1/models")).status_code == 200
    for_operators = await start_gateway(redis_url=urls["gateway"])  # without keys everybody sees what runs
    assert (await http.get(f"{for_operators.url}/requests")).status_code == 200
    stalls = f"{served.url}/requests/{(await add(simulate={'fault': 'stall', 'after': 3})).json()['id']}"

    async def is_running() -> bool:
        return bool((await http.get(stalls)).json()["state"] == "running")

    await eventually(is_running)
    assert (await add()).status_code < 300, "the limit of the queue counts parked jobs"
    assert (await http.delete(stalls)).status_code < 300
    worker.stop()


async def use_workers_and_clients(
    urls: dict[str, str], admin: Redis, start_worker: StartWorker, simulator: Simulator
) -> None:
    """Run jobs of every kind from start to end, with a hand-over, a burial and a cancel, and follow them."""
    first = await start_worker(simulator, redis_url=urls["worker"], lease=1)
    async with Client(urls["producer"], queue_limit=100) as client, Client(urls["reader"]) as reader:
        late = await client.enqueue(REQUEST, queue="new", timeout=0.01)
        assert await admin.xinfo_groups("chat:jobs:new")
        await admin.delete("chat:jobs:new")
        await let_deadline_pass(admin, late)
        assert (await client.status(late)).outcome == "error", "the client ends what no worker has begun"
        for request in (REQUEST, REQUEST | {"simulate": {"fault": "cut", "after": 3, "times": 1}}):
            request_id = await client.enqueue(request)
            assert (await reader.result(request_id)).text == answer_to(MESSAGES)
            assert (await client.result(request_id)).text == answer_to(MESSAGES)
            assert (await reader.status(request_id)).outcome == "done"
            assert await client.enqueue(request, id=request_id) == request_id
            job = {"id": request_id, "request": json.dumps(request)}
            await admin.xadd("chat:jobs", job)  # type: ignore[arg-type]  # dict is invariant
        for _ in range(2):
            await admin.xadd("chat:jobs", {"id": "bad", "request": "{}"})
        stays = await client.enqueue(REQUEST | {"simulate": {"fault": "stall", "after": 3}})
        await reached(reader, stays, Delta)
        second = await start_worker(simulator, redis_url=urls["worker"], lease=1)
        first.stop()
        first.stop()  # at once: the other worker takes the job over
        await reached(reader, stays, Claimed)
        await client.cancel(stays)
        assert (await reader.result(stays)).outcome == "cancelled"
        assert await client.is_served()
        async with aclosing(reader.lifecycle()) as records:
            assert (await anext(records)).type == "started"
        await client.ping()
        await reader.ping()

    async def is_settled() -> bool:
        (group,) = await admin.xinfo_groups("chat:jobs")
        newest = (await admin.xinfo_stream("chat:jobs"))["last-generated-id"]
        return not group["pending"] and group["last-delivered-id"] == newest

    async def has_left() -> bool:
        return not await admin.hlen("chat:workers")

    async def is_resumed() -> bool:
        return not await admin.exists("chat:control")

    await eventually(is_settled)
    await admin.hset("chat:control", "pause:default", '{"until": 1}')  # the worker removes what has ended
    await eventually(is_resumed)
    second.stop()
    await eventually(has_left)


async def trim_the_lifecycle(url: str, admin: Redis) -> None:
    """Remove records that a group has not read, as a worker does when the lifecycle is too large."""
    await admin.xgroup_create("chat:lifecycle", "behind", "0")
    async with command_client(url) as redis:
        await LifecycleTrimmer(redis, Keys(), length=0, max_bytes=1).trim()
    assert await admin.hget(Keys().lifecycle_losses, "behind")


async def read_the_lifecycle(url: str, admin: Redis) -> None:
    """Read as consumers of a group do that end with records which they have not acknowledged, and report a loss."""
    await admin.xadd("chat:lifecycle", {"type": "finished"})
    async with Client(url) as client, command_client(url) as redis:
        await client.ping()
        one, two, three = (LifecycleGroup(redis, Keys(), "log", name) for name in ("one", "two", "three"))
        assert not await one.read(0.01), "it creates the group"
        assert len(await one.read(1)) == 1
        await one.leave()
        (record,) = await two.read(1)
        await admin.xtrim("chat:lifecycle", maxlen=0)
        await two.leave()
        await two.acknowledge([record])
        assert not await three.read(0.01)
        assert three.lost == 1
        await three.losses_reported()


async def operate(url: str, admin: Redis, simulator: Simulator) -> None:
    """Check, look at the status, cancel a request, end an overdue one, and put back and drop dead letters."""
    command = CliRunner(env={"REDIS_URL": url, "VLLM_URLS": simulator.url})

    async def run(*words: str) -> str:
        result = await asyncio.to_thread(command.invoke, main, words)
        assert result.exit_code == 0, result.output
        return result.output

    assert (await run("check")).count("warning") == 1  # the append-only file is off
    assert "not readable" not in await run("status")
    await run("cancel", "never")
    async with Installation(url, "chat", lease=15) as installation:
        assert (await installation.read()).unreadable is None
        async with aclosing(installation.client.follow("never")) as entries:
            assert [entry.type async for entry in entries] == ["cancelled"]
        overdue = await installation.client.enqueue(REQUEST, queue="none", timeout=0.01)
        await let_deadline_pass(admin, overdue)
        async with aclosing(installation.client.follow(overdue)) as entries:
            assert [entry.type async for entry in entries] == ["queued", "error"]
    await run("pause", "none", "--for", "1h")
    await run("resume", "none")
    record = WorkerRecord(name="w", beat=1, started=1, slots=1, running=0, finished=0, queues=("default",))
    await admin.hset("chat:workers", "w", to_json(record))
    await run("drain", "w")
    await admin.delete("chat:workers", "chat:control")
    job = {"request": json.dumps(REQUEST)}
    fields = DeadLetter(reason="for a retry", queue="default", job="1-0", time=1, fields=job).to_fields()
    letter = cast("bytes", await admin.xadd("chat:dead", fields)).decode()  # type: ignore[arg-type]  # dict is invariant
    assert "for a retry" in await run("dead", "show", letter)
    await run("dead", "retry", letter)
    assert "bad" in await run("dead", "list")
    await run("dead", "drop", "--all", "--yes")


async def reached(client: Client, request_id: str, kind: type[Entry]) -> None:
    """Follow a request up to an entry of a type."""
    async with aclosing(client.follow(request_id)) as entries:
        async for entry in entries:
            if isinstance(entry, kind):
                return
    raise AssertionError(f"{request_id} has ended")

"""The service on Redis under Sentinel, with real servers that fail over."""

import asyncio
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import topology
from acl import PASSWORD, acl
from conftest import StartSimulator, StartWorker
from redis.exceptions import ConnectionError as RedisConnectionError
from topology import MEDDLING, chat_request, expected, settled, whole
from waits import eventually

from worker import Client, Delta, Entry
from worker.ops.checks import check
from worker.redisio.clients import command_client
from worker.redisio.errors import is_transient
from worker.sandbox.simulator.server import Options, Scenario, Simulator


@pytest.fixture
def guarded(redis_binary: Path, tmp_path: Path) -> Iterator[tuple[str, list[topology.Node]]]:
    """A master, its replica and a sentinel, which is not the first that the URL names."""
    with topology.sentinel(redis_binary, tmp_path) as (master, replica, watcher):
        watcher.execute("SENTINEL MONITOR", "former", "127.0.0.1", replica.port, 1)
        yield f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watcher.port}/mymaster/1", [master, replica, watcher]


async def test_the_master_is_found_by_its_name(guarded: tuple[str, list[topology.Node]]) -> None:
    url, (master, _, watcher) = guarded
    before = watcher.client.info("stats")["total_connections_received"]
    async with command_client(url) as redis:
        await redis.set("k", "v")
        # More at once than there are connections: commands wait for one.
        assert await asyncio.gather(*(redis.get("k") for _ in range(200))) == [b"v"] * 200
    assert watcher.client.info("stats")["total_connections_received"] < before + 10, "connections share a query"
    keyspace = master.client.info("keyspace")
    assert {name: database["keys"] for name, database in keyspace.items()} == {"db1": 1}


async def test_connection_options_in_the_url_change_nothing_under_sentinel(
    guarded: tuple[str, list[topology.Node]],
) -> None:
    async with command_client(guarded[0] + MEDDLING) as redis:
        assert sorted(await asyncio.gather(*(redis.incr("n") for _ in range(100)))) == list(range(1, 101))
        assert await redis.getdel("n") == b"100"


@pytest.mark.parametrize("place", ["theirs", "ours"])
async def test_sentinels_with_a_password_get_the_urls_or_their_own(
    place: str, guarded: tuple[str, list[topology.Node]]
) -> None:
    url, (master, _, watcher) = guarded
    watcher.execute("ACL SETUSER default resetpass >guard/pw")
    if place == "theirs":
        given = url + "?sentinel_password=guard%2Fpw"
    else:
        master.execute("ACL SETUSER default resetpass >guard/pw")
        given = url.replace("://", "://:guard%2Fpw@")
    async with command_client(given) as redis:
        assert await asyncio.gather(*(redis.set("k", "v") for _ in range(20))) == [True] * 20


@pytest.mark.parametrize(
    ("password", "words"),
    [("", "NOAUTH"), ("://:other@", "WRONGPASS"), ("?sentinel_password=other", "WRONGPASS")],
)
async def test_a_refusal_by_sentinels_is_reported(
    password: str, words: str, guarded: tuple[str, list[topology.Node]], simulator: Simulator
) -> None:
    url, (_, _, watcher) = guarded
    watcher.execute("ACL SETUSER default resetpass >guard")
    given = url.replace("://", password) if "@" in password else url + password
    async with command_client(given) as redis:
        with pytest.raises(RedisConnectionError, match=f"^no sentinel names the master 'mymaster': {words} "):
            await redis.get("k")
    (error,) = [it async for it in check({"redis_url": given, "vllm_urls": simulator.url}) if it.level == "error"]
    assert words in error.message
    assert error.fix.startswith("put the password of the sentinels into REDIS_URL: ")
    assert "guard" not in str(error)


async def test_the_documented_rights_suffice_under_sentinel(
    guarded: tuple[str, list[topology.Node]], start_worker: StartWorker, simulator: Simulator
) -> None:
    url, (master, _, watcher) = guarded
    roles = "worker", "client"
    watcher.execute("ACL", "SETUSER", "watch", "on", f">{PASSWORD}", "+sentinel|masters")
    url += f"?sentinel_username=watch&sentinel_password={PASSWORD}"
    for role in roles:
        master.execute("ACL", "SETUSER", *acl(role), "+role", "+select")  # the URL names database 1
    urls = {role: url.replace("://", f"://{role}:{PASSWORD}@") for role in roles}
    await start_worker(simulator, redis_url=urls["worker"])
    async with Client(urls["client"]) as client:
        answer = await client.result(await client.enqueue(chat_request("Who are you?")))
    assert answer.text == expected("Who are you?")
    assert [str(entry["object"]) for node in (master, watcher) for entry in node.client.acl_log()] == []


async def test_a_former_master_is_not_taken_for_the_master(
    guarded: tuple[str, list[topology.Node]],
) -> None:
    """Its data is old: a log that is read there seems to have lost its end."""
    url, (_, replica, _) = guarded
    async with command_client(url.replace("mymaster", "former")) as redis:
        with pytest.raises(RedisConnectionError, match=f"{replica.port} is no longer the master") as refusal:
            await redis.get("k")
    assert is_transient(refusal.value)


async def test_streams_continue_when_the_master_is_killed(
    guarded: tuple[str, list[topology.Node]], start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    url, (master, replica, watcher) = guarded
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=40))), redis_url=url, lease=10)
    questions = [f"Tell me a story about {number}" for number in range(8)]
    begun: set[str] = set()
    async with Client(url, patience=20) as client:

        async def generate(question: str) -> Sequence[Entry]:
            entries = []
            async for entry in client.generate(chat_request(question)):
                entries.append(entry)
                if isinstance(entry, Delta) and entry.id == (1, 10):
                    begun.add(question)
                    if len(begun) == len(questions):  # a job that the replica does not have yet would be lost
                        await asyncio.to_thread(topology.catch_up, master, replica)
                        await asyncio.to_thread(topology.fail_over, master, watcher)
            return entries

        for question, entries in zip(questions, await asyncio.gather(*map(generate, questions)), strict=True):
            whole(entries, question)


@pytest.mark.parametrize("name", ["another", "mymaster"])
async def test_a_master_that_no_sentinel_knows_is_explained(
    name: str, guarded: tuple[str, list[topology.Node]]
) -> None:
    url = guarded[0].replace("mymaster", name) if name == "another" else f"redis+sentinel://127.0.0.1:1/{name}"
    words = (
        "no sentinel that answers knows a master 'another'" if name == "another" else "no sentinel answers: Error 111"
    )
    async with command_client(url) as redis:
        with pytest.raises(RedisConnectionError, match=f"^{words}") as refusal:
            await redis.get("k")
    assert is_transient(refusal.value)


@pytest.mark.parametrize("lost", ["newest", "all"])
async def test_entries_lost_in_a_failover_are_written_again_visibly(
    lost: str, guarded: tuple[str, list[topology.Node]], start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    url, (master, copy, watcher) = guarded
    await start_worker(await start_simulator(Options(scenario=Scenario(rate=30))), redis_url=url, lease=10)
    async with Client(url, patience=20) as client, command_client(url) as redis:
        await redis.xadd("chat:jobs", {"id": "r", "request": json.dumps(chat_request("Tell me a story"))})
        await eventually(lambda: redis.exists("chat:tokens:{r}"))
        entries = []
        async for entry in client.follow("r"):
            entries.append(entry)
            if entry.id == (1, 5):
                master.client.set("mark", 1, ex=60)
                assert master.client.wait(1, 5000) == 1, "the replica has everything up to the mark"
                copy.client.replicaof("NO", "ONE")
                if lost == "all":
                    copy.execute("SELECT", 1)
                    assert copy.client.delete("chat:tokens:{r}")
            if entry.id == (1, 15):
                topology.fail_over_to_an_older_copy(master, copy, watcher)
        again = [entry async for entry in client.follow("r")]
        await settled(redis)
    whole(entries, "Tell me a story")
    whole(again, "Tell me a story")
    assert [entry.type for entry in entries if entry.id.attempt == 2][:2] == ["claimed", "restarted"]
    assert [entry.type for entry in again if entry.id == (1, 0)] == ["started"]


async def test_a_job_is_kept_until_as_many_replicas_as_asked_for_have_its_end(
    guarded: tuple[str, list[topology.Node]], start_worker: StartWorker, simulator: Simulator
) -> None:
    url, (master, replica, _) = guarded

    async def pending() -> list[dict[str, object]]:
        async with command_client(url) as redis:
            return cast("list[dict[str, object]]", await redis.xpending_range("chat:jobs", "workers", "-", "+", 10))

    async def has_waited_twice() -> bool:
        return int(master.client.info("commandstats").get("cmdstat_wait", {}).get("calls", 0)) >= 2

    async def handed_over() -> bool:
        return [int(str(job["time_since_delivered"])) >= 60_000 for job in await pending()] == [True]

    async def done() -> bool:
        return not await pending()

    replica.process.send_signal(signal.SIGSTOP)
    try:
        first = await start_worker(simulator, redis_url=url, wait_replicas=1, lease=60, drain_timeout=0)
        async with Client(url, patience=20) as client:
            entries = [entry async for entry in client.generate(chat_request("Who are you?"))]
        whole(entries, "Who are you?")
        await eventually(has_waited_twice)
        assert len(await pending()) == 1
        first.stop()  # the worker does not wait for the replica
        await eventually(handed_over)
    finally:
        replica.process.send_signal(signal.SIGCONT)
    await start_worker(simulator, redis_url=url, wait_replicas=1, lease=60)
    await eventually(done)
    assert len(simulator.served) == 1

"""The same service on Redis under Sentinel and on a cluster: of real servers, which fail over."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import topology
from conftest import StartSimulator, StartWorker
from redis.exceptions import ConnectionError as RedisConnectionError

from worker import Answer, Client, Delta, Entry
from worker.broker.connection import command_client, is_transient
from worker.contract.ids import SEAL
from worker.sandbox.redis import EmbeddedRedis
from worker.sandbox.requests import answer_to
from worker.sandbox.simulator import Options, Orders


@pytest.fixture
def server(redis_server: EmbeddedRedis) -> Path:
    """The binary that all tests of this run use."""
    assert redis_server.process is not None
    binary = cast("list[object]", redis_server.process.args)[0]
    assert isinstance(binary, Path)
    return binary


def ask(content: str) -> dict[str, object]:
    return {"model": "reciter", "messages": [{"role": "user", "content": content}]}


def expected(content: str) -> str:
    return answer_to([{"role": "user", "content": content}])


def whole(entries: list[Entry], content: str) -> None:
    """One end, the right text, and ids without a gap within each attempt."""
    assert [entry.id for entry in entries].count(SEAL) == 1
    assert Answer(entries).text == expected(content)
    for attempt in {entry.id.attempt for entry in entries if 0 < entry.id.attempt < SEAL.attempt}:
        numbers = [entry.id.n for entry in entries if entry.id.attempt == attempt]
        assert numbers == list(range(len(numbers)))


# Sentinel


@pytest.fixture
def guarded(server: Path, tmp_path: Path) -> Iterator[tuple[str, list[topology.Node]]]:
    """A master, its replica and a sentinel, which is not the first that the URL names."""
    with topology.sentinel(server, tmp_path) as (master, replica, watcher):
        watcher.ask("SENTINEL MONITOR", "former", "127.0.0.1", replica.port, 1)
        yield f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watcher.port}/mymaster/1", [master, replica]


async def test_the_master_is_found_by_its_name(guarded: tuple[str, list[topology.Node]]) -> None:
    url, (master, _) = guarded
    async with command_client(url) as redis:
        await redis.set("k", "v")
        # More at once than there are connections: they wait.
        assert await asyncio.gather(*(redis.get("k") for _ in range(200))) == [b"v"] * 200
    assert master.client.info("keyspace") == {"db1": {"keys": 1, "expires": 0, "avg_ttl": 0}}


async def test_a_server_that_is_no_master_any_more_is_not_taken_for_one(
    guarded: tuple[str, list[topology.Node]],
) -> None:
    """Its data is old: a log read there would seem to have lost its end."""
    url, (_, replica) = guarded
    async with command_client(url.replace("mymaster", "former")) as redis:
        with pytest.raises(RedisConnectionError, match=f"{replica.port} is no master any more") as refusal:
            await redis.get("k")
    assert is_transient(refusal.value)


async def test_streams_go_on_when_the_master_is_killed(
    guarded: tuple[str, list[topology.Node]], start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    url, (master, _) = guarded
    await start_worker(await start_simulator(Options(orders=Orders(rate=40))), redis_url=url, lease=10)
    questions = [f"Tell me a story about {number}" for number in range(8)]
    async with Client(url, patience=20) as client:

        async def generate(question: str) -> list[Entry]:
            entries = []
            async for entry in client.generate(ask(question)):
                entries.append(entry)
                if question == questions[0] and isinstance(entry, Delta) and entry.id == (1, 10):
                    master.kill()
            return entries

        for question, entries in zip(questions, await asyncio.gather(*map(generate, questions)), strict=True):
            whole(entries, question)

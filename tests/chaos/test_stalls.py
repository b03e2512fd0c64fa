"""A Redis that stands still for longer than a lease: owners keep their jobs, and dead workers are still found.

The leases are short here. With those of production, it takes some minutes:

    STALL_LEASE=15 pytest -n 0 tests/chaos/test_stalls.py -k second_request
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import topology
from checks import EndedLog, chat_request, expected, has_begun, promise_kept
from conftest import StartProcess, StartSimulator, StartWorker
from proxy import Proxy
from redis.asyncio import Redis
from topology import Node, until
from waits import eventually

from worker import Client
from worker.engine.pace import Pace
from worker.redisio.clients import command_client
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator

LEASE = float(os.environ.get("STALL_LEASE", "4"))
"""Owners have half a lease to renew after a stall, which must be longer than a busy machine keeps them from running."""
STREAMS = 40
TOKENS = int(80 * LEASE)
MAY_BE_REPEATED = 4

PACE = Pace(longest_block=0.1, command_timeout=LEASE / 4)
"""Commands fail several times while Redis stands still, as they do with the real limit and leases of 15 s."""


@pytest.fixture
def stalling(redis_binary: Path, tmp_path: Path) -> Iterator[Node]:
    """A Redis of this test's own, which it may stop."""
    with topology.node(redis_binary, tmp_path) as node:
        yield node
        node.process.send_signal(signal.SIGCONT)


@pytest.fixture
async def admin(stalling: Node) -> AsyncIterator[Redis]:
    async with Redis.from_url(url_of(stalling), protocol=2) as redis:
        yield redis


@pytest.fixture
async def long_answers(start_simulator: StartSimulator) -> Simulator:
    """A vLLM whose answers take several leases."""
    return await start_simulator(Options(max_model_len=4 * TOKENS, scenario=Scenario(rate=20, tokens=TOKENS)))


def url_of(node: Node) -> str:
    return f"redis://127.0.0.1:{node.port}/0"


def text(number: int) -> str:
    return answer_to(chat_request(f"question {number}")["messages"], tokens=TOKENS)


async def streams(client: Client, redis: Redis) -> list[str]:
    """Enqueue jobs, and wait until all of them are mid-stream."""
    ids = [await client.enqueue(chat_request(f"question {number}")) for number in range(STREAMS)]
    for request_id in ids:
        await has_begun(redis, request_id, 3)
    return ids


async def all_kept(redis: Redis, ids: list[str]) -> list[EndedLog]:
    within = 30 + 8 * LEASE
    return [await promise_kept(redis, each, text(number), within=within) for number, each in enumerate(ids)]


def is_promoted(node: Node) -> bool:
    return bool(node.client.info("replication")["role"] == "master")


async def stall(node: Node, lease: float = LEASE) -> None:
    node.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(1.5 * lease)


async def test_a_redis_that_stands_still_for_longer_than_a_lease_costs_no_second_request(
    stalling: Node, admin: Redis, start_worker: StartWorker, long_answers: Simulator
) -> None:
    for _ in range(2):
        await start_worker(long_answers, pace=PACE, lease=LEASE, slots=STREAMS, redis_url=url_of(stalling))
    async with Client(url_of(stalling), patience=30) as client:
        ids = await streams(client, admin)
        await stall(stalling)
        stalling.process.send_signal(signal.SIGCONT)
        ended = await all_kept(admin, ids)
    assert sum(log.attempts > 1 for log in ended) <= MAY_BE_REPEATED
    assert len(long_answers.served) <= STREAMS + MAY_BE_REPEATED


async def test_a_failover_that_takes_longer_than_a_lease_costs_no_second_request(
    redis_binary: Path, tmp_path: Path, start_worker: StartWorker, long_answers: Simulator
) -> None:
    with topology.sentinel(redis_binary, tmp_path) as (master, replica, watcher):
        url = f"redis+sentinel://127.0.0.1:{watcher.port}/mymaster/0"
        async with command_client(url) as redis, Client(url, patience=30) as client:
            for _ in range(2):
                await start_worker(long_answers, pace=PACE, lease=LEASE, slots=STREAMS, redis_url=url)
            ids = await streams(client, redis)
            await stall(master)
            if not is_promoted(replica):  # after a long stall the sentinel has noticed by itself
                await asyncio.to_thread(topology.fail_over, master, watcher)
            await asyncio.to_thread(until, lambda: is_promoted(replica))
            async with Redis.from_url(url_of(replica), protocol=2) as promoted:
                ended = await all_kept(promoted, ids)
    assert sum(log.attempts > 1 for log in ended) <= MAY_BE_REPEATED
    assert len(long_answers.served) <= STREAMS + MAY_BE_REPEATED


async def test_an_owner_that_renews_a_little_later_than_the_others_see_redis_again_keeps_its_job(
    stalling: Node, admin: Redis, start_worker: StartWorker, start_simulator: StartSimulator
) -> None:
    lease = 1.5 * LEASE
    slow = await start_simulator(Options(scenario=Scenario(rate=20, tokens=TOKENS)))
    async with Proxy.before(url_of(stalling)) as proxy, Client(url_of(stalling), patience=30) as client:
        first = await start_worker(slow, lease=lease, redis_url=proxy.redis_url)
        request_id = await client.enqueue(chat_request("question 0"))
        await has_begun(admin, request_id, 3)
        keen = replace(PACE, scan_every=0.05)
        await start_worker(slow, pace=keen, lease=lease, redis_url=url_of(stalling))
        renewal = proxy.hold(rb"^XCLAIM")
        await renewal.met.wait()
        await stall(stalling, lease)
        stalling.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(lease / 8)
        renewal.release()
        assert (await promise_kept(admin, request_id, text(0))).attempts == 1
        first.stop()
    assert len(slow.served) == 1


@pytest.mark.parametrize("when", ["during the stall", "after the stall"])
async def test_a_worker_that_is_killed_around_a_stall_is_taken_over(
    when: str,
    stalling: Node,
    admin: Redis,
    start_process: StartProcess,
    start_simulator: StartSimulator,
    simulator: Simulator,
) -> None:
    slow = await start_simulator(Options(scenario=Scenario(rate=2)))
    first = start_process(slow, lease=LEASE, redis_url=url_of(stalling))
    async with Client(url_of(stalling), patience=30) as client:
        request_id = await client.enqueue(chat_request())
        await has_begun(admin, request_id, 2)
        start_process(simulator, lease=LEASE, redis_url=url_of(stalling))

        async def both_are_up() -> bool:
            return await admin.hlen("chat:workers") == 2

        await eventually(both_are_up)
        await stall(stalling)
        if when == "during the stall":
            first.kill()
        stalling.process.send_signal(signal.SIGCONT)
        if when == "after the stall":
            await admin.ping()
            first.kill()
        assert (await promise_kept(admin, request_id, expected())).attempts == 2
    first.wait()

"""`worker log` as a process: it loses no request, however it ends, and its processes share them."""

import asyncio
import json
import signal
from asyncio.subprocess import Process
from typing import Any, cast

from command import line_with, rest, started
from conftest import StartWorker
from lifecycle_records import KEY, MIB, abandon, pending, write_records
from proxy import Proxy
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.broker.lifecycle_retention import LifecycleTrimmer
from worker.contract.keys import Keys
from worker.sandbox.embedded_redis import start_redis
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator

MESSAGES = [{"role": "user", "content": "Who are you?"}]


async def finish(redis: Redis, number: int, first: int = 0) -> list[str]:
    """Write all records of requests that have finished; returns their ids."""
    return await write_records(redis, number, "started", "finished", first=first)


async def printed(process: Process, number: int) -> list[str]:
    """The ids of the next lines."""
    assert process.stdout
    async with asyncio.timeout(300):
        return [json.loads(await process.stdout.readline())["id"] for _ in range(number)]


def ids_of(output: str) -> list[str]:
    return [json.loads(line)["id"] for line in output.splitlines()]


async def end(process: Process) -> list[str]:
    """Stop a process by SIGTERM; returns the ids of its last lines."""
    process.send_signal(signal.SIGTERM)
    ended = await rest(process)
    assert (ended.status, ended.err) == (0, "")
    return ids_of(ended.out)


async def test_requests_of_a_process_that_was_killed_come_again_and_none_is_missing(
    redis: Redis, redis_url: str, redis_proxy: Proxy
) -> None:
    ids = await finish(redis, 120)
    held = redis_proxy.hold(rb"^XACK")
    async with started("log", REDIS_URL=redis_proxy.redis_url) as killed:
        first = await printed(killed, 50)
        async with asyncio.timeout(300):
            await held.done.wait()
        killed.kill()
        await killed.wait()

    async def is_pending() -> bool:
        return await pending(redis, "log") == 100

    await eventually(is_pending)
    await abandon(redis, "log")
    async with started("log", REDIS_URL=redis_url) as later:
        again = await printed(later, 120)
        assert not await end(later)
    assert again == ids
    assert first == ids[:50]
    assert not await pending(redis, "log")


async def test_processes_share_the_requests_and_another_group_gets_all(redis: Redis, redis_url: str) -> None:
    async with (
        started("log", REDIS_URL=redis_url) as one,
        started("log", REDIS_URL=redis_url) as two,
        started("log", "--group", "billing", REDIS_URL=redis_url) as other,
    ):

        async def have_begun() -> bool:
            clients = await redis.client_list()
            return [client["cmd"] for client in clients].count("xreadgroup") == 3

        await eventually(have_begun)
        ids = await finish(redis, 4000)
        # More than one process can print while nobody reads on: its pipe is full before.
        shares = [await printed(process, 1) for process in (one, two)]
        outputs = [asyncio.create_task(cast("Any", process.stdout).read()) for process in (one, two)]
        assert await printed(other, 4000) == ids

        async def is_read() -> bool:
            (group,) = [group for group in await redis.xinfo_groups(KEY) if group["name"] == b"log"]
            newest = (await redis.xinfo_stream(KEY))["last-generated-id"]
            return group["last-delivered-id"] == newest and not group["pending"]

        await eventually(is_read)
        for process in (one, two):
            process.send_signal(signal.SIGTERM)
        for share, output in zip(shares, outputs, strict=True):
            share.extend(ids_of((await output).decode()))
        assert sorted(shares[0] + shares[1]) == sorted(ids)
        await end(other)


async def test_a_process_that_is_stopped_while_its_pipe_is_full_leaves_the_rest_to_the_next(
    redis: Redis, redis_url: str
) -> None:
    ids = await finish(redis, 4000)
    async with started("log", REDIS_URL=redis_url) as full:

        async def is_full() -> bool:
            """Whether this process reads no more, and the process has nothing to wait for but its pipe."""
            buffer = cast("Any", full.stdout)
            before = await pending(redis, "log") if len(buffer._buffer) > 2 * buffer._limit else 0
            await asyncio.sleep(0.1)
            return bool(before) and before == await pending(redis, "log")

        await eventually(is_full)
        first = await end(full)
    assert 100 < len(first) < 4000
    async with started("log", REDIS_URL=redis_url) as later:
        again = await printed(later, 4000 - len(first))
        assert not await end(later)
    assert first + again == ids


async def test_a_loss_is_reported_with_its_number(redis: Redis, redis_url: str) -> None:
    await redis.xgroup_create(KEY, "log", "0", mkstream=True)
    ids = await finish(redis, 10_000)
    await LifecycleTrimmer(redis, Keys(), length=1, max_bytes=MIB // 2).trim()
    kept = await redis.xlen(KEY)
    async with started("log", REDIS_URL=redis_url) as process:
        assert process.stdout
        line = json.loads(await process.stdout.readline())
        assert line == {"type": "lost", "group": "log", "lines": 20_000 - kept}
        note = await line_with(process.stderr, "lines lost")
        assert note.startswith(f"· {20_000 - kept} lines lost")
        rest_of_them = await printed(process, (kept + 1) // 2)
        assert not await end(process)
    assert rest_of_them == ids[-len(rest_of_them) :]


async def test_it_goes_on_when_redis_is_back_and_adds_answers_if_asked(
    redis: Redis, client: Client, start_worker: StartWorker, simulator: Simulator, redis_proxy: Proxy
) -> None:
    worker = await start_worker(simulator)
    first = await client.enqueue({"model": "reciter", "messages": MESSAGES}, tenant="acme")
    async with started("log", "--content", REDIS_URL=redis_proxy.redis_url) as process:
        assert process.stdout
        line = json.loads(await process.stdout.readline())
        assert (line["id"], line["tenant"], line["outcome"], line["queue"]) == (first, "acme", "done", "default")
        assert line["worker"].encode() in await redis.hkeys("chat:workers")
        assert line["answer"]["choices"][0]["message"]["content"] == answer_to(MESSAGES)
        assert line["usage"] == line["answer"]["usage"]
        await redis_proxy.cut()
        await finish(redis, 1, first=7)
        await redis_proxy.heal()
        line = json.loads(await process.stdout.readline())
        assert (line["id"], line["answer"]) == ("request-7", None)
        assert not await end(process)
    worker.stop()


async def test_a_new_group_of_a_full_redis_prints_at_once_why_it_waits() -> None:
    with start_redis() as server:
        async with Redis.from_url(server.url, protocol=2) as redis:
            await redis.config_set("maxmemory", 1)
            async with started("log", REDIS_URL=server.url) as process:
                note = await line_with(process.stderr, "Redis refuses")
                assert "maxmemory" in note
                assert note.endswith("Trying for 10 s\n")
                await redis.config_set("maxmemory", 0)
                ids = await finish(redis, 1)
                assert await printed(process, 1) == ids
                assert not await end(process)

"""A Redis is restored from a copy on another address, as deploy/backup.md says, and requests go on as it says."""

import asyncio
import shutil
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path

import pytest
from command import started
from redis.asyncio import Redis
from redis.exceptions import RedisError
from waits import eventually

from worker import Client, Delta, State
from worker.sandbox.embedded_redis import free_port
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Simulator

Copy = Callable[[Redis, Path, Path], Awaitable[None]]


@asynccontextmanager
async def redis_in(folder: Path, binary: Path, *, appendonly: str) -> AsyncIterator[tuple[str, Redis]]:
    """A Redis with its data in a folder, killed at the end."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
        "--appendonly", appendonly, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    url = f"redis://127.0.0.1:{port}/0"
    try:
        async with Redis.from_url(url, protocol=2) as redis:

            async def answers() -> bool:
                with suppress(RedisError):
                    return bool(await redis.ping())
                return False

            await eventually(answers)
            yield url, redis
    finally:
        process.kill()
        await process.wait()


async def copy_snapshot(redis: Redis, source: Path, target: Path) -> None:
    await redis.bgsave()

    async def is_complete() -> bool:
        return not (await redis.info("persistence"))["rdb_bgsave_in_progress"]

    await eventually(is_complete)
    shutil.copy(source / "dump.rdb", target)


async def copy_append_only_file(redis: Redis, source: Path, target: Path) -> None:
    await redis.config_set("auto-aof-rewrite-percentage", 0)
    assert (await redis.info("persistence"))["aof_rewrite_in_progress"] == 0
    shutil.copytree(source / "appendonlydir", target / "appendonlydir")


@pytest.mark.parametrize("copy", [copy_snapshot, copy_append_only_file])
async def test_requests_go_on_from_the_copy(
    copy: Copy, tmp_path: Path, redis_binary: Path, simulator: Simulator
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    texts: dict[str, str] = {}

    def worker(url: str, queues: str) -> AbstractAsyncContextManager[Process]:
        return started("run", REDIS_URL=url, VLLM_URLS=simulator.url, WORKER_QUEUES=queues, WORKER_LEASE="2")

    async def enqueue(client: Client, question: str, queue: str, **scenario: object) -> str:
        messages = [{"role": "user", "content": question}]
        request = {"model": "reciter", "messages": messages, "simulate": scenario}
        request_id = await client.enqueue(request, queue=queue)
        texts[request_id] = answer_to(messages)
        return request_id

    async with AsyncExitStack() as stack:
        url, redis = await stack.enter_async_context(redis_in(first, redis_binary, appendonly="yes"))
        if not (first / "appendonlydir").exists():
            pytest.skip("before Redis 7, the append-only file is one file")
        client = await stack.enter_async_context(Client(url))
        await stack.enter_async_context(worker(url, "default"))
        ended = await enqueue(client, "Who are you?", "default")
        await client.result(ended)
        runs = await enqueue(client, "Send emoji", "default", fault="stall", after=3, times=1)
        async with aclosing(client.follow(runs)) as entries:
            while not isinstance(await anext(entries), Delta):
                pass
        waits = await enqueue(client, "Write code", "later")
        await copy(redis, first, second)
        await stack.enter_async_context(worker(url, "later"))
        await client.result(waits)
        later = await enqueue(client, "Tell me", "default")

    if copy is copy_snapshot:
        async with redis_in(second, redis_binary, appendonly="yes") as (_, redis):
            assert not await redis.dbsize(), "it does not read the snapshot"
        shutil.rmtree(second / "appendonlydir")
    async with AsyncExitStack() as stack:
        appendonly = "no" if copy is copy_snapshot else "yes"
        url, redis = await stack.enter_async_context(redis_in(second, redis_binary, appendonly=appendonly))
        await redis.config_set("appendonly", "yes")
        client = await stack.enter_async_context(Client(url))
        states = [(await client.status(each)).state for each in (ended, runs, waits, later)]
        assert states == [State.ENDED, State.RUNNING, State.QUEUED, State.UNKNOWN]
        await stack.enter_async_context(worker(url, "default,later"))
        for each in (ended, runs, waits):
            assert (await client.result(each)).text == texts[each]
        assert (await client.result(runs)).attempt > 1

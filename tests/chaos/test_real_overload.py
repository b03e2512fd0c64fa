"""Real vLLM servers that are full, that let requests wait, that freeze and that drain; runs when VLLM_COMMAND is set.

`VLLM_COMMAND` starts a vLLM server in the foreground, with `{port}` for its port; the tests add options. Each answer
must be the one that the server gives directly and undisturbed, at temperature 0. The last test stops both servers.
"""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import msgspec
import pytest
from conftest import StartWorker, metric
from real_vllm import COMMAND, Vllm
from redis.asyncio import Redis
from waits import eventually

from worker import Client
from worker.contract.records import WorkerRecord
from worker.engine.application import Worker
from worker.vllm.servers.circuit import DRAINING

pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(not COMMAND, reason="VLLM_COMMAND does not start a real vLLM"),
    pytest.mark.timeout(900),
]

AT_ONCE = 4
"""How many answers each server generates at once (--max-num-seqs)."""
ACCEPTED = 8
"""How many unfinished requests the first server accepts (--max-num-queued-reqs counts the running ones too)."""
SLOTS = 64
LIMITS = {"slots": SLOTS, "first_token_timeout": 200, "gap_timeout": 200, "lease": 15, "drain_timeout": 5}
"""A busy machine makes vLLM slow: no answer is given up for that."""
LIMITED = ("--max-num-seqs", str(AT_ONCE), "--shutdown-timeout", "300")
REFUSING = ("--max-num-queued-reqs", str(ACCEPTED))
LENGTHS = (90, 140, 190, 240)
"""How long the answers are, in tokens: long enough to fill a server, unequal so that their ends are spread."""
PHASES = ("first_token", "answer")


@pytest.fixture(scope="module")
def vllms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vllm, Vllm]]:
    """Two servers: the first one refuses requests when it is full, the second one lets them wait."""
    folder = tmp_path_factory.mktemp("vllm")
    both = Vllm(8120, folder, *LIMITED, *REFUSING), Vllm(8121, folder, *LIMITED)
    try:
        for server in both:
            asyncio.run(server.ready())
        yield both
    finally:
        for server in both:
            server.end()


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Client]:
    """A client that does not give up when a busy machine pauses this process or Redis for seconds."""
    async with Client(redis_url, patience=200) as client:
        yield client


@pytest.fixture
def refusing(vllms: tuple[Vllm, Vllm]) -> Vllm:
    return vllms[0]


@pytest.fixture
def waiting(vllms: tuple[Vllm, Vllm]) -> Vllm:
    return vllms[1]


async def chat_request(server: Vllm) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=60) as http:
        name = (await http.get(f"{server.url}/v1/models")).json()["data"][0]["id"]
    return {"model": name, "messages": [{"role": "user", "content": "Tell me a story"}], "temperature": 0}


@asynccontextmanager
async def long_stream(server: Vllm) -> AsyncIterator[None]:
    """A stream of another client, which the server must end before it can shut down."""
    request = await chat_request(server) | {"stream": True, "ignore_eos": True, "max_tokens": 3900}
    async with (
        httpx.AsyncClient(timeout=200) as http,
        http.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response,
    ):
        assert response.is_success
        yield


class Jobs:
    """Jobs, and the texts that a server gives directly to the same requests."""

    def __init__(self, client: Client, redis: Redis) -> None:
        self._client = client
        self._redis = redis
        self._texts: dict[int, str] = {}
        self._jobs: list[tuple[int, str]] = []

    async def enqueue(self, server: Vllm, count: int) -> None:
        request = await chat_request(server)
        async with httpx.AsyncClient(timeout=200) as http:
            for length in set(LENGTHS) - self._texts.keys():
                reply = await http.post(f"{server.url}/v1/chat/completions", json=request | {"max_tokens": length})
                self._texts[length] = reply.json()["choices"][0]["message"]["content"]
        for number in range(count):
            length = LENGTHS[number % len(LENGTHS)]
            self._jobs.append((length, await self._client.enqueue(request | {"max_tokens": length})))

    async def in_queue(self) -> int:
        """How many jobs no server has begun to answer."""
        return len(self._jobs) - await self.logs_with({b"opened"}, among=6)

    async def ended(self) -> int:
        return int(await self._redis.exists(*(f"chat:ended:{{{request_id}}}" for _, request_id in self._jobs)))

    async def logs_with(self, types: set[bytes], among: int | None = None) -> int:
        """How many logs have an entry of one of these types among their first entries."""
        found = 0
        for _, request_id in self._jobs:
            log: Any = await self._redis.xrange(f"chat:tokens:{{{request_id}}}", count=among)
            found += any(fields.get(b"type") in types for _, fields in log)
        return found

    async def check(self) -> None:
        """Wait until all jobs have ended. None failed, and every text is exact."""
        answers = await asyncio.gather(*(self._client.result(request_id) for _, request_id in self._jobs))
        assert [answer.error for answer in answers if answer.outcome != "done"] == []
        assert [answer.text for answer in answers] == [self._texts[length] for length, _ in self._jobs]
        assert await self.logs_with({b"resumed", b"restarted"}) == 0


@pytest.fixture
def jobs(client: Client, redis: Redis) -> Jobs:
    return Jobs(client, redis)


def refusals(worker: Worker, *servers: Vllm) -> float:
    return sum(metric(worker, "vllm_busy_total", endpoint=server.url) for server in servers)


@asynccontextmanager
async def watched(server: Vllm) -> AsyncIterator[list[float]]:
    """The numbers of unfinished requests that the server showed, one after the other."""
    seen: list[float] = []

    async def watch() -> None:
        while True:
            now = await server.sample()
            seen.append(now["num_requests_running"] + now["num_requests_waiting"])
            await asyncio.sleep(0.2)

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def tokens_per_step(server: Vllm, before: dict[str, float]) -> float:
    """Tokens that a step of the engine generated. Idle places at the server lower them, a slow machine does not."""
    now = await server.sample()
    tokens, steps = "generation_tokens_total", "iteration_tokens_total_count"
    return (now[tokens] - before[tokens]) / (now[steps] - before[steps])


def report(figures: str) -> None:
    """Print figures; `pytest -rP` shows them."""
    sys.stdout.write(f"{figures}\n")


async def test_a_full_vllm_refuses_few_requests_and_no_job_fails(
    refusing: Vllm, jobs: Jobs, start_worker: StartWorker
) -> None:
    await jobs.enqueue(refusing, 60)
    before = await refusing.sample()
    worker = await start_worker(vllm_urls=refusing.url, **LIMITS)

    await jobs.check()

    requests = 60 + refusals(worker, refusing)
    report(f"{requests / 60:.3f} requests per job, {await tokens_per_step(refusing, before):.2f} tokens per step")
    assert requests <= 1.1 * 60
    accepted = (await refusing.sample())["request_success_total"] - before["request_success_total"]
    assert accepted <= 1.1 * 60


async def test_jobs_wait_in_redis_and_not_in_vllm(waiting: Vllm, jobs: Jobs, start_worker: StartWorker) -> None:
    figures: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for slots in (AT_ONCE, SLOTS):
        await jobs.enqueue(waiting, 40)
        before = await waiting.sample()
        worker = await start_worker(vllm_urls=waiting.url, **LIMITS | {"slots": slots})
        began = time.monotonic()
        async with watched(waiting) as unfinished:
            await jobs.check()
        seconds[slots] = time.monotonic() - began
        figures[slots] = await tokens_per_step(waiting, before)
        report(f"{slots} slots: {seconds[slots]:.1f} s, {figures[slots]:.2f} tokens per step, at vLLM: {unfinished}")
        assert max(unfinished) <= 5 * AT_ONCE  # all 40, had the limit not been learnt
        assert refusals(worker, waiting) == 0
        worker.stop()

    ratios = figures[SLOTS] / figures[AT_ONCE], seconds[AT_ONCE] / seconds[SLOTS]
    report(f"of those with {AT_ONCE} slots: {ratios[0]:.2f} of the tokens per step, {ratios[1]:.2f} of the goodput")
    assert figures[SLOTS] >= 0.85 * figures[AT_ONCE]


async def running_time_until(condition: Callable[[], Awaitable[bool]]) -> float:
    """Wait until a condition holds. Returns the seconds, without those for which a busy machine paused this process."""
    seconds, last = 0.0, time.monotonic()
    while not await condition():
        await asyncio.sleep(0.01)
        now = time.monotonic()
        seconds, last = seconds + min(now - last, 0.1), now
    return seconds


async def test_the_stream_of_a_frozen_vllm_shows_as_silent(
    waiting: Vllm, client: Client, redis: Redis, start_worker: StartWorker
) -> None:
    """The server is frozen within an answer.

    A busy machine may pause this process for seconds. The server then sends its whole answer before it is frozen, and
    no stream is silent: the next answer is tried.
    """
    request = await chat_request(waiting) | {"ignore_eos": True, "max_tokens": 3000}
    worker = await start_worker(vllm_urls=waiting.url, **LIMITS)

    def sum_of(name: str) -> float:
        return sum(metric(worker, name, endpoint=waiting.url, phase=phase) for phase in PHASES)

    for _ in range(20):
        request_id = await client.enqueue(request)
        log, tombstone = f"chat:tokens:{{{request_id}}}", f"chat:ended:{{{request_id}}}"

        async def has_text(log: str = log) -> bool:
            return bool(await redis.xlen(log) > AT_ONCE)

        async def shows_or_has_ended(tombstone: str = tombstone) -> bool:
            return sum_of("streams_silent") == 1 or bool(await redis.exists(tombstone))

        await eventually(has_text, within=200)
        waiting.signal(signal.SIGSTOP)
        try:
            seconds = await running_time_until(shows_or_has_ended)
            silence, is_silent = sum_of("longest_silence_seconds"), not await redis.exists(tombstone)
        finally:
            waiting.signal(signal.SIGCONT)
        report(f"after {seconds:.1f} s: silence {silence:.1f} s, entries {await redis.xlen(log)}")
        answer = await client.result(request_id)
        assert (answer.outcome, answer.attempt) == ("done", 1)
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] == 3000
        if is_silent:
            assert seconds <= 10
            assert silence >= 5
            return
    pytest.fail("every answer had been sent before the server was frozen")


async def test_no_job_fails_when_vllms_drain(
    refusing: Vllm, waiting: Vllm, jobs: Jobs, start_worker: StartWorker, redis: Redis
) -> None:
    """First one of two, then the only one that is left, which starts again."""
    worker = await start_worker(vllm_urls=f"{refusing.url},{waiting.url}", **LIMITS)

    async def both_work() -> bool:
        in_use = [metric(worker, "vllm_requests", endpoint=server.url) for server in (refusing, waiting)]
        return min(in_use) >= 2 and await jobs.ended() >= 4

    async def is_draining(server: Vllm) -> bool:
        (record,) = [msgspec.json.decode(value, type=WorkerRecord) for value in await redis.hvals("chat:workers")]
        return any(it.url == server.url and it.reason == DRAINING for it in record.servers)

    async with long_stream(refusing):
        await jobs.enqueue(refusing, 40)
        await eventually(both_work, within=200)
        refusing.drain()
        await eventually(lambda: is_draining(refusing), within=200)
        await jobs.check()
    await eventually(refusing.has_ended, within=200)
    report(f"one of two: {refusals(worker, refusing):.0f} and {refusals(worker, waiting):.0f} refusals")

    async def some_more_have_ended() -> bool:
        return await jobs.ended() >= 44

    async with long_stream(waiting):
        await jobs.enqueue(waiting, 40)
        await eventually(some_more_have_ended, within=200)
        waiting.drain()
        await eventually(lambda: is_draining(waiting), within=200)
    await eventually(waiting.has_ended, within=200)
    assert await jobs.in_queue() > 0
    waiting.start()
    try:
        await jobs.check()
    finally:
        waiting.end()
    report(f"the only one: {refusals(worker, waiting):.0f} refusals")
    assert refusals(worker, refusing, waiting) <= 20

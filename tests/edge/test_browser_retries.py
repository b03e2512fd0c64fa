"""What a browser sends again, by itself or through the openai client, costs no second job and loses no text."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from browsers import Browser, Firefox, Tab
from conftest import StartSimulator, StartWorker
from cutting_server import LONG, Cut, CuttingServer
from edge_fixtures import StartReplica
from redis.asyncio import Redis
from steered_clock import SteeredClock
from waits import eventually

from worker.engine.application import Worker
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator

ASK: list[Any] = [{"role": "user", "content": "Who are you?"}]
TEXT = answer_to(ASK)
CLIENTS = ("fetch", "openai")
UNHURRIED = {"lease": 60, "first_token_timeout": 60, "gap_timeout": 300}
"""Settings of a worker that requests no answer twice though a busy machine does not run it for seconds."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of its own origin, whose connections no other page uses."""

    tab: Tab
    server: CuttingServer

    async def start(
        self, client: str, *, seed: int, stream: bool = True, stop: bool = False, simulate: dict[str, Any] | None = None
    ) -> None:
        """Begin a call. Calls with different seeds are different requests."""
        body = {"model": "reciter", "messages": ASK, "stream": stream, "seed": seed, "simulate": simulate or {}}
        arguments = ", ".join(json.dumps(argument) for argument in (client, body, {"stop": stop}))
        await self.tab.evaluate(f"void window.start({arguments})")

    async def sent(self, count: int) -> list[tuple[bool, int]]:
        """Wait for so many POSTs; returns whether each used a connection again, and its count of retries."""

        async def are_sent() -> bool:
            return len(self.server.posts) >= count

        await eventually(are_sent)
        return [(post.is_reused, post.retry) for post in self.server.posts]

    async def cut(self) -> None:
        """Wait until a connection is cut."""

        async def is_cut() -> bool:
            return self.server.cuts > 0

        await eventually(is_cut)

    async def results(self, count: int = 1) -> list[dict[str, str]]:
        """Wait until so many calls have ended; returns the text and the error of each."""
        await self.tab.wait(f"window.results.length === {count}")
        found: list[dict[str, str]] = await self.tab.evaluate("window.results")
        return found


OpenPage = Callable[..., Awaitable[Page]]


@pytest.fixture
async def open_page(browser: Browser, drivers: Path, redis: Redis) -> AsyncIterator[OpenPage]:
    """Opens pages whose calls go to a gateway. Before the head, a connection is cut once its job is in the queue."""
    async with AsyncExitStack() as stack:

        async def open_page(port: int, *, jobs: int = 0, keeps: bool = True) -> Page:
            async def has_jobs() -> bool:
                return bool(await redis.xlen("chat:jobs") >= jobs)

            server = CuttingServer(port, drivers, lambda: eventually(has_jobs), keeps=keeps)
            await stack.enter_async_context(server)
            tab = await browser.open(f"{server.url}/browser_calls.html")
            await tab.wait("Boolean(window.start)")
            return Page(tab, server)

        yield open_page


@pytest.fixture
def clock() -> SteeredClock:
    """A clock by which answers halt only if a test says where."""
    return SteeredClock()


@pytest.fixture
async def simulator(start_simulator: StartSimulator, clock: SteeredClock) -> Simulator:
    return await start_simulator(Options(scenario=Scenario(rate=40.0)), clock=clock)


@pytest.fixture
async def worker(start_worker: StartWorker, simulator: Simulator) -> Worker:
    return await start_worker(simulator, **UNHURRIED)


@pytest.mark.parametrize("reused", [False, True], ids=["fresh", "reused"])
async def test_what_is_sent_again_before_the_head_is_one_job(
    open_page: OpenPage, start_replica: StartReplica, redis: Redis, simulator: Simulator, start_worker: StartWorker,
    *, reused: bool,
) -> None:  # fmt: skip
    """The browser sends a POST again by itself if its connection was used before. Otherwise openai's client does."""
    replica = await start_replica(grace=30, leave_after=600)
    pages: list[tuple[Page, bool]] = []
    for client in CLIENTS:
        for stream in (True, False):
            page = await open_page(replica.port, jobs=len(pages) + 1, keeps=reused)
            page.server.cut_next("before the head", 2)
            await page.start(client, seed=len(pages), stream=stream)
            is_sent_again = reused or client == "openai"
            pages.append((page, is_sent_again))
            count = 3 if is_sent_again else 1
            retries = [0] * count if reused else list(range(count))
            assert await page.sent(count) == [(reused, retry) for retry in retries]
    await _wait_decided(redis, sum(is_sent_again for _, is_sent_again in pages))
    assert await redis.xlen("chat:jobs") == len(pages)
    await start_worker(simulator, **UNHURRIED)
    for page, is_sent_again in pages:
        (result,) = await page.results()
        assert bool(result["error"]) is not is_sent_again
        assert result["text"] == (TEXT if is_sent_again else "")

    async def have_ended() -> bool:
        return bool(await redis.xlen("chat:lifecycle") >= 2 * len(pages))

    await eventually(have_ended)
    assert len(simulator.served) == len(pages)


async def _wait_decided(redis: Redis, count: int) -> None:
    """Wait until so many requests are followed, and none is marked any more as one that may be new or a repetition."""

    async def are_decided() -> bool:
        keys = [key async for key in redis.scan_iter("chat:gateway:asked:*")]
        members = [member for key in keys for member in cast("list[bytes]", await redis.zrange(key, 0, -1))]
        is_marked = any(member.startswith(b"~") for member in members)
        return not is_marked and len(await redis.pubsub_channels("chat:feed:{*")) == count

    await eventually(are_decided)


@pytest.mark.parametrize("cut", ["after the head", "after a chunk"])
@pytest.mark.usefixtures("worker")
async def test_a_stream_that_is_cut_is_an_error_and_one_job(
    cut: Cut, browser: Browser, open_page: OpenPage, start_replica: StartReplica, simulator: Simulator,
    clock: SteeredClock,
) -> None:  # fmt: skip
    """Firefox takes a head without a body for no response, and openai's client then tries again.

    The answer is not whole before the cut: a retry would then be a new request.
    """
    replica = await start_replica(grace=0.1, leave_after=600)
    for number, client in enumerate(CLIENTS, 1):
        page = await open_page(replica.port)
        page.server.cut_next(cut, 1)
        clock.allow(3)
        await page.start(client, seed=number)
        await page.cut()
        clock.release()
        (result,) = await page.results()
        is_retried = (cut, client) == ("after the head", "openai") and isinstance(browser, Firefox)
        assert [post.retry for post in page.server.posts] == ([0, 1] if is_retried else [0])
        assert bool(result["error"]) is not is_retried
        assert result["text"] == TEXT if is_retried else result["text"] != TEXT

        async def are_served(count: int = number) -> bool:
            return len(simulator.served) >= count

        await eventually(are_served)
        assert len(simulator.served) == number


@pytest.mark.usefixtures("worker")
async def test_a_whole_answer_that_is_cut_after_its_head_is_no_empty_text_and_one_job(
    open_page: OpenPage, start_replica: StartReplica, simulator: Simulator
) -> None:
    replica = await start_replica(leave_after=600)
    for number, client in enumerate(CLIENTS, 1):
        page = await open_page(replica.port)
        page.server.cut_next("after the head", 1)
        await page.start(client, seed=number, stream=False, simulate={"tokens": LONG, "rate": 0})
        (result,) = await page.results()
        assert result["error"] or result["text"] == answer_to(ASK, tokens=LONG)
        assert len(simulator.served) == number


@pytest.mark.usefixtures("worker")
async def test_regenerate_after_a_stop_is_a_second_job(
    open_page: OpenPage, start_replica: StartReplica, simulator: Simulator, clock: SteeredClock
) -> None:
    replica = await start_replica()
    page = await open_page(replica.port)
    for number, client in enumerate(CLIENTS):
        clock.allow(3)
        await page.tab.evaluate("void (window.results = [])")
        await page.start(client, seed=number, stop=True)
        await page.results(1)
        clock.release()
        await page.start(client, seed=number)
        stopped, regenerated = await page.results(2)
        assert 0 < len(stopped["text"]) < len(TEXT)
        assert regenerated == {"text": TEXT, "error": ""}
        assert len(simulator.served) == 2 * (number + 1)

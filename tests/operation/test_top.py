"""The application as its user sees it: what is on the screen, and what the keys do to a real Redis."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from command import started
from conftest import StartProcess, StartSimulator
from durable_redis import Durable
from pending_jobs import append, pend
from redis.asyncio import Redis
from textual.pilot import Pilot
from textual.widgets import Static
from waits import eventually

from worker import Client
from worker.client.async_client import State
from worker.contract.keys import GROUP
from worker.ops.survey_types import Survey
from worker.sandbox.simulator.server import Options, Scenario
from worker.top.app import TopApp
from worker.top.installation import Installation
from worker.top.screens import Question
from worker.top.table import LiveTable

STORY = {"model": "reciter", "messages": [{"role": "user", "content": "Tell me a story"}]}

TopPilot = Pilot[None]


@asynccontextmanager
async def shown(url: str, size: tuple[int, int] = (80, 24)) -> AsyncIterator[TopPilot]:
    """`worker top`, with pictures in quick succession."""
    async with Installation(url, "chat", lease=15) as installation:
        app = TopApp(installation, every=0.3)
        async with app.run_test(size=size) as pilot:
            yield pilot


def rows(pilot: TopPilot, name: str = "requests") -> list[str]:
    """The rows of a table, without its header."""
    return pilot.app.screen_stack[0].query_one(f"#{name}", LiveTable).lines[1:]


def text(pilot: TopPilot, name: str) -> str:
    """The text of a line of the screen that has the focus."""
    return str(pilot.app.screen.query_one(f"#{name}", Static).render())


async def until_listed(pilot: TopPilot, *words: str) -> None:
    """Wait until the requests have exactly these words in their rows, in order."""

    async def are_listed() -> bool:
        found = rows(pilot)
        return len(found) == len(words) and all(word in row for word, row in zip(words, found, strict=True))

    await eventually(are_listed)


async def until_asked(pilot: TopPilot, key: str) -> Question:
    """Press a key and wait for its question."""
    await pilot.press(key)

    async def is_asked() -> bool:
        return isinstance(pilot.app.screen, Question)

    await eventually(is_asked)
    return cast("Question", pilot.app.screen)


async def control(redis: Redis) -> dict[str, dict[str, object]]:
    fields = cast("dict[bytes, bytes]", await redis.hgetall("chat:control"))
    return {name.decode(): json.loads(value) for name, value in fields.items()}


async def begin(redis: Redis, *, consumer: str = "pod-a") -> str:
    """A request that runs at a worker, with three tokens."""
    request_id = await pend(redis, consumer)
    await append(redis, request_id, *(f"1-{n}" for n in range(6)))
    return request_id


async def make_queue(redis: Redis) -> None:
    await redis.xgroup_create("chat:jobs", GROUP, mkstream=True)


async def test_running_requests_are_listed_filtered_and_sorted(redis: Redis, redis_url: str) -> None:
    await make_queue(redis)
    first, second = await begin(redis), await begin(redis, consumer="pod-b")
    await append(redis, second, "2-0", "2-1")
    async with shown(redis_url) as pilot:
        await until_listed(pilot, first, second)
        assert rows(pilot)[1].split()[-1] == "2", "the attempt"
        await pilot.press("slash", *"POD-B")
        await until_listed(pilot, second)
        await pilot.press("escape")
        await until_listed(pilot, first, second)
        await pilot.press("r")
        await until_listed(pilot, second, first)
        await pilot.press(*"rsssss")  # by tokens, the greatest first
        await until_listed(pilot, second, first)
        assert second in text(pilot, "selection"), "the selection stays with its request"
        await pilot.click("#requests", offset=(5, 3))  # below the title and the header

        async def is_selected() -> bool:
            return first in text(pilot, "selection")

        await eventually(is_selected)
        await pilot.click("#requests", offset=(5, 1))
        await until_listed(pilot, first, second)
        assert "secret" not in "\n".join([*rows(pilot), text(pilot, "selection")])


async def test_a_request_is_cancelled_and_its_worker_drained_only_after_a_yes(
    redis: Redis, redis_url: str, client: Client, start_process: StartProcess, start_simulator: StartSimulator
) -> None:
    """A worker process runs two requests that do not end by themselves."""
    worker = start_process(await start_simulator(Options(scenario=Scenario(rate=10, tokens=4000))), drain_timeout=0)
    first, second = [await client.enqueue(STORY, id=f"story-{number}") for number in range(2)]
    async with shown(redis_url) as pilot:
        await until_listed(pilot, first, second)
        assert first in (await until_asked(pilot, "c")).question
        await pilot.press("n")
        assert (await client.status(first)).state is State.RUNNING
        await until_asked(pilot, "c")
        await pilot.press("y")
        assert (await client.result(first)).outcome == "cancelled"
        await until_listed(pilot, second)
        (name,) = cast("list[bytes]", await redis.hkeys("chat:workers"))
        question = await until_asked(pilot, "d")
        assert name.decode() in question.question
        assert "no other worker serves default" in question.consequence
        await pilot.press("y")

        async def has_left() -> bool:
            return worker.poll() == 0

        await eventually(has_left)
        await until_listed(pilot, "handed-over")
    await client.cancel(second)


async def test_the_queue_of_a_row_is_paused_and_resumed(redis: Redis, redis_url: str) -> None:
    await make_queue(redis)
    request_id = await begin(redis)
    async with shown(redis_url) as pilot:
        await until_listed(pilot, request_id)
        await until_asked(pilot, "p")
        await pilot.press("y")

        async def is_paused() -> bool:
            return list(await control(redis)) == ["pause:default"] and "paused" in rows(pilot, "queues")[0]

        await eventually(is_paused)
        assert "@" in str((await control(redis))["pause:default"]["by"])
        await pilot.press("p")

        async def is_resumed() -> bool:
            return not await control(redis) and "paused" not in rows(pilot, "queues")[0]

        await eventually(is_resumed)


async def test_only_the_screen_of_a_request_shows_its_answer(redis: Redis, redis_url: str) -> None:
    await make_queue(redis)
    request_id = await pend(redis, "pod-a")
    log = f"chat:tokens:{{{request_id}}}"
    await redis.xadd(log, {"type": "started", "worker": "pod-a", "queue": "default", "job": "1-0"}, id="1-0")
    await redis.xadd(log, {"type": "delta", "content": "Once\n\tupon\x1b[2J\x9b"}, id="1-1")
    await redis.expire(log, 60)
    async with shown(redis_url) as pilot:
        await until_listed(pilot, request_id)
        await pilot.press("f")

        async def has_text(wanted: str) -> bool:
            return wanted in text(pilot, "text")

        await eventually(lambda: has_text("Once\n\tupon�[2J�"))
        assert text(pilot, "state").split() == [request_id, "runs", "at", "pod-a"]
        await redis.xadd(log, {"type": "delta", "content": " a time"}, id="1-2")
        await eventually(lambda: has_text("� a time"))
        await pilot.press("escape")
        await until_listed(pilot, request_id)


async def test_the_last_picture_stays_while_redis_is_away(redis_binary: Path, tmp_path: Path) -> None:
    server = Durable(redis_binary, tmp_path)
    server.start()
    await server.ready()
    await make_queue(server.client)
    request_id = await begin(server.client)
    async with shown(server.url, (120, 40)) as pilot:
        await until_listed(pilot, request_id)
        server.kill()

        async def is_away() -> bool:
            return "No new picture since" in text(pilot, "faults")

        await eventually(is_away)
        await until_listed(pilot, request_id)
        server.start()
        await server.ready()
        later = await begin(server.client)
        await until_listed(pilot, request_id, later)

        async def is_back() -> bool:
            return "No new picture" not in text(pilot, "faults")

        await eventually(is_back)
    await server.client.aclose()
    server.kill()


async def test_json_lines_have_the_running_requests_without_content(redis: Redis, redis_url: str) -> None:
    await make_queue(redis)
    request_id = await begin(redis)
    async with started("top", "--json", REDIS_URL=redis_url) as process:
        assert process.stdout
        first, second = [json.loads(await process.stdout.readline()) for _ in range(2)]
    (request,) = second["requests"]
    assert (request["request_id"], request["worker"], request["tokens"]) == (request_id, "pod-a", 3)
    assert (second["running"], [queue["running"] for queue in second["queues"]]) == (1, [1])
    assert "content" not in json.dumps(second)
    assert set(first) == {*Survey.__struct_fields__, "requests", "running"}


async def test_nothing_is_claimed_before_the_first_picture() -> None:
    async with shown("redis://:hidden-pw@127.0.0.1:1/0", (160, 50)) as pilot:

        async def is_away() -> bool:
            return "No new picture since" in text(pilot, "faults")

        await eventually(is_away)
        svg = pilot.app.export_screenshot()
        assert "worker" in svg
        assert "no worker runs" not in svg.replace("&#160;", " ")
        assert "hidden-pw" not in svg


@pytest.mark.parametrize("steps", range(0, 96, 12))
async def test_it_can_be_left_in_the_middle_of_a_picture(steps: int) -> None:
    """A screen that closes loses its widgets before the loop that takes pictures ends."""
    async with (
        Installation("redis://127.0.0.1:1/0", "chat", lease=15) as installation,
        TopApp(installation, every=0.0).run_test(),  # another picture begins at once
    ):
        for _ in range(steps):
            await asyncio.sleep(0)


async def test_a_missing_right_is_named_and_the_rest_is_shown(redis: Redis, redis_url: str) -> None:
    await make_queue(redis)
    await begin(redis)
    await redis.execute_command("ACL SETUSER reader on nopass ~* &* +@all -evalsha -eval")  # type: ignore[no-untyped-call]
    try:
        async with shown(redis_url.replace("://", "://reader:any@"), (160, 50)) as pilot:

            async def is_named() -> bool:
                return "running requests" in text(pilot, "faults") and "default" in rows(pilot, "queues")[0]

            await eventually(is_named)
            assert "eval" in text(pilot, "faults")
            assert "any@" not in text(pilot, "head")
    finally:
        await redis.execute_command("ACL DELUSER reader")  # type: ignore[no-untyped-call]

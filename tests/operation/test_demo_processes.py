"""The demo as a user runs it: with JSON, on a terminal, ended by a signal, and with a page."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest
from command import end_by_signal, environment, line_with, rest, run, started
from conftest import StartSimulator
from redis.asyncio import Redis
from steered_clock import SteeredClock

from worker.contract.entries import Object
from worker.sandbox.demo import run_demo
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario, Simulator

STORY = answer_to([{"role": "user", "content": "Tell me a long story"}])
READERS = {"websocket", "logger", "billing"}


def parsed(lines: list[str]) -> list[Object]:
    return [json.loads(line) for line in lines]


def check_story(lines: list[Object]) -> None:
    """Three followers had the whole story, side by side, one of them late."""
    pieces = [(str(line["follower"]), str(line["text"])) for line in lines if "text" in line]
    for name in READERS:
        assert "".join(text for follower, text in pieces if follower == name) == STORY
    others = [follower for follower, _ in pieces if follower in READERS]
    early = others[: others.index("billing")]
    assert set(early) == {"websocket", "logger"}, "billing comes late"
    assert len(early) >= 4
    assert sum(a != b for a, b in pairwise(others)) >= 6, "their lines are interleaved"


def check_summary(lines: list[Object]) -> None:
    ends = [line for line in lines if "outcome" in line]
    assert len(ends) == 5
    assert {line["outcome"] for line in ends} == {"done"}
    assert len({line["entries"] for line in ends if line["follower"] in READERS}) == 1
    assert next(line for line in lines if "same" in line)["same"] is True
    (compared,) = [line for line in lines if "equals_undisturbed" in line]
    assert (compared["equals_undisturbed"], compared["characters"]) == (True, len(STORY))
    assert len(cast("list[str]", lines[-1]["try_next"])) == 3


def check_takeover(lines: list[Object]) -> None:
    """The worker of the longest answer was killed, and another one went on with the text."""
    (killed,) = [line for line in lines if "killed" in line]
    entries = [(line["follower"], cast("Object", line["entry"])) for line in lines if "entry" in line]
    for name in READERS:
        # Before that, a busy machine may have kept a worker from running for its short lease.
        *_, claimed, resumed = [entry for follower, entry in entries if follower == name]
        assert (claimed["type"], resumed["type"]) == ("claimed", "resumed")
        assert claimed["worker"] != killed["killed"]


@pytest.fixture
def clock() -> SteeredClock:
    """The time of a server whose longest answer halts: it does not end before the demo kills its worker."""
    return SteeredClock(halt_after=150)


@pytest.fixture
async def halting(start_simulator: StartSimulator, clock: SteeredClock) -> Simulator:
    return await start_simulator(Options(scenario=Scenario(rate=30)), clock=clock)


async def test_with_json_every_line_parses_and_a_given_redis_is_left_clean(
    redis: Redis, redis_url: str, halting: Simulator, clock: SteeredClock
) -> None:
    await redis.set("somebody-elses", "key", ex=600)
    lines: list[Object] = []
    async with started("demo", "--json", "--redis-url", redis_url, "--vllm-url", f"{halting.url}/v1") as process:
        assert process.stdout is not None
        async for line in process.stdout:
            lines += parsed([line.decode()])
            if "killed" in lines[-1]:
                clock.release()
        ended = await rest(process)
    assert (ended.status, ended.err) == (0, "")
    assert lines[0]["redis"] == redis_url
    assert lines[1]["vllm"] == f"{halting.url}/v1"
    check_story(lines)
    check_takeover(lines)
    check_summary(lines)
    assert await redis.keys() == [b"somebody-elses"]


async def test_without_any_redis_server_the_demo_imitates_one(start_simulator: StartSimulator) -> None:
    paced = await start_simulator(Options(scenario=Scenario(rate=80)))
    lines: list[Object] = []
    await run_demo(lambda _, data: lines.append(data), vllm_url=paced.url, servers=[])
    assert lines[0]["redis"] == "fakeredis (an imitation in Python)"
    check_story(lines)
    check_summary(lines)


@pytest.mark.parametrize(
    ("signum", "send"),
    [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)],
    ids=["SIGTERM", "Ctrl-C"],  # a terminal sends the latter to the whole group
)
async def test_a_signal_ends_the_demo_and_all_that_it_started(
    halting: Simulator, signum: signal.Signals, send: Callable[[int, int], None]
) -> None:
    ended, of_demo = await end_by_signal(
        "demo", "--vllm-url", halting.url, line="websocket │", signum=signum, send=send
    )
    assert len(of_demo) == 5, "a Redis, two workers, and the guards of both"
    assert ended.status == 130
    assert ended.err == "· interrupted: every process that the demo started has ended\n"
    assert not [child for child in of_demo if child.is_running()]


async def test_a_killed_demo_leaves_no_process_and_no_folder(halting: Simulator) -> None:
    async with started("demo", "--vllm-url", halting.url) as process:
        await line_with(process.stdout, "websocket │")
        of_demo = psutil.Process(process.pid).children(recursive=True)
        folders = set[str]()
        for it in of_demo:
            with suppress(psutil.ZombieProcess):  # a worker that the demo has killed
                folders |= {it.cwd()} if "run" in it.cmdline() else set()
        process.kill()
        await process.wait()
        await asyncio.to_thread(psutil.wait_procs, of_demo, timeout=300)
    assert not [child for child in of_demo if child.is_running()]
    assert len(folders) == 1
    assert not await asyncio.to_thread(Path(*folders).exists)


async def test_takeover_and_kill_are_coloured_on_a_terminal() -> None:
    printed = await on_a_terminal("resumed: ")
    assert "\x1b[31m\x1b[1mworker " in printed
    assert "\x1b[33m\x1b[1mclaimed: " in printed
    assert "\x1b[32m\x1b[1mresumed: " in printed


async def test_no_color_is_respected_on_a_terminal() -> None:
    printed = await on_a_terminal("(SIGKILL)", NO_COLOR="1")
    assert "\x1b" not in printed


async def on_a_terminal(until: str, **variables: str) -> str:
    """What the demo prints on a terminal, up to a text."""
    terminal, end = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "demo", stdin=end, stdout=end, env=environment(TERM="xterm", **variables)
    )
    os.close(end)
    printed = b""
    try:
        async with asyncio.timeout(500):
            while until.encode() not in printed:
                printed += await asyncio.to_thread(os.read, terminal, 4096)
        process.terminate()
        await process.wait()
    finally:
        os.close(terminal)
    return printed.decode()


async def test_the_three_commands_work_as_printed(simulator: Simulator) -> None:
    """Only the port is another, which is free here."""
    ended = await run("demo", "--json", "--vllm-url", simulator.url)
    simulate, *commands = cast("list[str]", parsed(ended.lines)[-1]["try_next"])
    serving = await asyncio.create_subprocess_exec(
        *simulate.replace("8000", "0").split(), env=environment(), stderr=asyncio.subprocess.PIPE
    )  # fmt: skip
    try:
        port = (await line_with(serving.stderr, "listens on")).strip().rpartition(":")[2]
        for command in commands:
            process = await asyncio.create_subprocess_exec(
                *command.replace("8000", port).split(), env=environment(), stdout=asyncio.subprocess.PIPE
            )  # fmt: skip
            assert (await rest(process)).status == 0, command
    finally:
        serving.terminate()
        await serving.communicate()


async def test_a_broken_pipe_ends_the_demo_quietly() -> None:
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "demo", stdout=writer, stderr=asyncio.subprocess.PIPE, env=environment()
    )
    os.close(writer)
    await asyncio.to_thread(os.read, reader, 1)
    os.close(reader)  # as `head -1` does
    assert (await rest(process)).err == ""


async def test_answers_that_fail_are_exit_status_1_with_a_sentence(
    redis_url: str, redis: Redis, start_simulator: StartSimulator
) -> None:
    broken = await start_simulator(Options(scenario=Scenario(fault="error_under_200")))
    ended = await run("demo", "--vllm-url", broken.url, "--redis-url", redis_url)
    assert ended.status == 1
    (error,) = ended.err.splitlines()
    assert error.startswith("Error: not every answer is complete: EngineCore encountered an issue")
    assert "error (attempt " in ended.out, "the summary is there all the same"
    assert await redis.keys() == []


async def test_servers_that_are_not_there_are_reported_at_once() -> None:
    no_vllm, no_redis = await asyncio.gather(
        run("demo", "--vllm-url", "http://u:hidden-pw@127.0.0.1:1"),
        run("demo", "--redis-url", "redis://:hidden-pw@127.0.0.1:1"),
    )
    assert (no_vllm.status, no_redis.status) == (1, 1)
    assert no_vllm.err.startswith("Error: http://***@127.0.0.1:1 does not list the model that it serves: cannot reach")
    assert no_redis.err.startswith("Error: redis://***@127.0.0.1:1 cannot be used: Redis does not answer")
    assert "hidden-pw" not in no_vllm.out + no_vllm.err + no_redis.out + no_redis.err


async def test_a_worker_that_dies_by_itself_ends_the_demo_at_once(halting: Simulator) -> None:
    async with started("demo", "--vllm-url", halting.url) as process:
        await line_with(process.stdout, "websocket │")
        # Both, since on a busy machine the demo may have killed one by now.
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.ZombieProcess):  # the one that the demo has killed
                if "worker" in child.cmdline():
                    child.kill()
        ended = await rest(process)
    assert ended.status == 1
    assert ended.err.startswith("Error: a worker ended unexpectedly")


async def test_with_web_the_page_follows_the_answers_until_the_demo_is_stopped() -> None:
    async with started("demo", "--web") as process:
        line = await line_with(process.stdout, "open this page")
        url, _, ids = line.rpartition(" ")[2].strip().partition("#")
        async with httpx.AsyncClient(timeout=60) as http:
            assert "<title>vllm-relay</title>" in (await http.get(url)).text
            followed = await http.get(f"{url}events?ids={ids}")
        batches = [batch for data in re.findall(r"data: (.*)\n", followed.text) for batch in json.loads(data)]
        assert sum(entry["type"] == "done" for batch in batches for entry in batch["entries"]) == 3
        await line_with(process.stdout, "The page is yours until Ctrl-C")
        of_demo = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        ended = await rest(process)
    assert ended.status == 130
    assert not [child for child in of_demo if child.is_running()]

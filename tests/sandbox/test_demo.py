"""The demo: from nothing to a summary, and nothing of it left afterwards."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from command import environment, line_with, rest, run, started
from conftest import StartSimulator
from redis.asyncio import Redis

from worker.cli.main import main
from worker.contract.entries import Object
from worker.sandbox.demo import run_demo
from worker.sandbox.embedded_redis import find_servers
from worker.sandbox.simulator.requests import answer_to
from worker.sandbox.simulator.server import Options, Scenario

STORY = answer_to([{"role": "user", "content": "Tell me a story"}])
READERS = {"websocket", "logger", "billing"}


def told(lines: list[str]) -> list[Object]:
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
    assert len(ends) == 6
    assert {line["outcome"] for line in ends} == {"done"}
    assert len({line["entries"] for line in ends if line["follower"] in READERS}) == 1
    assert lines[-1]["same"] is True


async def test_the_demo_needs_nothing_and_ends_with_a_summary() -> None:
    ended = await run("demo")
    assert (ended.status, ended.err) == (0, "")
    first, second = ended.lines[:2]
    assert "Redis: redis-server " in first
    assert "vLLM: simulated, 60 tokens/s, http://127.0.0.1:" in second
    for name in READERS:
        assert f"{name} │" in ended.out
    assert ended.out.index("billing comes late") < ended.out.index("billing │")
    assert ended.lines[-1].endswith("all 3 followers of the story saw the same 257 entries")


async def test_with_json_every_line_parses_and_a_given_redis_is_left_clean(
    redis: Redis, redis_url: str, start_simulator: StartSimulator
) -> None:
    paced = await start_simulator(Options(orders=Scenario(rate=200)))
    await redis.set("somebody-elses", "key", ex=60)
    ended = await run("demo", "--json", "--redis-url", redis_url, "--vllm-url", f"{paced.url}/v1")
    assert (ended.status, ended.err) == (0, "")
    lines = told(ended.lines)
    assert lines[0]["redis"] == redis_url
    assert lines[1]["vllm"] == f"{paced.url}/v1"
    check_story(lines)
    check_summary(lines)
    assert await redis.keys() == [b"somebody-elses"]


def test_the_redis_of_the_machine_comes_before_that_of_an_active_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = find_servers()[0]
    bundled, machine = tmp_path / "environment", tmp_path / "machine"
    for folder in (bundled, machine):
        folder.mkdir()
        (folder / server.name).symlink_to(server)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(bundled))
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, (bundled, machine))))
    assert find_servers()[0] == machine / "redis-server"


async def test_without_any_redis_server_the_demo_imitates_one(
    monkeypatch: pytest.MonkeyPatch, start_simulator: StartSimulator
) -> None:
    monkeypatch.setattr("worker.sandbox.embedded_redis.find_servers", list)
    paced = await start_simulator(Options(orders=Scenario(rate=150)))
    lines: list[Object] = []
    await run_demo(lambda _, data: lines.append(data), vllm_url=paced.url)
    assert lines[0]["redis"] == "fakeredis (an imitation in Python)"
    check_story(lines)
    check_summary(lines)


@pytest.mark.parametrize(
    ("signum", "send"),
    [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)],
    ids=["SIGTERM", "Ctrl-C"],  # a terminal sends the latter to the whole group
)
async def test_a_signal_ends_the_demo_and_all_that_it_started(
    signum: signal.Signals, send: Callable[[int, int], None]
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker", "demo",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        await line_with(process.stdout, "logger │")
        of_demo = psutil.Process(process.pid).children(recursive=True)
        assert len(of_demo) == 4, "a Redis, its guard and two workers"
        send(process.pid, signum)
        ended = await rest(process)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    assert ended.status == 130
    assert ended.err == ""
    assert not [child for child in of_demo if child.is_running()]


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
    broken = await start_simulator(Options(orders=Scenario(fault="error_under_200")))
    ended = await run("demo", "--vllm-url", broken.url, "--redis-url", redis_url)
    assert ended.status == 1
    (error,) = ended.err.splitlines()
    assert error.startswith("Error: not every answer is whole: EngineCore encountered an issue")
    assert "error in " in ended.out, "the summary is there all the same"
    assert await redis.keys() == []


async def test_servers_that_are_not_there_are_told_at_once() -> None:
    no_vllm, no_redis = await asyncio.gather(
        run("demo", "--vllm-url", "http://u:hidden-pw@127.0.0.1:1"),
        run("demo", "--redis-url", "redis://:hidden-pw@127.0.0.1:1"),
    )
    assert (no_vllm.status, no_redis.status) == (1, 1)
    assert no_vllm.err.startswith("Error: http://***@127.0.0.1:1 does not say which model it serves: cannot reach")
    assert no_redis.err.startswith("Error: redis://***@127.0.0.1:1 cannot be used: Redis does not answer")
    assert "hidden-pw" not in no_vllm.out + no_vllm.err + no_redis.out + no_redis.err


def test_without_any_redis_at_all_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.sandbox.embedded_redis.find_servers", list)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 1
    install = "install redis-server, or, in a clone of vllm-relay: pip install '.[demo]'"
    assert result.stderr == f"Error: there is no Redis to start: {install}\n"


def test_c8_nothing_says_to_install_the_package_by_its_name() -> None:
    """F5 of C8: it is on no index."""
    root = Path(__file__).parents[2]
    texts = {path: path.read_text() for path in root.glob("worker/**/*.py")}
    assert [path for path, text in texts.items() if re.search(r"pip install\s+\W*vllm-relay", text)] == []


async def test_a_worker_that_dies_is_told_and_not_waited_for() -> None:
    async with started("demo") as process:
        await line_with(process.stdout, "logger │")
        workers = [c for c in psutil.Process(process.pid).children() if "worker" in c.cmdline()]
        assert len(workers) == 2
        workers[0].kill()
        ended = await rest(process)
    assert ended.status == 1
    assert ended.err.startswith("Error: a worker ended before its time")


def test_c1_the_demo_judges_only_the_settings_that_it_uses() -> None:
    result = CliRunner().invoke(main, ["demo", "--vllm-url", "nowhere"], env={"WORKER_SLOTS": "many", "REDIS_URL": "x"})
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: VLLM_URLS holds 'nowhere'")
    assert len(result.stderr.splitlines()) == 1

"""The demo runs from nothing to a summary, and says what it lacks."""

import os
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from command import run

from worker.cli.main import main
from worker.sandbox.embedded_redis import find_servers
from worker.sandbox.simulator.requests import answer_to

STORY = answer_to([{"role": "user", "content": "Tell me a long story"}])
READERS = {"websocket", "logger", "billing"}


async def test_the_demo_needs_nothing_and_shows_a_takeover() -> None:
    ended = await run("demo")
    assert (ended.status, ended.err) == (0, "")
    first, second = ended.lines[:2]
    assert "Redis: redis-server " in first
    assert "vLLM: simulated, 60 tokens/s, http://127.0.0.1:" in second
    pieces = re.findall(r"websocket │ (.*)\n", ended.out)
    takeovers = [text.partition(": ")[0] for text in pieces if text.startswith(("claimed: ", "resumed: "))]
    # A busy machine may keep a worker from running for its short lease. The other one then takes the story over, too.
    assert takeovers == ["claimed", "resumed"] * (len(takeovers) // 2) != []
    text = "".join(text for text in pieces if not text.startswith(("claimed: ", "resumed: ")))
    assert text == STORY, "the text goes on where it stopped, and is printed once"
    between, claimed, _ = ended.out.partition("(SIGKILL)")[2].partition("claimed: ")
    assert between.count("websocket │") == 1 or not claimed or len(takeovers) > 2, "a killed worker writes nothing"
    assert "lease is 2 s" in ended.out.partition("(SIGKILL)")[0]
    assert re.findall(r"→ (reader \d)", ended.out) == ["reader 1", "reader 2"]
    assert "logger │" not in ended.out
    assert "billing │" not in ended.out
    for name in READERS:
        assert f"→ {name}" in ended.out
    assert "all 3 followers of the story saw the same " in ended.out
    assert f"the text equals that of an undisturbed run, all {len(STORY)} characters" in ended.out
    assert "\x1b" not in ended.out, "colour is for terminals"


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


def test_without_any_redis_at_all_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = CliRunner().invoke(main, ["demo"], env={"PATH": str(tmp_path)})
    assert result.exit_code == 1
    install = "install redis-server, or, in a clone of vllm-relay: pip install '.[demo]'"
    assert result.stderr == f"Error: there is no Redis to start: {install}\n"


def test_nothing_says_to_install_the_package_by_its_name() -> None:
    """No package index has it."""
    root = Path(__file__).parents[2]
    texts = {path: path.read_text() for path in root.glob("worker/**/*.py")}
    assert [path for path, text in texts.items() if re.search(r"pip install\s+\W*vllm-relay", text)] == []


def test_the_demo_checks_only_the_settings_that_it_uses() -> None:
    result = CliRunner().invoke(main, ["demo", "--vllm-url", "nowhere"], env={"WORKER_SLOTS": "many", "REDIS_URL": "x"})
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: VLLM_URLS holds 'nowhere'")
    assert len(result.stderr.splitlines()) == 1


def test_without_the_libraries_of_the_gateway_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "worker.gateway.process", None)
    ended = CliRunner().invoke(main, ["demo", "--web"])
    assert ended.exit_code == 1
    assert "install the extra `gateway`" in ended.stderr
